"""Which tensors of the files fill which of the model's, by headers alone: what is missing or misshapen is refused.

What is left over is left out with a note, unless there is so much of it, or of such a kind, that the files must be of
another model, or in a format that isn't read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from tightrope.backends.errors import BackendError
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.files.tensor_names import FileNames
from tightrope.backends.hf.load.assembly import Assembly
from tightrope.backends.hf.load.weights import Part, Weight

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
MOST_LEFT = 0.02  # A larger share of the bytes is no oddity of an exporter but another model's weights.
MOST_NAMED = 3  # A line names at most so many tensors.


@dataclass(frozen=True, slots=True)
class LeftOver:
    """Tensors that the model doesn't use: all of them, and those that are worth a note."""

    names: frozenset[str]
    noted: tuple[str, ...]


def choose(weight: Weight, checkpoint: Checkpoint, names: FileNames) -> tuple[Part, ...]:
    """The source that the files have, under the names that they use.

    Raises BackendError, naming the tensor, when it is missing, or of another shape or dtype.
    """
    for source in weight.sources:
        found = names.find([part.name for part in source])
        if found is not None:
            parts = tuple(replace(part, name=name) for part, name in zip(source, found, strict=True))
            for part in parts:
                _check_part(part, checkpoint)
            return parts
    wanted = [names.of(part.name) for part in weight.sources[0]]
    missing = next((name for name in wanted if name not in checkpoint.tensors), wanted[0])
    other = next((name for name in checkpoint.tensors if name.endswith(f".{missing}")), None)
    called = "" if other is None else f"; the files hold {other!r}, perhaps the same inside of another module"
    raise checkpoint.missing(missing, f"which the model of config.json needs{called}")


def check_all(
    weights: Iterable[Weight], assemblies: Sequence[Assembly], checkpoint: Checkpoint, names: FileNames
) -> LeftOver:
    """Check all of a model's tensors, and return the others. Raises BackendError as `choose`, and for many others."""
    used = {part.name for weight in weights for part in choose(weight, checkpoint, names)}
    used |= {name for assembly in assemblies for source in assembly.sources for name in source.tensors}
    used |= {name for assembly in assemblies for name in assembly.others}
    unused = frozenset(checkpoint.tensors.keys() - used)
    noted = tuple(name for name in checkpoint.tensors if name in unused and not names.may_be_left(name))
    strange = [name for name in noted if not names.is_of_other_use(name)]
    num_bytes = sum(checkpoint.tensors[name].num_bytes for name in strange)
    if num_bytes > MOST_LEFT * checkpoint.weight_bytes:
        file = checkpoint.tensors[strange[0]].file
        raise BackendError(
            f"{file}: {_some(strange)} have no place in the model that config.json describes, and are "
            f"{num_bytes / checkpoint.weight_bytes:.0%} of all weights: the two must be of one model"
        )
    return LeftOver(unused, noted)


def notes_on(left: LeftOver, checkpoint: Checkpoint) -> list[str]:
    """A start-up line on tensors that are left out, and one on those that only the index knows."""
    notes = []
    if left.noted:
        notes.append(f"weights: {_some(left.noted)} left out, as the model doesn't use them")
    if checkpoint.absent and checkpoint.index is not None:
        notes.append(
            f"weights: {checkpoint.index.name} names {_some(list(checkpoint.absent))}, which no file holds and the "
            "model doesn't need"
        )
    return notes


def _some(names: Sequence[str]) -> str:
    """A few of them, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"


def _check_part(part: Part, checkpoint: Checkpoint) -> None:
    entry = checkpoint.tensors[part.name]
    if entry.shape != part.shape:
        raise BackendError(
            f"{entry.file}: tensor {part.name!r} has shape {list(entry.shape)}, by config.json it must be "
            f"{list(part.shape)}"
        )
    if entry.dtype not in DTYPES:
        raise BackendError(f"{entry.file}: tensor {part.name!r} is {entry.dtype}; {', '.join(DTYPES)} can be loaded")
