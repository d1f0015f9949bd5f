"""From the files straight to their place: shard by shard, each tensor checked and copied once.

Everything that headers can tell is checked before anything is allocated: no tensor missing, none unused, every shape as
the model has it. At most the model and one mapped shard are in memory.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tightrope.backends.errors import BackendError
from tightrope.backends.hf.assembly import Assembly
from tightrope.backends.hf.checkpoint import Checkpoint
from tightrope.backends.hf.names import FileNames
from tightrope.backends.hf.weights import Part, Weight

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

Progress = Callable[[float], None]  # of the share loaded, 0 to 1


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of the file goes."""

    target: Tensor
    part: Part


def load_weights(
    weights: Iterable[Weight], assemblies: Sequence[Assembly], checkpoint: Checkpoint, names: FileNames,
    device: torch.device, progress: Progress,
) -> None:  # fmt: skip
    """Fill `weights`, and build `assemblies`, from the checkpoint.

    Raises BackendError naming the tensor that is missing, unused, of another shape or dtype, or not finite.
    """
    chosen = [(weight, _choose(weight, checkpoint, names)) for weight in weights]
    sources = [source for assembly in assemblies for source in assembly.sources]
    used = {part.name for _, parts in chosen for part in parts} | {name for s in sources for name in s.tensors}
    _check_used(used, checkpoint, names)
    places: dict[str, list[_Place]] = {}
    shifted: list[tuple[Tensor, float]] = []
    for weight, parts in chosen:
        target = torch.empty(weight.shape, dtype=weight.dtype or _widest(parts, checkpoint), device=device)
        weight.deliver(target)
        if weight.offset:
            shifted.append((target, weight.offset))
        for part in parts:
            places.setdefault(part.name, []).append(_Place(target, part))
    _copy(places, _due(assemblies, checkpoint), checkpoint, progress)
    for target, offset in shifted:
        target.add_(offset)


def share(
    weights: Sequence[Weight], head: str, table: str, checkpoint: Checkpoint, names: FileNames
) -> tuple[list[Weight], str | None]:
    """The weights with the head's tensor being the embedding's, and a note if the files hold two that differ.

    A file that holds both, though equal, has the second one ignored.
    """
    first, second = (next(w for w in weights if w.sources[0][0].name == name) for name in (table, head))
    found = names.find([table, head])
    if found is not None and not torch.equal(*map(checkpoint.read, found)):
        return list(weights), f"{head} differs from {table}, though config.json ties them: each is used as it is"

    def deliver(tensor: Tensor) -> None:
        first.deliver(tensor)
        second.deliver(tensor)

    both = first.sources if found is None else ((*first.sources[0], *second.sources[0]),)  # the same bytes, twice
    shared = replace(first, deliver=deliver, sources=both)
    return [shared if weight is first else weight for weight in weights if weight is not second], None


def _due(assemblies: Sequence[Assembly], checkpoint: Checkpoint) -> dict[str, list[Callable[[], None]]]:
    """What is to be built after each tensor: the linears of which it is the last."""
    order = {name: i for i, name in enumerate(name for shard in checkpoint.shards() for name in shard.names)}
    due: dict[str, list[Callable[[], None]]] = {}
    for assembly in assemblies:
        for i, source in enumerate(assembly.sources):
            due.setdefault(max(source.tensors, key=order.__getitem__), []).append(partial(assembly.build, i))
    return due


def _copy(
    places: Mapping[str, Sequence[_Place]], due: Mapping[str, Sequence[Callable[[], None]]],
    checkpoint: Checkpoint, progress: Progress,
) -> None:  # fmt: skip
    """Each tensor of the files to its places, in the order of the files."""
    done = 0
    for shard in checkpoint.shards():
        for name in shard.names:
            if name in places:
                tensor = checkpoint.read(name)
                checkpoint.check_finite(name, tensor)
                for place in places[name]:
                    place.target[place.part.at].copy_(tensor)
            for build in due.get(name, ()):
                build()
            done += checkpoint.tensors[name].num_bytes
            progress(done / checkpoint.weight_bytes)
        for mapped in checkpoint.shards():  # a linear may have begun in another
            checkpoint.release(mapped)


def _choose(weight: Weight, checkpoint: Checkpoint, names: FileNames) -> tuple[Part, ...]:
    """The source that the files have, under the names that they use; its shapes are checked."""
    for source in weight.sources:
        found = names.find([part.name for part in source])
        if found is not None:
            parts = tuple(replace(part, name=name) for part, name in zip(source, found, strict=True))
            for part in parts:
                _check_part(part, checkpoint)
            return parts
    wanted = [names.of(part.name) for part in weight.sources[0]]
    missing = next(name for name in wanted if name not in checkpoint.tensors)
    raise BackendError(f"{checkpoint.folder}: tensor {missing!r} is missing; config.json describes a model that has it")


def _check_part(part: Part, checkpoint: Checkpoint) -> None:
    entry = checkpoint.tensors[part.name]
    if entry.shape != part.shape:
        raise BackendError(
            f"{entry.file}: tensor {part.name!r} has shape {list(entry.shape)}, by config.json it must be "
            f"{list(part.shape)}"
        )
    if entry.dtype not in DTYPES:
        raise BackendError(f"{entry.file}: tensor {part.name!r} is {entry.dtype}; {', '.join(DTYPES)} can be loaded")


def _check_used(used: set[str], checkpoint: Checkpoint, names: FileNames) -> None:
    unused = [name for name in checkpoint.tensors if name not in used and not names.may_be_left(name)]
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        entry = checkpoint.tensors[unused[0]]
        raise BackendError(
            f"{entry.file}: tensor {unused[0]!r}{more} has no place in the model that config.json describes"
        )


def _widest(parts: Iterable[Part], checkpoint: Checkpoint) -> torch.dtype:
    found = {DTYPES[checkpoint.tensors[part.name].dtype] for part in parts}
    return found.pop() if len(found) == 1 else torch.float32
