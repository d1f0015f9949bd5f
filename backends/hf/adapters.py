"""Adapters beside a model's weights: each adds to linears of the rows that use it, and to nobody else's."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tightrope.backends.adapters import AdapterRoom
from tightrope.backends.errors import BackendError
from tightrope.backends.hf.checkpoint import TensorEntry
from tightrope.backends.hf.names import NESTED, NESTED_BEFORE, RENAMES
from tightrope.backends.hf.organs import Embedding, Experts, Linear
from tightrope.backends.hf.peft import PeftAdapter, adapter_bytes, read_adapter
from tightrope.backends.protocol import Chunk
from tightrope.kernels.low_rank import NONE, AdapterRows, LowRank, balanced, make_low_rank

_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module of the files lies in ours: outputs first .. first + outputs of what `adapters` belongs to."""

    adapters: dict[int, LowRank]
    first: int
    outputs: int
    inputs: int


class Adapters:
    """The adapters of one loaded model, each in a slot of its own; an AdapterStore. `room` bounds them all together."""

    def __init__(self, tree: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """dtype: of the low-rank matrices; sixteen bits halve what each step reads."""
        self._device, self._dtype = device, dtype
        self._places = dict(_places(tree))
        self._whole: dict[str, Embedding | Linear] = {}
        for organ in tree.modules():
            if isinstance(organ, Embedding):
                self._whole[organ.name] = organ
            elif isinstance(organ, Linear) and organ.is_head:
                self._whole[organ.rows[0][0]] = organ
        self._slots: dict[str, int] = {}
        self._numbers = count()
        self.room = AdapterRoom(0)

    def prepare(self, name: str, path: Path) -> Callable[[], None]:
        """See AdapterStore. Errors name file and tensor."""
        adapter = read_adapter(path)
        deltas = self._deltas(adapter)
        saved = {self._whole_at(adapter, module): entry for module, entry in adapter.saved.items()}
        for organ, entry in saved.items():
            if entry.shape != organ.shape:
                raise BackendError(
                    f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}, the model's is "
                    f"{list(organ.shape)}: an adapter for another base"
                )
        with self.room.taken(name, adapter_bytes(adapter)):
            read = self._reader(adapter)
            built = [(adapters, self._build(pieces, read)) for adapters, pieces in deltas]
            whole = [(organ, read(entry).clone()) for organ, entry in saved.items()]

        def put_in_place() -> None:
            slot = next(self._numbers)
            for organ, tensor in whole:
                organ.replaced[slot] = tensor.to(self._device)
            for adapters, low_rank in built:
                adapters[slot] = low_rank.to(self._device)
            self._slots[name] = slot

        return put_in_place

    def remove(self, name: str) -> None:
        """See AdapterStore."""
        slot = self._slots.pop(name, None)
        if slot is not None:
            for place in self._places.values():
                place.adapters.pop(slot, None)
            for organ in self._whole.values():
                organ.replaced.pop(slot, None)
        self.room.give_back(name)

    def rows(self, chunks: Sequence[Chunk]) -> AdapterRows | None:
        """Which adapter each row of a step uses; None when none uses any."""
        if all(chunk.adapter is None for chunk in chunks):
            return None
        slots = [NONE if chunk.adapter is None else self._slots[chunk.adapter] for chunk in chunks]
        counts = [len(chunk.token_ids) for chunk in chunks]
        scales = [chunk.adapter_scale for chunk in chunks]
        return AdapterRows(
            torch.from_numpy(np.repeat(np.array(slots, np.int32), counts)).to(self._device),
            torch.from_numpy(np.repeat(np.array(scales, np.float32), counts)).to(self._device),
            tuple(sorted({slot for slot in slots if slot != NONE})),
        )

    def _deltas(
        self, adapter: PeftAdapter
    ) -> list[tuple[dict[int, LowRank], list[tuple[int, TensorEntry, TensorEntry, float]]]]:
        """What each of our linears gets, by headers."""
        found: dict[int, tuple[dict[int, LowRank], list[tuple[int, TensorEntry, TensorEntry, float]]]] = {}
        for module, delta in adapter.deltas.items():
            place = next((self._places[name] for name in _spellings(module) if name in self._places), None)
            if place is None:
                raise BackendError(
                    f"{delta.down.file}: {module!r} is no linear of this model that can be adapted: an adapter for "
                    "another base"
                )
            for entry, side, wanted in ((delta.down, 1, place.inputs), (delta.up, 0, place.outputs)):
                if entry.dtype not in _FLOATS:
                    raise BackendError(f"{entry.file}: tensor {entry.name!r} is {entry.dtype}; {_FLOATS} can be used")
                if entry.shape[side] != wanted:
                    raise BackendError(
                        f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}, the model's linear has "
                        f"{wanted} {'inputs' if side else 'outputs'}: an adapter for another base"
                    )
            pieces = found.setdefault(id(place.adapters), (place.adapters, []))[1]
            pieces.append((place.first, delta.down, delta.up, delta.scaling))
        return list(found.values())

    def _whole_at(self, adapter: PeftAdapter, module: str) -> "Embedding | Linear":
        for name in _spellings(module):
            if name in self._whole:
                return self._whole[name]
        raise BackendError(f"{adapter.folder}: {module!r} is saved whole, which this model doesn't have")

    def _build(
        self, pieces: Sequence[tuple[int, TensorEntry, TensorEntry, float]], read: Callable[[TensorEntry], Tensor]
    ) -> LowRank:
        parts = []
        for first, down, up, scaling in pieces:
            a, b = balanced(read(down).float(), read(up).float(), scaling)
            parts.append((first, a, b, scaling))
        return make_low_rank(parts, self._dtype)

    def _reader(self, adapter: PeftAdapter) -> Callable[[TensorEntry], Tensor]:
        def read(entry: TensorEntry) -> Tensor:
            tensor = adapter.checkpoint.read(entry.name)
            adapter.checkpoint.check_finite(entry.name, tensor)
            return tensor

        return read


def _places(tree: nn.Module) -> Iterator[tuple[str, _Place]]:
    for organ in tree.modules():
        if isinstance(organ, Linear):
            first = 0
            for name, outputs in organ.rows:
                yield name, _Place(organ.adapters, first, outputs, organ.num_inputs)
                first += outputs
        elif isinstance(organ, Experts):
            for name, adapters, first, outputs, inputs in organ.places():
                yield name, _Place(adapters, first, outputs, inputs)


def _spellings(module: str) -> Iterator[str]:
    """What a module of an adapter may be called in transformers' tree of today."""
    for nest in (NESTED, NESTED_BEFORE, ""):
        if module.startswith(nest):
            plain = module.removeprefix(nest)
            for base in ("", "model."):
                for new, old in (("", ""), *RENAMES):
                    yield base + (plain.replace(old, new) if old else plain)
