"""Every word of TGI's launcher, flag and variable, is taken, changes nothing and says so, or is refused by name."""

import re
from pathlib import Path

import pytest
from checkout import ROOT

from tightrope.server.cli.commands import run
from tightrope.server.settings.launcher_words import WORDS, Word, from_environment, idle_words, variable
from tightrope.server.settings.options import OPTIONS
from tightrope.server.settings.settings import ServerSettings, SettingsError, load_settings

pytestmark = pytest.mark.quick

ASKED = {"TIGHTROPE_TGI_ENVIRONMENT": "true"}
PAGE = (ROOT / "docs/api.md").read_text("utf-8")

# As text-generation-launcher 3.3.7 lists them with --help, but for help and version; LOG_LEVEL is a variable alone.
OF_THE_LAUNCHER = """
    model-id revision validation-workers sharded num-shard quantize speculate dtype kv-cache-dtype trust-remote-code
    max-concurrent-requests max-best-of max-stop-sequences max-top-n-tokens max-input-tokens max-input-length
    max-total-tokens waiting-served-ratio max-batch-prefill-tokens max-batch-total-tokens max-waiting-tokens
    max-batch-size cuda-graphs hostname port prometheus-port shard-uds-path master-addr master-port
    huggingface-hub-cache weights-cache-override disable-custom-kernels cuda-memory-fraction rope-scaling rope-factor
    json-output otlp-endpoint otlp-service-name cors-allow-origin api-key watermark-gamma watermark-delta ngrok
    ngrok-authtoken ngrok-edge tokenizer-config-path disable-grammar-support env max-client-batch-size lora-adapters
    usage-stats payload-limit enable-prefill-logprobs graceful-termination-timeout log-level
"""

# A value of each taken word that is none of ours by default, and what becomes of it.
VALUES: dict[str, tuple[str, object]] = {
    "model-id": ("org/name", "org/name"),
    "revision": ("refs/pr/2", "refs/pr/2"),
    "quantize": ("gptq", "gptq"),
    "sharded": ("true", -1),
    "num-shard": ("4", 4),
    "dtype": ("float16", "float16"),
    "max-concurrent-requests": ("7", 7),
    "max-best-of": ("3", 3),
    "max-stop-sequences": ("6", 6),
    "max-top-n-tokens": ("9", 9),
    "max-input-tokens": ("1000", 1000),
    "max-input-length": ("1000", 1000),
    "max-total-tokens": ("2000", 2000),
    "max-batch-prefill-tokens": ("4096", 4096),
    "max-batch-total-tokens": ("32000", 32000),
    "max-batch-size": ("5", 5),
    "hostname": ("::", "::"),
    "port": ("3000", 3000),
    "huggingface-hub-cache": ("/data", "/data"),
    "weights-cache-override": ("/data", "/data"),
    "cuda-memory-fraction": ("0.9", 0.9),
    "rope-scaling": ("dynamic", "dynamic"),
    "rope-factor": ("2.0", 2.0),
    "cors-allow-origin": ("https://a.example", ("https://a.example",)),
    "api-key": ("hunter2", "hunter2"),
    "max-client-batch-size": ("32", 32),
    "lora-adapters": ("one=/adapters/one,two=/adapters/two", {"one": "/adapters/one", "two": "/adapters/two"}),
    "payload-limit": ("4000000", 4000000),
    "log-level": ("debug", "debug"),
    "watermark-gamma": ("0.25", 0.25),
    "watermark-delta": ("3.5", 3.5),
}
IDLE = [name for name, word in WORDS.items() if word.kind == "idle"]
REFUSED = [name for name, word in WORDS.items() if word.kind == "refused"]


def setting(settings: ServerSettings, option: str) -> object:
    value: object = settings
    for step in OPTIONS[option].path:
        value = getattr(value, step)
    return value


def test_the_words_are_the_launchers():
    assert list(WORDS) == OF_THE_LAUNCHER.split()
    assert VALUES.keys() == {name for name, word in WORDS.items() if word.kind == "taken"}


def test_a_taken_word_is_a_spelling_of_the_option_that_it_means():
    for name, word in WORDS.items():
        spellings = [s for option, o in OPTIONS.items() for s in (f"--{option}", *o.aliases)]
        if word.kind == "taken":
            assert f"--{name}" in (f"--{word.option}", *OPTIONS[word.option].aliases)
        else:
            assert f"--{name}" not in spellings
            assert word.short not in spellings


@pytest.mark.parametrize("name", VALUES)
def test_a_taken_words_variable_sets_its_option_where_that_is_asked_for(name: str):
    value, expected = VALUES[name]
    environ = {variable(name): value}

    assert setting(load_settings({}, environ | ASKED), WORDS[name].option) == expected
    assert load_settings({}, environ) == ServerSettings()


def rows() -> list[tuple[str, str, str]]:
    """The table of the page: flag, variable, and what is done."""
    return re.findall(r"^\| (`-.*`) \| (`[A-Z_]+`|) \| (.*) \|$", PAGE, re.MULTILINE)


def told(name: str, word: Word) -> tuple[str, str, str]:
    """The row of a word."""
    if word.kind == "taken":
        done = f"`--{word.option}`" + (f"; {word.remark}" if word.remark else "")
    elif word.kind == "idle":
        done = f"changes nothing: {word.remark}"
    else:
        done = f"refused: {word.remark}"
    flag = f"`--{name}`" + (f", `{word.short}`" if word.short else "")
    return flag, "" if name == "env" else f"`{variable(name)}`", done


def test_the_table_of_the_page_is_the_one_of_the_code():
    expected = [told(name, word) for name, word in WORDS.items()]

    assert rows() == expected, "\n".join(f"| {' | '.join(row)} |" for row in expected)


@pytest.mark.parametrize("name", IDLE)
def test_a_word_that_changes_nothing_says_so(name: str):
    value = "true" if WORDS[name].is_flag else "x"

    assert load_settings({name: value}, {}) == ServerSettings()
    assert idle_words({name: value, "port": "1"}, {}) == [f"--{name} changes nothing: {WORDS[name].remark}"]
    if name != "env":
        lines = idle_words({}, {variable(name): value})
        assert lines == [f"{variable(name)} changes nothing: {WORDS[name].remark}"]
        assert load_settings({}, ASKED | {variable(name): value}).tgi_environment


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_word_is_one_line_that_says_what_would_be_right(name: str):
    value = "true" if WORDS[name].is_flag else "2"

    with pytest.raises(SettingsError) as flag:
        load_settings({name: value}, {})
    with pytest.raises(SettingsError) as found:
        load_settings({}, ASKED | {variable(name): value})

    assert str(flag.value) == f"--{name}: {WORDS[name].remark}"
    assert str(found.value) == f"{variable(name)}: {WORDS[name].remark}"


def test_a_flags_variable_that_is_off_is_not_given():
    off = {"NGROK": "false", "TRUST_REMOTE_CODE": "0", "JSON_OUTPUT": "", "DISABLE_GRAMMAR_SUPPORT": "No"}

    assert from_environment(off) == {}
    assert from_environment({"JSON_OUTPUT": "true"}) == {"json-output": "true"}


def test_an_empty_variable_is_not_set_but_for_the_key():
    assert from_environment({"QUANTIZE": "", "REVISION": ""}) == {}
    with pytest.raises(SettingsError, match=r"^API_KEY: .*at least 1 character"):
        load_settings({}, ASKED | {"API_KEY": ""})


@pytest.mark.parametrize(
    ("value", "host"),
    [("3f2a8c1b9d0e", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("::1", "::1"), ("localhost", "localhost")],
)
def test_a_host_name_that_docker_gives_a_container_is_no_address_to_listen_on(value: str, host: str):
    assert load_settings({}, ASKED | {"HOSTNAME": value}).host == host


def test_the_launchers_variables_win_over_our_own_and_the_command_line_over_both():
    environ = ASKED | {"PORT": "1", "TIGHTROPE_PORT": "2"}

    assert load_settings({}, environ).port == 1
    assert load_settings({"port": "3"}, environ).port == 3


def test_two_variables_of_one_option_must_agree():
    environ = ASKED | {"MAX_INPUT_TOKENS": "5", "MAX_INPUT_LENGTH": "5"}

    assert load_settings({}, environ).engine.limits.max_input_tokens == 5
    with pytest.raises(SettingsError, match=r"^MAX_INPUT_TOKENS and MAX_INPUT_LENGTH contradict each other"):
        load_settings({}, environ | {"MAX_INPUT_LENGTH": "6"})


def test_what_is_wrong_in_a_variable_is_named_with_it():
    with pytest.raises(SettingsError, match=r"^MAX_TOTAL_TOKENS: input should be a valid integer, not 'many'$"):
        load_settings({}, ASKED | {"MAX_TOTAL_TOKENS": "many"})
    with pytest.raises(SettingsError, match=r"^QUANTIZE: input should be 'awq', 'exl2', .*not 'eetq'$"):
        load_settings({}, ASKED | {"QUANTIZE": "eetq"})


def test_the_file_may_ask_for_the_variables(tmp_path: Path):
    (tmp_path / "t.toml").write_text("tgi-environment = true\n")

    assert load_settings({"config": str(tmp_path / "t.toml")}, {"PORT": "3000"}).port == 3000


@pytest.mark.parametrize(
    "flags",
    [
        ["--num-shard", "9"],
        ["--num-shard=1", "--port", "0", "--ngrok"],
        ["--ngrok"],
        ["-e", "-g", "90", "--json-output", "--kv-cache-dtype", "fp8_e5m2"],
    ],
)
def test_flags_are_refused_before_anything_starts(flags: list[str], capsys: pytest.CaptureFixture[str]):
    assert run(["serve", *flags]) == 2

    line = capsys.readouterr().err
    assert re.fullmatch(r"tightrope: --(tensor-parallel|ngrok|kv-cache-dtype): [^\n]+\n", line)


def test_an_origin_may_be_named_once_for_each_page():
    """The launcher takes the flag several times."""
    from tightrope.server.cli.commands import _parser

    given = _parser().parse_args(["serve", "--cors-allow-origin", "https://a", "--cors-allow-origin", "https://b"])

    assert given.cors_origins == ["https://a", "https://b"]
