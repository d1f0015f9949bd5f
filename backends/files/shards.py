"""Which files of a model folder hold its weights: by their names, and by the index beside them where it is right."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tightrope.backends.errors import BackendError
from tightrope.backends.files.foreign import CONSOLIDATED, no_weights
from tightrope.backends.files.json import read_object

MAX_INDEX = 200_000_000  # It is in bytes.
INDEX = "model.safetensors.index.json"

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class Shards:
    """The files to read, in order, and what an index says: the file of each tensor by its name."""

    paths: Sequence[Path]
    index: Path | None = None
    weight_map: Mapping[str, str] = field(default_factory=dict)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that may be a model's, links that lead nowhere among them: adapters are none.

    Nor is Mistral's own layout, where it stands beside the model's files, as it holds the same weights once more.
    """
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    return [path for path in found if not path.name.startswith(CONSOLIDATED)] or found


def find_shards(folder: Path) -> Shards:
    """The files that hold the weights of `folder`.

    A file that the index names and that isn't there is left out: whether anything in it is needed is for the model to
    say. Raises BackendError when there is nothing to read, and when the index can't be right.
    """
    found = weight_files(folder)
    if not found or all(path.name.startswith(CONSOLIDATED) for path in found):
        names = [path.name for path in folder.iterdir()]
        raise no_weights(folder, names) or BackendError(f"{folder}: holds no .safetensors file")
    single = folder / "model.safetensors"
    if single in found:
        return Shards([single])
    index = _index(folder)
    if index is None:
        _check_parts(folder, found)
        return Shards(found)
    weight_map = _read_index(index)
    named = {folder / name for name in weight_map.values()}
    if not named & set(found):  # A quantizer may have copied the index of the model that it read.
        _check_parts(folder, found)
        return Shards(found)
    if not named <= set(found):  # What is missing may be in files that the index doesn't know.
        return Shards(found, index, weight_map)
    sets = {_set_of(path) for path in named} - {None}
    return Shards([path for path in found if path in named or _set_of(path) in sets], index, weight_map)


def _index(folder: Path) -> Path | None:
    found = sorted(folder.glob("*.safetensors.index.json"))
    if folder / INDEX in found:
        return folder / INDEX
    others = [path for path in found if not path.name.startswith(CONSOLIDATED)]
    if len(others) > 1:
        names = ", ".join(path.name for path in others)
        raise BackendError(f"{folder}: holds {len(others)} index files ({names}); keep one")
    return others[0] if others else None


def _read_index(path: Path) -> Mapping[str, str]:
    weight_map = read_object(path, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BackendError(f"{path}: weight_map is missing or empty; it must map tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise BackendError(
                f"{path}: weight_map of {name!r} is {file!r:.100}; it must be a .safetensors file's name"
            )
        if re.search(r"[/\\:\0]", file):
            raise BackendError(
                f"{path}: weight_map of {name!r} is {file!r:.100}, outside the folder; a plain name is right"
            )
    return weight_map


def _set_of(path: Path) -> tuple[str, str] | None:
    """What the parts of one model have in common in their names."""
    match = _PART.fullmatch(path.name)
    return None if match is None else (match["stem"], match["count"])


def _check_parts(folder: Path, found: Sequence[Path]) -> None:
    """Files named like part 1 of 3 must be all there, when no index says what is in them."""
    names = {path.name for path in found}
    for match in filter(None, map(_PART.fullmatch, sorted(names))):
        for number in range(1, min(int(match["count"]), 10_000) + 1):
            part = f"{match['stem']}-{number:05d}-of-{match['count']}.safetensors"
            if part not in names:
                raise BackendError(f"{folder}: shard {part} is missing; download or copy the model again")
