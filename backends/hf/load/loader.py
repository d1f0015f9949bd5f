"""From the files straight to their place: each tensor's values are checked and copied once, in the order of the files.

Everything that headers can tell has been checked before (matching.py). In memory are the model, and of the files the
tensors of one linear for each thread.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from tightrope.backends.files.read_ahead import Range, reading_ahead
from tightrope.backends.files.safetensors import Checkpoint
from tightrope.backends.files.tensor_names import FileNames
from tightrope.backends.hf.load.arena import Arena
from tightrope.backends.hf.load.assembly import Assembly, Hold
from tightrope.backends.hf.load.matching import DTYPES, choose
from tightrope.backends.hf.load.weights import Part, Weight
from tightrope.kernels.packing import copy_finite

Progress = Callable[[float], None]  # It is told the share loaded, 0 to 1.


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of the file goes."""

    target: Tensor
    part: Part


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of the work, the tensors of the files that it needs, and what of them it reads."""

    tensors: tuple[str, ...]
    reads: tuple[Range, ...]
    make: Callable[[], None]


def load_weights(
    weights: Iterable[Weight], assemblies: Sequence[Assembly], checkpoint: Checkpoint, names: FileNames,
    device: torch.device, progress: Progress, arena: Arena | None = None, num_threads: int = 1,
) -> None:  # fmt: skip
    """Fill `weights`, and build `assemblies`, from the checkpoint. arena: for what is large, on the device.

    num_threads: so many linears are made at a time. A library's own threads share the work on a large tensor, but not
    what comes between two of them.

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
    _work(_in_order(places, assemblies, checkpoint, hold), checkpoint, progress, num_threads)
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


def apart(first: Sequence[Weight], last: Sequence[Weight], head: str, table: str) -> tuple[list[Weight], list[Weight]]:
    """The weights of two devices, with the embedding among the first and the head among the last: two tensors.

    The files may hold one of them alone.
    """
    ends = {weight.sources[0][0].name: weight for weight in (*first, *last)}
    both = [source for name in (head, table) for source in ends[name].sources]

    def with_either(weight: Weight) -> Weight:
        name = weight.sources[0][0].name
        return replace(weight, sources=(*weight.sources, *both)) if name in (head, table) else weight

    return [*map(with_either, first)], [*map(with_either, last)]


def share(
    weights: Sequence[Weight], head: str, table: str, checkpoint: Checkpoint, names: FileNames
) -> tuple[list[Weight], str | None]:
    """The same where they hold both: one tensor if the two are equal, else both, with a note. Reads them."""
    found = names.find([table, head])
    if found is None:
        return list(weights), None
    head_weight = next(w for w in weights if w.sources[0][0].name == head)
    own = head_weight.sources[0][0].span
    first, second = (checkpoint.read(name, own) for name in found)
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


def _in_order(
    places: Mapping[str, Sequence[_Place]], assemblies: Sequence[Assembly], checkpoint: Checkpoint, hold: Hold
) -> list[_Piece]:
    """What is to be done, as the largest tensors lie in the files: some writers put all scales behind all codes."""
    pieces = []
    for name, own in places.items():
        reads = chain.from_iterable(place.part.ranges(checkpoint) for place in own)
        pieces.append(_Piece((name,), tuple(reads), partial(_fill, own, name, checkpoint)))
    for assembly in assemblies:
        for i, source in enumerate(assembly.sources):
            pieces.append(_Piece(source.tensors, source.reads, partial(assembly.build, i, hold)))
    shards = {shard.path: i for i, shard in enumerate(checkpoint.shards())}

    def place(piece: _Piece) -> tuple[int, int]:
        file, begin, _ = max(piece.reads, key=lambda read: read[2] - read[1])
        return shards[file], begin

    return sorted(pieces, key=place)


def _work(pieces: Sequence[_Piece], checkpoint: Checkpoint, progress: Progress, num_threads: int) -> None:
    """Make the pieces, giving back what was read for each."""
    ranges = [read for piece in pieces for read in piece.reads]
    done, whole = 0, sum(end - begin for _, begin, end in ranges)
    with reading_ahead(ranges) as ahead, ThreadPoolExecutor(num_threads, "loading") as threads:
        # One alone is this thread, which knows the card.
        each_of = map if num_threads == 1 else threads.map
        for piece, _ in zip(pieces, each_of(lambda piece: piece.make(), pieces), strict=True):
            for tensor in map(checkpoint.tensors.__getitem__, piece.tensors):  # Pages of others' parts are mapped, too.
                checkpoint.release_part(tensor.file, tensor.begin, tensor.end)
            done += sum(end - begin for _, begin, end in piece.reads)
            ahead.reached(done)
            progress(done / whole)
    for shard in checkpoint.shards():
        checkpoint.release(shard)


def _fill(places: Sequence[_Place], name: str, checkpoint: Checkpoint) -> None:
    if all(place.target.is_meta for place in places):
        return  # There is nothing to keep, so nothing is read.
    for place in places:
        tensor = place.part.read(checkpoint)
        if not copy_finite(place.target[place.part.at], tensor):
            checkpoint.check_finite(name, tensor)  # It says what there is instead.


def dtype_of(weight: Weight, parts: Iterable[Part], checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of one of the model's tensors that is filled from `parts`."""
    if weight.dtype is not None:
        return weight.dtype
    found = {DTYPES[checkpoint.tensors[part.name].dtype] for part in parts}
    return found.pop() if len(found) == 1 else torch.float32
