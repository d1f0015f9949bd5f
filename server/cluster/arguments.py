"""The arguments of our application in a configuration file of Ray Serve: options of ours."""

from collections.abc import Mapping
from typing import Any

from tightrope.server.settings.settings import ServerSettings, load_settings


def settings_of(arguments: Mapping[str, Any]) -> ServerSettings:
    """Options by their names, as `build` has them. Raises SettingsError."""
    return load_settings({name: _text(value) for name, value in arguments.items()})


def _text(value: object) -> str:
    """A value as the command line would have it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)
