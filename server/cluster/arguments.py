"""The arguments of our application in a configuration file of Ray Serve: options of ours."""

from collections.abc import Mapping
from typing import Any

from tightrope.server.settings.settings import ServerSettings, SettingsError, load_settings


def settings_of(arguments: Mapping[Any, Any], environ: Mapping[str, str] | None = None) -> ServerSettings:
    """Options by their names, as a file of ours has them; they win over the environment. Raises SettingsError."""
    values: dict[str, str] = {}
    for name, value in arguments.items():
        option = str(name).replace("_", "-")
        if option in values:
            raise SettingsError(f"{option}: it is there twice")
        values[option] = _text(option, value)
    settings = load_settings(values, environ, label=str)
    check_serves_one_model(settings)
    return settings


def check_serves_one_model(settings: ServerSettings) -> None:
    """Raises SettingsError for what is set, wherever that is, and no cluster does."""
    if settings.models is not None:
        raise SettingsError("models: a cluster serves one model; name it, or use `tightrope serve`")
    if "models_max" in settings.model_fields_set:
        raise SettingsError("models-max: a cluster serves one model; leave it out, or use `tightrope serve`")
    if settings.sleep_idle_s is not None:
        raise SettingsError("sleep-idle-seconds: a cluster never unloads its model; --max-replicas has it scale")


def _text(option: str, value: object) -> str:
    """A value as the command line would have it."""
    match value:
        case bool():
            return str(value).lower()
        case str() | int() | float():
            return str(value)
        case list() if not any(isinstance(part, list | dict) for part in value):
            return ",".join(_text(option, part) for part in value)
        case dict() if not any(isinstance(part, list | dict) for part in value.values()):
            return ",".join(f"{name}={_text(option, part)}" for name, part in value.items())
        case None:
            raise SettingsError(f"{option}: no value is given; leave it out, or name one")
    raise SettingsError(f"{option}: a value should be a text, a number, true or false, or a list of these")
