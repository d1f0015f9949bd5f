"""A list of models with settings for each: a table for each name, in TOML or JSON."""

import json
import os
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tightrope.server.settings.misspelt import no_such
from tightrope.server.settings.options import OPTIONS
from tightrope.server.settings.settings import ServerSettings, SettingsError, overlaid

MAX_BYTES = 4 << 20
_OWN = frozenset({"chat_template", "chat_template_args"})  # What a model may have beside what its engine is told.


def read_list(path: Path, general: ServerSettings, is_name: Callable[[str], bool]) -> dict[str, ServerSettings]:
    """Settings by name, in the order of the list: `general` with what the model's table says. Raises SettingsError."""
    tables = _tables(path)
    found: dict[str, ServerSettings] = {}
    owners: dict[str, str] = {}  # Which model has an adapter of this name.
    for name, table in tables.items():
        if not is_name(name):
            raise SettingsError(f"{path}: {name!r:.200} can't name a model: up to 200 printable characters can")
        if not isinstance(table, dict):
            raise SettingsError(f"{path}: {name}: should be a table of options, such as model = PATH")
        found[name] = settings = _of_table(path, name, table, general)
        for adapter in settings.engine.model.adapters:
            if adapter in tables or adapter in owners:
                raise SettingsError(f"{path}: {name}: lora: {adapter!r} is the name of another model or adapter")
            owners[adapter] = name
    return found


def _of_table(path: Path, name: str, table: dict[str, Any], general: ServerSettings) -> ServerSettings:
    values = {option.replace("_", "-"): value for option, value in table.items()}
    for option in values:
        if option not in OPTIONS:
            raise SettingsError(f"{path}: {name}: {option}: {no_such(option)}")
        if OPTIONS[option].path[0] != "engine" and OPTIONS[option].path[0] not in _OWN:
            raise SettingsError(f"{path}: {name}: {option}: this is a setting of the server, and not of one model")
    for option, value in {"model": name, **values}.items():
        if option in ("model", "chat-template") and isinstance(value, str):
            values[option] = _from(path.parent, value)
    settings = overlaid(general, values, lambda option: f"{path}: {name}: {option}")
    engine, model = settings.engine, settings.engine.model
    adapters = {adapter: _from(path.parent, place) for adapter, place in model.adapters.items()}
    model = model.model_copy(update={"adapters": adapters})
    return settings.model_copy(update={"engine": engine.model_copy(update={"model": model})})


def _from(folder: Path, place: str) -> str:
    """What is meant from a folder, where there is such a thing; else what it was, which may be no path at all."""
    beside = folder / os.path.expanduser(place)  # It is what it was if it is absolute.
    return str(beside) if os.path.exists(beside) else place


def _tables(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise SettingsError(f"--models: {path} has more than {MAX_BYTES} bytes; it should be a list of models")
        text = raw.decode("utf-8")
    except OSError as error:
        raise SettingsError(f"--models: {path} can't be read: {error.strerror}") from None
    except ValueError:  # It has a NUL in its name, or is no UTF-8.
        raise SettingsError(f"--models: {str(path)!r:.200} is not UTF-8 text; it should be a list of models") from None
    is_json = path.suffix.lower() == ".json"
    try:
        tables = json.loads(text, object_pairs_hook=_once) if is_json else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: not {'JSON' if is_json else 'TOML'}: {error}") from None
    if not isinstance(tables, dict):
        raise SettingsError(f"{path}: should be an object with one of options for each model's name")
    return tables


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that is there twice."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{name!r:.200} is there twice")
        made[name] = value
    return made
