"""Which models there are: those of a folder, or of a list with settings for each."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tightrope.server.models.folder import models_in
from tightrope.server.models.list_file import read_list
from tightrope.server.settings.settings import ServerSettings, SettingsError

MAX_NAME = 200  # A name is shown in lists, logs and errors; no file system has longer ones.
SHOWN_NOTES = 5


@dataclass(frozen=True, slots=True)
class Catalog:
    """settings: of each model by its name, all of the server's with its own; the first is meant where none is named.

    notes: lines on what was left out.
    """

    settings: Mapping[str, ServerSettings]
    notes: Sequence[str]


def read_catalog(settings: ServerSettings) -> Catalog:
    """What `--models` names. Raises SettingsError in one line."""
    assert settings.models is not None
    _check_general(settings)
    place = Path(os.path.expanduser(settings.models))
    general = settings.model_copy(update={"engine": _with_model(settings, None)})
    notes: list[str] = []
    if os.path.isdir(place):  # It says no to what can't be a path, too.
        found = {name: _of_path(general, path) for name, path in models_in(place, _is_name, notes.append).items()}
    else:
        found = read_list(place, general, _is_name)
    if not found:
        raise SettingsError(f"--models: {place} holds no model: neither a .gguf file nor a folder of a model")
    if (first := settings.engine.model.model) is not None:
        if first not in found:
            raise SettingsError(f"MODEL: beside --models it is the name of one of them, not {first!r:.200}")
        found = {first: found[first], **found}
    more = len(notes) - SHOWN_NOTES
    return Catalog(found, [*notes[:SHOWN_NOTES], *([f"models: {more} more are left out"] if more > 0 else [])])


def _check_general(settings: ServerSettings) -> None:
    """Raises SettingsError for what can be said of one model alone."""
    if settings.served_model_name is not None:
        raise SettingsError(
            "--served-model-name: models of --models are called as their files, or as their list has it"
        )
    if settings.engine.model.adapters:
        raise SettingsError("--lora: an adapter belongs to its model; write it into the model's table of a list")


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME and name.isprintable() and name == name.strip()


def _of_path(general: ServerSettings, path: Path) -> ServerSettings:
    return general.model_copy(update={"engine": _with_model(general, str(path))})


def _with_model(settings: ServerSettings, model: str | None) -> object:
    engine = settings.engine
    return engine.model_copy(update={"model": engine.model.model_copy(update={"model": model})})
