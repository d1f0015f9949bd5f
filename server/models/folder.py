"""The models in a folder: its .gguf files and its folders, of a split model the first part."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tightrope.backends.files.foreign import CONSOLIDATED, model_files
from tightrope.server.settings.settings import SettingsError

MAX_ENTRIES = 1 << 14  # Each model is a line in every list of models.
LEVELS = 2  # LM Studio keeps PUBLISHER/MODEL/FILE.
_PART = re.compile(r"-\d{5}-of-\d{5}$")


def models_in(folder: Path, is_name: Callable[[str], bool], note: Callable[[str], None]) -> dict[str, Path]:
    """Paths of models by the names that requests use, sorted; nothing in them is read.

    A file is called as it is without `.gguf`, unless a folder is called so; of several GGUF files in a folder each is
    a model, FOLDER/FILE, and what is in its folders is FOLDER/FOLDER. What is hidden, or is no model by its name, is
    passed over; `note` is told of names that can't be, and of links that lead out of the folder. Raises SettingsError.
    """
    search = _Search(folder.resolve(), note)
    try:
        found = search.below(folder, _names(folder), "", LEVELS)
    except SettingsError as error:
        raise SettingsError(f"--models: {error}") from None
    for name in found:
        if not is_name(name):
            note(f"models: {name!r:.200} is left out: requests can't use the name; rename it")
    return {name: found[name] for name in sorted(found) if is_name(name)}


@dataclass(slots=True)
class _Search:
    """root: no link may lead out of it."""

    root: Path
    note: Callable[[str], None]
    num_entries: int = 0

    def below(self, folder: Path, names: list[str], prefix: str, levels: int) -> dict[str, Path]:
        """The models among the entries `names` of a folder, each with `prefix` before its own name.

        levels: folders are looked into so many deep. Raises SettingsError for more entries than may be.
        """
        self.num_entries += len(names)
        if self.num_entries > MAX_ENTRIES:
            raise SettingsError(f"{self.root} has more than {MAX_ENTRIES} entries; name a list of models instead")
        folders = {name for name in names if levels and os.path.isdir(folder / name)}
        files = {name for name in model_files(names) if os.path.isfile(folder / name)}
        found: dict[str, Path] = {}
        for name in sorted(folders | files):
            path = folder / name
            if not self._is_inside(path, prefix + name):
                continue
            if name in folders:
                found |= self._in_folder(path, prefix + name, levels - 1)
            else:
                short = _stem(name)
                is_taken = short in folders or prefix + short in found
                found[prefix + (name if is_taken else short)] = path
        return found

    def _in_folder(self, folder: Path, name: str, levels: int) -> dict[str, Path]:
        """The models of a folder inside: itself, or else its GGUF files, and those of its folders."""
        try:
            names = _names(folder)
        except SettingsError as error:
            self.note(f"models: {name!r:.200} is left out: {error}")
            return {}
        weights = [entry for entry in names if entry.endswith(".safetensors")]
        if any(not entry.startswith(("adapter_", CONSOLIDATED)) for entry in weights):
            return {name: folder}
        files = [entry for entry in model_files(names) if os.path.isfile(folder / entry)]
        if len(files) != 1:
            return self.below(folder, names, f"{name}/", levels)
        own = {name: folder} if self._is_inside(folder / files[0], f"{name}/{files[0]}") else {}
        names.remove(files[0])
        return own | self.below(folder, names, f"{name}/", levels)

    def _is_inside(self, path: Path, name: str) -> bool:
        """Whether it lies below the root, and holds nothing of what it lies in."""
        place = path.resolve()
        if not place.is_relative_to(self.root):
            self.note(
                f"models: {name!r:.200} is left out: it is a link out of the folder; a list may name what it leads to"
            )
            return False
        return not path.parent.resolve().is_relative_to(place)


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
