"""From the files straight to their place: shard by shard, each tensor's values checked and copied once.

Everything that headers can tell has been checked before (matching.py). At most the model and one mapped shard
are in memory.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.files.tensor_names import FileNames
from tightrope.backends.hf.load.arena import Arena
from tightrope.backends.hf.load.assembly import Assembly, Hold
from tightrope.backends.hf.load.matching import DTYPES, choose
from tightrope.backends.hf.load.weights import Part, Weight

Progress = Callable[[float], None]  # It is told the share loaded, 0 to 1.


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of the file goes."""

    target: Tensor
    part: Part


def load_weights(
    weights: Iterable[Weight], assemblies: Sequence[Assembly], checkpoint: Checkpoint, names: FileNames,
    device: torch.device, progress: Progress, arena: Arena | None = None,
) -> None:  # fmt: skip
    """Fill `weights`, and build `assemblies`, from the checkpoint. arena: for what is large, on the device.

    Raises BackendError naming the tensor that is not finite, or can't be what its format says.
    """
    chosen = [(weight, choose(weight, checkpoint, names)) for weight in weights]
    places: dict[str, list[_Place]] = {}
    shifted: list[tuple[Tensor, float]] = []
    for weight, parts in chosen:
        target = _target(weight, dtype_of(weight, parts, checkpoint), device, arena)
        weight.deliver(target)
        if weight.offset:
            shifted.append((target, weight.offset))
        for part in parts:
            places.setdefault(part.name, []).append(_Place(target, part))
    hold: Hold = (lambda matrix: matrix) if arena is None else arena.holding
    _copy(places, _due(assemblies, checkpoint, hold), checkpoint, progress)
    for target, offset in shifted:
        target.add_(offset)


def _target(weight: Weight, dtype: torch.dtype, device: torch.device, arena: Arena | None) -> Tensor:
    """The tensor to be filled."""
    if weight.stays_on_host:  # Nothing is kept of a model on the meta device.
        return torch.empty(weight.shape, dtype=dtype, device=device if device.type == "meta" else "cpu")
    return torch.empty(weight.shape, dtype=dtype, device=device) if arena is None else arena.empty(weight.shape, dtype)


def tie(weights: Sequence[Weight], head: str, table: str, names: FileNames) -> list[Weight]:
    """The weights with head and embedding as one tensor where the files hold one of the two."""
    return list(weights) if names.find([head, table]) else _merged(weights, head, table, with_both=False)


def share(
    weights: Sequence[Weight], head: str, table: str, checkpoint: Checkpoint, names: FileNames
) -> tuple[list[Weight], str | None]:
    """The same where they hold both: one tensor if the two are equal, else both, with a note. Reads them."""
    found = names.find([table, head])
    if found is None:
        return list(weights), None
    first, second = map(checkpoint.read, found)
    if first.dtype != second.dtype or not torch.equal(first, second):
        return list(weights), f"{head} differs from {table}, though config.json ties them: each is used as it is"
    return _merged(weights, head, table, with_both=True), None


def _merged(weights: Sequence[Weight], head: str, table: str, *, with_both: bool) -> list[Weight]:
    first, second = (next(w for w in weights if w.sources[0][0].name == name) for name in (table, head))

    def deliver(tensor: Tensor) -> None:
        first.deliver(tensor)
        second.deliver(tensor)

    # The same bytes twice, or the one tensor that there is.
    sources = ((*first.sources[0], *second.sources[0]),) if with_both else (*first.sources, *second.sources)
    shared = replace(first, deliver=deliver, sources=sources)
    return [shared if weight is first else weight for weight in weights if weight is not second]


def _due(assemblies: Sequence[Assembly], checkpoint: Checkpoint, hold: Hold) -> dict[str, list[Callable[[], None]]]:
    """What is to be built after each tensor: the linears of which it is the last."""
    order = {name: i for i, name in enumerate(name for shard in checkpoint.shards() for name in shard.names)}
    due: dict[str, list[Callable[[], None]]] = {}
    for assembly in assemblies:
        for i, source in enumerate(assembly.sources):
            due.setdefault(max(source.tensors, key=order.__getitem__), []).append(partial(assembly.build, i, hold))
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
                _fill(places[name], name, checkpoint)
            for build in due.get(name, ()):
                build()
            done += checkpoint.tensors[name].num_bytes
            progress(done / checkpoint.weight_bytes)
        for mapped in checkpoint.shards():  # A linear may have begun in another.
            checkpoint.release(mapped)


def _fill(places: Sequence[_Place], name: str, checkpoint: Checkpoint) -> None:
    if all(place.target.is_meta for place in places):
        return  # There is nothing to keep, so nothing is read.
    tensor = checkpoint.read(name)
    checkpoint.check_finite(name, tensor)
    for place in places:
        place.target[place.part.at].copy_(tensor)


def dtype_of(weight: Weight, parts: Iterable[Part], checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of one of the model's tensors that is filled from `parts`."""
    if weight.dtype is not None:
        return weight.dtype
    found = {DTYPES[checkpoint.tensors[part.name].dtype] for part in parts}
    return found.pop() if len(found) == 1 else torch.float32
