"""Settings: one name everywhere, a clear order of sources, and one line for whatever is wrong."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from tightrope.server.settings.options import OPTIONS
from tightrope.server.settings.settings import (
    MAX_TEMPLATE_BYTES,
    ServerSettings,
    SettingsError,
    env_name,
    load_settings,
    notes_on_sources,
)

pytestmark = pytest.mark.quick


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path):
    config = tmp_path / "tightrope.toml"
    config.write_text('port = 1\nhost = "::1"\nthreads = 1\n')

    settings = load_settings(
        {"config": str(config), "port": "3"}, {"TIGHTROPE_PORT": "2", "TIGHTROPE_THREADS": "2", "HOME": "/"}
    )

    assert (settings.port, settings.engine.model.threads, settings.host) == (3, 2, "::1")


def test_the_environment_can_name_the_file(tmp_path: Path):
    config = tmp_path / "tightrope.toml"
    config.write_text("max_model_len = 4096\n")  # an underscore does as well as a hyphen

    assert load_settings({}, {"TIGHTROPE_CONFIG": str(config)}).engine.model.max_model_len == 4096


def test_nothing_given_gives_the_defaults():
    assert load_settings({}, {}) == ServerSettings()


def leaves(model: type[BaseModel], path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """The places of all single values in a tree of settings."""
    found = set()
    for name, info in model.model_fields.items():
        is_branch = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        found |= leaves(info.annotation, (*path, name)) if is_branch else {(*path, name)}
    return found


def test_every_setting_has_an_option_and_every_option_a_setting():
    assert {option.path for option in OPTIONS.values()} == leaves(ServerSettings)


def test_no_two_options_share_a_spelling():
    spellings = [s for name, option in OPTIONS.items() for s in (f"--{name}", *option.aliases)]

    assert len(spellings) == len(set(spellings))


def test_alpha_value_and_compress_pos_emb_are_short_for_a_scaling_and_its_factor():
    ntk = load_settings({"alpha-value": "2.5"}, {}).engine.model.rope
    linear = load_settings({"compress-pos-emb": "4"}, {}).engine.model.rope

    assert (ntk.kind, ntk.factor) == ("ntk", 2.5)
    assert (linear.kind, linear.factor) == ("linear", 4)


def test_a_frequency_scale_is_one_over_the_factor_and_linear_unless_another_source_names_a_kind(tmp_path: Path):
    config = tmp_path / "tightrope.toml"
    config.write_text('rope-scaling = "yarn"\n')

    alone = load_settings({"rope-freq-scale": "0.125"}, {}).engine.model.rope
    beside = load_settings({"rope-freq-scale": "0.5", "config": str(config)}, {}).engine.model.rope

    assert (alone.kind, alone.factor) == ("linear", 8)
    assert (beside.kind, beside.factor) == ("yarn", 2)


def test_a_factor_alone_is_linear_unless_a_source_names_a_kind(tmp_path: Path):
    config = tmp_path / "tightrope.toml"
    config.write_text('rope-scaling = "yarn"\n')

    alone = load_settings({"rope-factor": "4"}, {}).engine.model.rope
    beside = load_settings({"rope-factor": "4", "config": str(config)}, {}).engine.model.rope

    assert (alone.kind, alone.factor) == ("linear", 4)
    assert (beside.kind, beside.factor) == ("yarn", 4)


OF_A_SERVICE = {  # as Kubernetes sets them in each container beside a service `tightrope` with a named port
    "TIGHTROPE_SERVICE_HOST": "10.0.0.3",
    "TIGHTROPE_SERVICE_PORT": "8000",
    "TIGHTROPE_SERVICE_PORT_HTTP_API": "8000",
    "TIGHTROPE_PORT": "tcp://10.0.0.3:8000",
    "TIGHTROPE_PORT_8000_TCP": "tcp://10.0.0.3:8000",
    "TIGHTROPE_PORT_8000_TCP_PROTO": "tcp",
    "TIGHTROPE_PORT_8000_TCP_PORT": "8000",
    "TIGHTROPE_PORT_8000_TCP_ADDR": "10.0.0.3",
}


@pytest.mark.parametrize("service", ["TIGHTROPE", "TIGHTROPE_API", "TIGHTROPE_2"])
def test_a_clusters_variables_of_a_service_are_no_settings_and_told_in_one_line(
    service: str, monkeypatch: pytest.MonkeyPatch
):
    found = {name.replace("TIGHTROPE", service): value for name, value in OF_A_SERVICE.items()}
    for name, value in found.items():
        monkeypatch.setenv(name, value)

    settings = load_settings({}, found | {"TIGHTROPE_THREADS": "1"})

    assert settings == load_settings({}, {"TIGHTROPE_THREADS": "1"})
    assert notes_on_sources({}, settings) == [
        f"8 variables such as {service}_PORT change nothing: a cluster has set them for a service of that name"
    ]


@pytest.mark.parametrize(
    "name", ["TIGHTROPE_PORTS", "TIGHTROPE_SERVICE_HOSTS", "TIGHTROPE_PORT_8000_TCP_X", "TIGHTROPE_SERVICE"]
)
def test_a_variable_that_is_like_a_services_is_still_an_unknown_setting(name: str):
    with pytest.raises(SettingsError, match=f"^{name}: no such setting"):
        load_settings({}, {name: "tcp://10.0.0.3:8000"})


@pytest.mark.parametrize(
    ("word", "level"), [("warn", "warning"), ("WARN", "warning"), ("trace", "debug"), ("INFO", "info")]
)
def test_levels_of_the_log_go_by_other_programs_names_too(word: str, level: str):
    assert load_settings({"log-level": word}, {}).log_level == level


def test_a_chat_template_is_a_file_or_its_source(tmp_path: Path):
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}")

    assert load_settings({"chat-template": str(file)}, {}).chat_template == "{{ messages }}"
    assert load_settings({"chat-template": "{% if 1 %}{% endif %}"}, {}).chat_template == "{% if 1 %}{% endif %}"


def test_origins_come_as_one_text_or_as_a_list(tmp_path: Path):
    config = tmp_path / "tightrope.toml"
    config.write_text('cors-origins = ["https://a.example", "https://b.example"]\n')
    expected = ("https://a.example", "https://b.example")

    assert load_settings({"config": str(config)}, {}).cors_origins == expected
    assert load_settings({"cors-origins": "https://a.example, https://b.example"}, {}).cors_origins == expected


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        ({"port": "x"}, {}, "--port: input should be a valid integer, not 'x'"),
        ({"port": "65536"}, {}, "--port: input should be less than or equal to 65535, not '65536'"),
        ({"kv-cache": "q5"}, {}, "--kv-cache: input should be 'auto', 'q8', 'q4' or 'f16', not 'q5'"),
        ({"rope-theta": "nan"}, {}, "--rope-theta: input should be "),
        ({"rope-factor": "0"}, {}, "--rope-factor: input should be "),
        ({"rope-factor": "nan"}, {}, "--rope-factor: input should be "),
        ({"rope-freq-scale": "0"}, {}, "--rope-freq-scale: input should be a number above 0, not '0'"),
        ({"rope-freq-scale": "x"}, {}, "--rope-freq-scale: input should be a number above 0, not 'x'"),
        ({"log-level": "info,router=debug"}, {}, "--log-level: input should be 'debug', 'info', 'warning' or 'error'"),
        ({"rope-scaling": "spiral"}, {}, "--rope-scaling: input should be 'none', 'linear', 'dynamic', "),
        ({}, {"TIGHTROPE_THREADS": "-1"}, "TIGHTROPE_THREADS: input should be greater than or equal to 0, not '-1'"),
        ({}, {"TIGHTROPE_PROT": "1"}, "TIGHTROPE_PROT: no such setting"),
        ({"alpha-value": "2", "rope-scaling": "yarn"}, {}, "--alpha-value and --rope-scaling contradict each other"),
        (
            {"chat-template": "/no/such.jinja"},
            {},
            "--chat-template: can't read the template file '/no/such.jinja': No such",
        ),
        ({"config": "/no/such.toml"}, {}, "/no/such.toml: can't read the configuration: No such file"),
        ({"max-num-seqs": "0"}, {}, "--max-num-seqs: input should be greater than or equal to 1, not '0'"),
        ({"lora": "../up=/tmp"}, {}, "--lora: '../up' can't name an adapter: up to 128 letters, digits"),
        ({"lora-folder": "/no/such/folder"}, {}, "--lora-folder: there is no folder '/no/such/folder'"),
        ({"lora-memory-mib": "0"}, {}, "--lora-memory-mib: input should be greater than or equal to 1, not '0'"),
        ({"admin-key": "hunter2"}, {"TIGHTROPE_API_KEY": "hunter2"}, "--admin-key: the admin key must not be the API"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_in_one_line(
    arguments: dict[str, str], environ: dict[str, str], message: str
):
    with pytest.raises(SettingsError) as caught:
        load_settings(arguments, environ)

    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "prot: no such setting"),
        ("port = [1]", "port: input should be a valid integer, not [1]"),
        ("port = ", "not TOML: "),
        ("[engine]\nthreads = 1", "engine: no such setting"),
    ],
)
def test_what_is_wrong_in_the_file_is_named_with_the_file(tmp_path: Path, text: str, message: str):
    config = tmp_path / "tightrope.toml"
    config.write_text(text)

    with pytest.raises(SettingsError) as caught:
        load_settings({"config": str(config)}, {})

    assert str(caught.value).startswith(f"{config}: {message}")


def test_the_keys_are_not_shown_with_the_settings():
    assert "hunter" not in repr(load_settings({"api-key": "hunter2", "admin-key": "hunter3"}, {}))


def test_an_options_variable_is_its_name_in_capitals():
    assert env_name("max-model-len") == "TIGHTROPE_MAX_MODEL_LEN"


def test_a_template_file_that_never_ends_is_refused(tmp_path: Path):
    (tmp_path / "chat.jinja").symlink_to("/dev/zero")
    with pytest.raises(SettingsError, match=f"more than {MAX_TEMPLATE_BYTES} bytes"):
        load_settings({"chat-template": str(tmp_path / "chat.jinja")}, {})
