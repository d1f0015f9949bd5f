"""The commands: `tightrope serve`, `cluster`, `chat`, `plan`, `warm`, `sessions`, `perplexity` and `doctor`.

Up front only the table of options is imported, so that `--help` answers at once.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from tightrope import __version__
from tightrope.engine.console import printable
from tightrope.server.cli.failures import CommandFailed, UsageError
from tightrope.server.settings.launcher_words import words_without_option
from tightrope.server.settings.options import CLUSTER_GROUP, OPTIONS, SEVERAL_MODELS_GROUP

if TYPE_CHECKING:
    from tightrope.server.settings.settings import ServerSettings  # Its libraries take half a second to import.

EPILOG = """Each option can also stand in the file of --config (max-model-len = 8192) and in the environment
(TIGHTROPE_MAX_MODEL_LEN=8192). The environment wins over the file, the command line over both. The flags of
text-generation-launcher are understood as well."""
OWN_ARGUMENTS: Mapping[str, Sequence[str]] = {  # These stand beside the options that settings are made of.
    "serve": (),
    "cluster": (),
    "chat": ("url", "system", "max_tokens"),
    "plan": ("memory", "devices", "device_memory", "json"),
    "warm": ("arch",),
    "sessions": ("folder", "delete", "older_than"),
    "perplexity": ("text", "contexts", "max_tokens", "compare_kv", "json", "plot"),
    "doctor": (),
}
_VERSION = f"tightrope {__version__}"
_MODEL_OPTIONS = [name for name, option in OPTIONS.items() if option.path[:2] == ("engine", "model")]
OWN_SERVER_GROUPS = frozenset({"model", "context and memory", "speed"})  # Only these matter to a chat with a model.


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 when it failed, 2 when it can't be understood."""
    given = vars(_parser().parse_args(arguments))
    command = given.pop("command")
    own = {name: given.pop(name, None) for name in OWN_ARGUMENTS[command]}
    if "model_option" in given:
        if "model" in given:
            return _fail("MODEL and --model name a model twice; give only one of them", UsageError.status)
        given["model"] = given.pop("model_option")
    values = {
        name.replace("_", "-"): ",".join(value) if isinstance(value, list) else value for name, value in given.items()
    }
    try:
        match command:
            case "serve":
                return _serve(values)
            case "cluster":
                return _cluster(values)
            case "chat":
                return _chat(values, **own)
            case "plan":
                return _plan(values, own)
            case "doctor":
                return _doctor(values)
            case "warm":
                return _warm(values, own["arch"])
            case "sessions":
                return _sessions(**own)
        return _perplexity(values, own)
    except CommandFailed as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        return 130  # A shell reports a command that Ctrl-C has ended in this way.


def _settings(values: Mapping[str, str]) -> "ServerSettings":
    from tightrope.server.settings.settings import SettingsError, load_settings

    try:
        return load_settings(values)
    except SettingsError as error:
        raise UsageError(str(error)) from None


def _serve(values: Mapping[str, str]) -> int:
    settings = _settings(values)
    from tightrope.server.cli.serve import serve
    from tightrope.server.settings.settings import notes_on_sources

    return serve(settings, notes_on_sources(values, settings))


def _cluster(values: Mapping[str, str]) -> int:
    settings = _settings(values)
    from tightrope.server.cli.cluster import cluster
    from tightrope.server.settings.settings import notes_on_sources

    return cluster(settings, notes_on_sources(values, settings))


def _chat(values: Mapping[str, str], url: str | None, system: str | None, max_tokens: int | None) -> int:
    from tightrope.server.cli.chat import chat, own_server

    ignored = sorted(values.keys() - {"api-key", "config"})
    if url is not None and ignored:
        raise UsageError(f"--url: a running server has its settings already; leave out --{ignored[0]}")
    settings = _settings(values)
    if url is not None:
        return chat(url, settings.api_key, system, max_tokens)
    with own_server(values) as own_url:
        return chat(own_url, settings.api_key, system, max_tokens)


def _plan(values: Mapping[str, str], own: Mapping[str, Any]) -> int:
    from tightrope.server.cli.plan import device_sizes, parse_size, plan

    settings = _settings(values)
    memory_bytes = None if own["memory"] is None else parse_size(own["memory"])
    device_bytes = device_sizes(own["devices"], own["device_memory"])
    return plan(settings.engine.model, memory_bytes, device_bytes, as_json=own["json"] is True)


def _warm(values: Mapping[str, str], arch: str | None) -> int:
    from tightrope.server.cli.warm import parse_architectures, warm

    architectures = parse_architectures(arch)
    return warm(_settings(values).engine.model, architectures)


def _sessions(folder: str, delete: str | None, older_than: str | None) -> int:
    from tightrope.server.cli.sessions import sessions

    return sessions(folder, delete, older_than)


def _perplexity(values: Mapping[str, str], own: Mapping[str, Any]) -> int:
    from tightrope.server.cli.perplexity.command import Arguments, perplexity

    arguments = Arguments.of(**own)
    return perplexity(arguments.fit(_settings(values).engine.model), arguments)


def _doctor(values: Mapping[str, str]) -> int:
    from tightrope.server.cli.doctor import doctor

    return doctor(_settings(values).engine.model)


def _fail(message: str, status: int) -> int:
    print(f"tightrope: {printable(' '.join(message.split()))}", file=sys.stderr)  # It is one line, whatever it quotes.
    return status


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the list of all options in front of it."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{message}; see {self.prog} --help", UsageError.status))


class _Formatter(argparse.HelpFormatter):
    """Names the value once behind all spellings of an option, not behind each."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {action.metavar}"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tightrope", description="Long contexts in tight memory: serve the chat models you have.")
    parser.add_argument("--version", action="version", version=_VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    serve = _add_command(commands, "serve", "serve a model over HTTP")
    _add_options(serve, [name for name, option in OPTIONS.items() if option.group != CLUSTER_GROUP])
    _add_launcher_words(serve)
    cluster = _add_command(commands, "cluster", "serve several replicas of a model, by Ray, on this machine")
    _add_options(cluster, [name for name, option in OPTIONS.items() if option.group != SEVERAL_MODELS_GROUP])
    chat = _add_command(
        commands, "chat", "chat in the terminal, with a running server or with a model served meanwhile"
    )
    talk = chat.add_argument_group("chat")
    talk.add_argument("--url", metavar="URL", help="talk to this running server, such as http://127.0.0.1:8080")
    talk.add_argument("--system", metavar="TEXT", help="system prompt")
    talk.add_argument(
        "--max-tokens", metavar="N", type=_count, help="longest answer (default: to the end of the window)"
    )
    own = [name for name, option in OPTIONS.items() if option.group in OWN_SERVER_GROUPS]
    _add_options(chat, [*own, "api-key", "log-level"])
    _add_plan(commands)
    _add_warm(commands)
    _add_sessions(commands)
    _add_perplexity(commands)
    _add_doctor(commands)
    return parser


def _add_plan(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _add_command(
        commands, "plan", "say what a model needs and the largest context that fits, without loading it"
    )
    own = parser.add_argument_group("plan")
    own.add_argument("--memory", metavar="SIZE", help="the machine's memory, such as 24GiB (default: what is free)")
    own.add_argument(
        "--devices",
        metavar="SIZE,...",
        help="cards, here or elsewhere: what the driver of each calls free while a process uses it, such as "
        "22.8GiB,22.8GiB (default: what is free on those that are here)",
    )
    own.add_argument("--device-memory", metavar="SIZE", help="the same")
    own.add_argument("--json", action="store_true", help="print one JSON object")
    _add_options(parser, _MODEL_OPTIONS)


def _add_warm(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _add_command(commands, "warm", "compile a model's kernels for a card, so that serving it compiles none")
    own = parser.add_argument_group("warm")
    own.add_argument(
        "--arch",
        metavar="SM,SM,...",
        help="cards to compile for, such as sm_86 (RTX 30) or sm_89 (default: the one here)",
    )
    _add_options(parser, _MODEL_OPTIONS)


def _add_sessions(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _add_command(commands, "sessions", "list or delete the chats that --session-dir keeps", "DIR ")
    parser.add_argument("folder", metavar="DIR", help="the folder that --session-dir names")
    parser.add_argument(
        "--delete", metavar="NAME,NAME,...", help="delete these chats, called as they are listed, or all"
    )
    parser.add_argument("--older-than", metavar="DAYS", help="delete only what was of no use for so long")


def _add_perplexity(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _add_command(commands, "perplexity", "measure how well a model predicts a text, by context length")
    own = parser.add_argument_group("measurement")
    own.add_argument("--text", metavar="FILE", required=True, help="text to predict, UTF-8")
    own.add_argument("--contexts", metavar="N,N,...", help="context lengths in tokens (default: 512,1024,2048)")
    own.add_argument(
        "--max-tokens", metavar="N", type=_count, help="tokens to run for each length (default: the whole text)"
    )
    own.add_argument(
        "--compare-kv", metavar="TYPES", help="say what caches of these types, such as q8,q4, change against f16"
    )
    own.add_argument("--json", metavar="FILE", help="write the results there as well")
    own.add_argument("--plot", metavar="FILE.png", help="draw the table there as well")
    _add_options(parser, _MODEL_OPTIONS)


def _add_doctor(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _add_command(commands, "doctor", "say what this machine is, and try all kernels on it", "")
    _add_options(parser, ["device", "embedding-model", "embedding-max-tokens"], takes_model=False)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"should be a positive number, not {text!r}")
    return int(text)


def _add_command(
    commands: "argparse._SubParsersAction[_Parser]", name: str, summary: str, model: str = "[MODEL] "
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        usage=f"tightrope {name} {model}[options]",
        epilog=EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )


def _add_options(parser: argparse.ArgumentParser, names: Sequence[str], *, takes_model: bool = True) -> None:
    if takes_model:
        parser.add_argument("model", nargs="?", metavar="MODEL", help=OPTIONS["model"].help)
    parser.add_argument("--config", metavar="FILE", help="TOML file with options")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name in names:
        option = OPTIONS[name]
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        spellings = [*(a for a in option.aliases if not a.startswith("--")), f"--{name}"]
        spellings += [alias for alias in option.aliases if alias.startswith("--")]
        groups[option.group].add_argument(
            *spellings,
            dest="model_option" if name == "model" else name.replace("-", "_"),
            help=option.help,
            **({"action": _Switch} if option.is_switch else _taking(option.metavar, option.is_flag, option.is_list)),
        )


def _add_launcher_words(parser: argparse.ArgumentParser) -> None:
    """TGI's words that are no options of ours: docs/api.md tells of them, and the help does not."""
    parser.add_argument("-V", "--version", action="version", version=_VERSION, help=argparse.SUPPRESS)
    for name, word in words_without_option():
        spellings = [word.short, f"--{name}"] if word.short else [f"--{name}"]
        parser.add_argument(*spellings, help=argparse.SUPPRESS, **_taking("VALUE", word.is_flag))


class _Switch(argparse.BooleanOptionalAction):
    """An option that stands alone, with --no- before its name or without."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, "false" if (option_string or "").startswith("--no-") else "true")


def _taking(metavar: str, is_flag: bool, is_list: bool = False) -> dict[str, Any]:
    """How argparse is to take an option's value."""
    if is_flag:
        return {"action": "store_const", "const": "true"}
    return {"action": "append" if is_list else "store", "metavar": metavar}
