"""What a person may choose about the server: one frozen tree, filled from file, environment and command line."""

import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator

from tightrope.backends.settings import split_pairs
from tightrope.engine.sampler.steps import MAX_DELTA
from tightrope.engine.settings import MAX_ALTERNATIVES, MAX_WAITING, EngineSettings
from tightrope.server.prompts.prompt_formats import FIXED_VARIABLES, PROMPT_FORMATS
from tightrope.server.settings import launcher_words, service_variables
from tightrope.server.settings.launcher_words import WORDS
from tightrope.server.settings.misspelt import no_such
from tightrope.server.settings.options import CONFIG, OPTIONS, Option, TreePath
from tightrope.server.settings.site_names import parse_host_pattern, parse_origin

LogLevel = Literal["debug", "info", "warning", "error"]
ENV_PREFIX = "TIGHTROPE_"
MAX_BODY_BYTES = 1 << 30  # A body is held in memory, as bytes and as objects of several times their size.
MAX_TEMPLATE_BYTES = 4 << 20
MAX_STOPS = 1 << 10  # Each is looked for behind every token.
MAX_STREAMS_MIB = 1 << 16  # All of it is in the front's memory.
MAX_KEEP_S = 86_400.0  # An answer that nobody reads is written meanwhile; a model idles no longer than for a day.
MAX_REPLICAS = 1 << 10  # The front has a connection to each, and as many descriptors to spare.
MAX_GPUS = 16.0  # A machine has no more, and a replica runs on one machine.
MAX_MODELS = 64  # Each has a process with threads, and memory, of its own.


class SettingsError(Exception):
    """A setting is unknown or can't be used; the message is one line that names it and where it came from."""


class ClusterSettings(BaseModel, frozen=True, extra="forbid"):
    """How many engines answer, where Ray runs them."""

    replicas: int = Field(2, ge=1, le=MAX_REPLICAS, description="Replicas of the model.")
    max_replicas: int | None = Field(
        None, ge=1, le=MAX_REPLICAS, description="Replicas that there may be under load; None: no more than always."
    )
    scale_up_s: float = Field(30.0, ge=0, le=MAX_KEEP_S, description="More replicas must be wanted for so long.")
    scale_down_s: float = Field(600.0, ge=0, le=MAX_KEEP_S, description="Fewer replicas must be enough for so long.")
    replica_gpus: float | None = Field(
        None, ge=0, le=MAX_GPUS, description="GPUs of each; None: one where Ray knows any, unless it runs on the CPU."
    )

    @field_validator("max_replicas")
    @classmethod
    def _is_no_less(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < info.data.get("replicas", 1):
            raise ValueError(f"it must not be less than the {info.data['replicas']} replicas that there are always")
        return value


class ServerSettings(BaseModel, frozen=True, extra="forbid"):
    """Everything that is decided before the start; nothing changes afterwards."""

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: str | None = Field(None, min_length=1, repr=False, description="Key that clients must send.")
    admin_key: str | None = Field(None, min_length=1, repr=False, description="Key for changing what is served.")
    cors_origins: tuple[str, ...] = Field((), description="Web origins whose pages may call; * is any.")
    allowed_hosts: tuple[str, ...] = Field((), description="Names in Host headers that mean this server; * is any.")
    max_body_bytes: int = Field(2_000_000, ge=1, le=MAX_BODY_BYTES, description="Largest request body.")
    max_held_bytes: int = Field(
        64_000_000, ge=1, le=MAX_BODY_BYTES, description="Bytes of bodies of requests under way."
    )
    kept_streams_mib: int = Field(
        64, ge=1, le=MAX_STREAMS_MIB, description="Memory for events of streams that clients may come back to."
    )
    keep_streams_s: float = Field(
        120.0, gt=0, le=MAX_KEEP_S, description="Such a stream is kept so long without a reader."
    )
    max_client_batch_size: int = Field(128, ge=1, le=MAX_WAITING, description="Prompts in one completion request.")
    max_stop_sequences: int = Field(4, ge=0, le=MAX_STOPS, description="Stop strings in one request.")
    max_top_n_tokens: int = Field(
        5, ge=0, le=MAX_ALTERNATIVES, description="Most alternatives that a TGI request may ask for."
    )
    watermark_gamma: float = Field(
        0.5, gt=0, lt=1, description="Share of the vocabulary that a watermark makes likelier."
    )
    watermark_delta: float = Field(2.0, ge=0, le=MAX_DELTA, description="What it adds to their logits.")
    served_model_name: str | None = Field(None, min_length=1, description="Name shown to clients; None is the model's.")
    any_model_name: bool | None = Field(
        None, description="Whether any name means the served model; None: on all routes but OpenAI's."
    )
    models: str | None = Field(
        None, min_length=1, description="Folder of models, or a list of them with settings; None: one is served."
    )
    models_max: int = Field(4, ge=1, le=MAX_MODELS, description="Models that may be loaded side by side.")
    sleep_idle_s: float | None = Field(
        None, gt=0, le=MAX_KEEP_S, description="A model that nobody has used for so long is unloaded; None: never."
    )
    chat_template: str | None = Field(
        None, description="Used instead of the model's own: the name of a built-in format, or Jinja source."
    )
    chat_template_args: dict[str, str] = Field({}, description="Variables of the chat template, beneath a request's.")
    log_level: LogLevel = "info"
    tgi_environment: bool = Field(False, description="Whether the variables of TGI's launcher are read.")
    engine: EngineSettings = EngineSettings()
    cluster: ClusterSettings = ClusterSettings()

    @field_validator("admin_key")
    @classmethod
    def _differs(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and value == info.data.get("api_key"):
            raise ValueError("the admin key must not be the API key, which every client has")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _as_ours(cls, value: object) -> object:
        """TGI's launcher takes other programs' names of levels, in any case."""
        level = value.lower() if isinstance(value, str) else value
        return {"warn": "warning", "trace": "debug"}.get(str(level), level)

    @field_validator("cors_origins", "allowed_hosts", mode="before")
    @classmethod
    def _split_list(cls, value: object) -> object:
        """The environment and the command line give the list as one text, with commas."""
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(parse_origin, value))

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(parse_host_pattern, value))

    @property
    def host_names(self) -> frozenset[str]:
        """All names that this server answers to, besides addresses and localhost."""
        return frozenset({*self.allowed_hosts, self.host.lower()})

    @field_validator("chat_template")
    @classmethod
    def _read_template(cls, value: str | None) -> str | None:
        """A value that is neither Jinja source nor a built-in format's name is that of a file."""
        if value is None or value in PROMPT_FORMATS or "{{" in value or "{%" in value:
            return value
        try:
            with open(Path(value).expanduser(), "rb") as file:
                raw = file.read(MAX_TEMPLATE_BYTES + 1)
            if len(raw) > MAX_TEMPLATE_BYTES:
                raise ValueError(f"the template file {value!r} has more than {MAX_TEMPLATE_BYTES} bytes")
            return raw.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ValueError(
                f"can't read the template file {value!r}: {reason}; built-in are {', '.join(PROMPT_FORMATS)}"
            ) from None

    @field_validator("chat_template_args", mode="before")
    @classmethod
    def _split_args(cls, value: object) -> object:
        """The environment and the command line give NAME=VALUE, with commas between several."""
        if not isinstance(value, str):
            return value
        pairs = split_pairs(value)
        for name, text in pairs:
            if text is None or not name.isidentifier() or name in FIXED_VARIABLES:
                raise ValueError(f"expected NAME=VALUE with a variable of the template, not {name!r}")
        return dict(pairs)


def _flag(option: str) -> str:
    return "MODEL" if option == "model" else f"--{option}"


def load_settings(
    arguments: Mapping[str, str],
    environ: Mapping[str, str] | None = None,
    label: Callable[[str], str] = _flag,
) -> ServerSettings:
    """Merge the configuration file, the environment and the command line, the later winning, into one tree.

    `arguments` maps option names ("max-model-len"), and words of TGI's launcher that are none, to what was written
    behind them; label: what to call one of them in an error. The launcher's variables count where `tgi-environment` is
    set; they win over our own, in which an image has its defaults. Raises SettingsError for an unknown option, a value
    that can't be used, an unreadable file, a word that is refused, and two options of one source that contradict each
    other.
    """
    environ = os.environ if environ is None else environ
    variables = _from_environment(environ)
    config = arguments.get(CONFIG, variables.get(CONFIG))
    sources = [_Source(variables, env_name), _Source(_options_alone(arguments, label), label)]
    if config is not None:
        sources.insert(0, _Source(_from_file(Path(config).expanduser()), lambda option: f"{config}: {option}"))
    settings = _merged(sources)
    if settings.tgi_environment:
        sources.insert(-1, _from_launcher(environ))
        settings = _merged(sources)
    return settings


def notes_on_sources(arguments: Mapping[str, str], settings: ServerSettings) -> list[str]:
    """A line on each word of TGI's launcher that changes nothing, of those that `settings` were loaded from, and one on
    variables that are a cluster's."""
    words = launcher_words.idle_words(arguments, os.environ if settings.tgi_environment else {})
    of_services = [name for name, value in os.environ.items() if service_variables.is_of_a_service(name, value)]
    return [*words, *service_variables.describe(of_services)]


class _Source(NamedTuple):
    """Values of options by their names, of any type that TOML has, and what to call an option there."""

    values: Mapping[str, Any]
    label: Callable[[str], str]


def _merged(sources: Iterable[_Source]) -> ServerSettings:
    merged: dict[TreePath, tuple[Any, str]] = {}  # Beside a value stands what to call its source.
    for values, label in sources:
        merged = _implied(values, label) | merged | _place(values, label)
    tree: dict[str, Any] = {}  # It grows into the shape of ServerSettings, whose validation gives it its types.
    for path, (value, _) in merged.items():
        branch = tree
        for step in path[:-1]:
            branch = branch.setdefault(step, {})
        branch[path[-1]] = value
    try:
        return ServerSettings.model_validate(tree)
    except ValidationError as failure:
        raise SettingsError(_one_line(failure, merged)) from None


def overlaid(base: ServerSettings, values: Mapping[str, Any], label: Callable[[str], str]) -> ServerSettings:
    """`base` with these values of options, by their names, in the place of its own. Raises SettingsError.

    label: what to call an option there, in an error.
    """
    placed = _place(values, label)
    tree = base.model_dump()
    for path, (value, _) in (_implied(values, label) | placed).items():
        branch = tree
        for step in path[:-1]:
            branch = branch[step]
        if path in placed or branch[path[-1]] is None:
            branch[path[-1]] = value
    try:
        return ServerSettings.model_validate(tree)
    except ValidationError as failure:
        raise SettingsError(_one_line(failure, placed)) from None


def _options_alone(arguments: Mapping[str, str], label: Callable[[str], str]) -> dict[str, str]:
    """The options among them, without the launcher's words that change nothing. Raises SettingsError."""
    options: dict[str, str] = {}
    for name, value in arguments.items():
        if name in OPTIONS or name == CONFIG:
            options[name] = value
        elif name in WORDS and not WORDS[name].option:
            _check_word(name, label(name))
        else:  # Whoever takes other spellings has found the option of each before.
            raise SettingsError(f"{label(name)}: {no_such(name, label)}")
    return options


def _from_launcher(environ: Mapping[str, str]) -> _Source:
    """What the launcher's variables say of our options. Raises SettingsError."""
    values: dict[str, str] = {}
    labels: dict[str, str] = {}
    for word, value in launcher_words.from_environment(environ).items():
        name = launcher_words.variable(word)
        _check_word(word, name)
        if option := WORDS[word].option:
            if values.get(option, value) != value:
                raise _contradiction(labels[option], name)
            values[option], labels[option] = value, name
    return _Source(values, labels.__getitem__)


def _check_word(word: str, label: str) -> None:
    if WORDS[word].kind == "refused":
        raise SettingsError(f"{label}: {WORDS[word].remark}")


def env_name(option: str) -> str:
    """The environment variable of an option: "max-model-len" is TIGHTROPE_MAX_MODEL_LEN."""
    return ENV_PREFIX + option.replace("-", "_").upper()


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    known = {env_name(name): name for name in (*OPTIONS, CONFIG)}
    ours = {
        name: value
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX) and not service_variables.is_of_a_service(name, value)
    }
    for name in ours:
        if name not in known:
            raise SettingsError(f"{name}: {no_such(name.removeprefix(ENV_PREFIX), env_name)}")
    return {known[name]: value for name, value in ours.items()}


def _from_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: can't read the configuration: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: the configuration is not UTF-8 text") from None
    # TOML's own are not all: numbers with thousands of digits raise another.
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: not TOML: {error}") from None
    values = {name.replace("_", "-"): value for name, value in values.items()}
    for name in values:
        if name not in OPTIONS:
            raise SettingsError(f"{path}: {name}: {no_such(name)}")
    return values


def _place(values: Mapping[str, Any], label: Callable[[str], str]) -> dict[TreePath, tuple[Any, str]]:
    """Give every option's value its place in the tree. Raises SettingsError when two options want the same place."""
    placed: dict[TreePath, tuple[Any, str]] = {}
    for name, value in values.items():
        if name == CONFIG:
            continue
        option: Option = OPTIONS[name]
        for path, setting in {option.path: value, **option.also}.items():
            if path in placed:
                raise _contradiction(placed[path][1], label(name))
            placed[path] = (_reciprocal(setting, label(name)) if option.is_reciprocal else setting, label(name))
    return placed


def _contradiction(one: str, other: str) -> SettingsError:
    return SettingsError(f"{one} and {other} contradict each other; give only one of them")


def _implied(values: Mapping[str, Any], label: Callable[[str], str]) -> dict[TreePath, tuple[Any, str]]:
    """What the options given imply where no source says otherwise."""
    given = {name: OPTIONS[name] for name in values if name != CONFIG}
    return {path: (value, label(name)) for name, option in given.items() for path, value in option.implies.items()}


def _reciprocal(value: object, label: str) -> float:
    """One over a number or its text. Raises SettingsError when it is none."""
    try:
        number = float(value) if isinstance(value, str | int | float) else 0.0
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise SettingsError(f"{label}: input should be a number above 0, not {value!r:.80}")
    return 1 / number


def _one_line(failure: ValidationError, merged: Mapping[TreePath, tuple[Any, str]]) -> str:
    error = failure.errors(include_url=False)[0]
    location = tuple(str(step) for step in error["loc"])
    value, label = next(
        ((value, label) for path, (value, label) in merged.items() if location[: len(path)] == path),
        (error["input"], ".".join(location)),
    )
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{label}: {message}"
    expected = message.split(", unable to")[0]  # The message goes on with "unable to parse string as an integer".
    return f"{label}: {expected[0].lower()}{expected[1:]}, not {value!r:.80}"
