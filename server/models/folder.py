"""The models in a folder: its .gguf files and its folders, of a split model the first part."""

import os
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from tightrope.backends.files.foreign import CONSOLIDATED, model_files
from tightrope.server.settings.settings import SettingsError

MAX_ENTRIES = 1 << 14  # Each model is a line in every list of models.
_PART = re.compile(r"-\d{5}-of-\d{5}$")


def models_in(folder: Path, is_name: Callable[[str], bool], note: Callable[[str], None]) -> dict[str, Path]:
    """Paths of models by the names that requests use, sorted; nothing in them is read.

    A file is called as it is without `.gguf`, unless a folder is called so; of several GGUF files in a folder each is
    a model, FOLDER/FILE. What is hidden, or is no model by its name, is passed over; `note` is told of names that
    can't be, and of links that lead out of the folder. Raises SettingsError.
    """
    root = folder.resolve()
    try:
        names = _names(folder)
    except SettingsError as error:
        raise SettingsError(f"--models: {error}") from None
    folders = {name for name in names if os.path.isdir(folder / name)}
    files = {name for name in model_files(names) if os.path.isfile(folder / name)}
    found: dict[str, Path] = {}
    for name in sorted(folders | files):
        path = folder / name
        if not path.resolve().is_relative_to(root):
            note(f"models: {name!r:.200} is left out: it is a link out of the folder; a list may name what it leads to")
            continue
        if name in folders:
            try:
                models = _in_subfolder(path)
            except SettingsError as error:
                note(f"models: {name!r:.200} is left out: {error}")
                continue
        else:
            short = _stem(name)
            models = {name if short in folders or short in found else short: path}
        for model, place in models.items():
            if is_name(model):
                found[model] = place
            else:
                note(f"models: {model!r:.200} is left out: requests can't use the name; rename it")
    return dict(sorted(found.items()))


def _in_subfolder(folder: Path) -> dict[str, Path]:
    """The models of a folder inside: itself, or each of its GGUF files where it has several of them and no others."""
    names = _names(folder)
    weights = [name for name in names if name.endswith(".safetensors")]
    if any(not name.startswith(("adapter_", CONSOLIDATED)) for name in weights):
        return {folder.name: folder}
    files = [name for name in model_files(names) if os.path.isfile(folder / name)]
    if len(files) == 1:
        return {folder.name: folder}
    return {f"{folder.name}/{_stem(name)}": folder / name for name in files}


def _names(folder: Path) -> list[str]:
    """What is not hidden there. Raises SettingsError for a folder that can't be read, or has too many."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in islice(entries, MAX_ENTRIES + 1) if not entry.name.startswith(".")]
    except OSError as error:
        raise SettingsError(f"{folder} can't be read: {error.strerror}") from None
    if len(names) > MAX_ENTRIES:
        raise SettingsError(f"{folder} has more than {MAX_ENTRIES} entries; name a list of models instead")
    return names


def _stem(name: str) -> str:
    return _PART.sub("", name[: -len(".gguf")])
