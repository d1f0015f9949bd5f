"""Adapters beside a model's weights: each changes what the rows that use it compute, and nobody else's."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightrope.backends.adapters import AdapterRoom, fingerprint
from tightrope.backends.errors import BackendError
from tightrope.backends.files.peft import USED, PeftAdapter, adapter_bytes, check_float, read_adapter
from tightrope.backends.files.safetensors import TensorEntry
from tightrope.backends.files.tensor_names import spellings
from tightrope.backends.hf.adapters.file_tables import PlannedTables, Tables, low_rank_dtype, planned_tables
from tightrope.backends.hf.modules.experts import Experts
from tightrope.backends.hf.modules.kept_norms import KeptNorm, is_kept_norm
from tightrope.backends.hf.modules.linear import Linear
from tightrope.backends.hf.modules.norm import RMSNorm
from tightrope.backends.hf.modules.step import CurrentStep
from tightrope.backends.protocol import Chunk, Tokenizer
from tightrope.backends.tensor_parallel import Spans, size_of
from tightrope.kernels.forms.low_rank import NONE, AdapterRows, LowRank, LowRankSlots, balanced, make_low_rank


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module of the files lies in ours: from output `first` on of what `adapters` belongs to.

    It has so many outputs, of which this rank computes `own`, one span after the other. Which experts run, and so which
    of their additions, is known on the host alone.
    """

    adapters: LowRankSlots
    first: int
    outputs: int
    inputs: int
    current: CurrentStep
    own: Spans
    is_expert: bool = False


_Pieces = list[tuple[_Place, TensorEntry, TensorEntry, float]]


@dataclass(frozen=True, slots=True)
class _Checked:
    """An adapter that fits the model: what changes each of its linears, and the norms that it replaces."""

    adapter: PeftAdapter
    tables: PlannedTables
    deltas: list[tuple[_Place, _Pieces]]
    norms: list[tuple[RMSNorm | KeptNorm, dict[str, TensorEntry]]]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An adapter in place: its slot, the tokens that it knows, and their tokenizer where it isn't the model's.

    is_low_rank: it adds to linears and changes nothing else, so that its slot is all that a step needs to know.
    """

    fingerprint: str
    slot: int
    is_low_rank: bool
    num_tokens: int
    tokenizer: Tokenizer | None


class Adapters:
    """The adapters of one loaded model, each in a slot of its own; an AdapterStore. `room` bounds them all together.

    `read` reads an adapter's headers. `announce` is given a line for what a person should know of an adapter that is
    loaded. `tokenizer_at` makes the tokenizer of an adapter's folder, for so many tokens; None where the folder has
    none of its own.
    """

    def __init__(self, tree: nn.Module, current_of: Callable[[str], CurrentStep], tables: Tables) -> None:
        """current_of: the step as the module of a name has it, and where that is."""
        self._tables = tables
        self._places = dict(_places(tree))
        self._norms = dict(_norms(tree, tables.width, current_of))
        self._loaded: dict[str, _Loaded] = {}
        self._launches = 0  # So many times kernels of adapters have changed; see AdapterRows.
        self.room = AdapterRoom(0)
        self.read: Callable[[Path], PeftAdapter] = read_adapter
        self.announce: Callable[[str], None] = lambda line: None
        self.tokenizer_at: Callable[[Path, int], Tokenizer | None] = lambda folder, num_tokens: None

    def check(self, path: Path) -> _Checked:
        """An adapter's files as far as headers tell. Raises BackendError, which names file and tensor."""
        adapter = self.read(path)
        tables = planned_tables(adapter, self._tables)
        deltas = self._deltas(adapter, tables.num_scored)
        return _Checked(adapter, tables, deltas, self._own_norms(adapter, tables.names))

    def prepare(self, name: str, path: Path) -> Callable[[], None]:
        """See AdapterStore. Errors name file and tensor."""
        checked, mark = self.check(path), fingerprint(path)
        adapter, tables, deltas, norms = checked.adapter, checked.tables, checked.deltas, checked.norms
        with self.room.taken(name, adapter_bytes(adapter)):
            read = self._reader(adapter)
            built = [(place.adapters, _build(pieces, read), place.current) for place, pieces in deltas]
            tied, head = tables.tied_delta, self._tables.head
            if tied is not None and head is not None:
                parts = [(0, *balanced(read(tied.up).float().T, read(tied.down).float().T, tied.scaling), tied.scaling)]
                built.append((head.adapters, make_low_rank(parts, low_rank_dtype(head.current)), head.current))
            changes = [(module, change.to(module.current.device)) for module, change in tables.build(read)]
            replaced = [(norm, {part: read(entry) for part, entry in own.items()}) for norm, own in norms]
            self.room.settle(
                name,
                sum(low_rank.num_bytes for _, low_rank, _ in built)
                + sum(change.num_bytes for _, change in changes)
                + sum(tensor.nbytes for _, own in replaced for tensor in own.values()),
            )
            own_tokenizer = self.tokenizer_at(path, tables.num_tokens) if tables.has_own_tokens else None
        for note in (*adapter.notes, *tables.notes):
            self.announce(note)

        def put_in_place() -> None:
            taken = {loaded.slot for loaded in self._loaded.values()}
            slot = next(number for number in count() if number not in taken)
            for module, change in changes:
                module.changes[slot] = change
            for norm, own in replaced:
                if isinstance(norm, KeptNorm):
                    norm.replaced[slot] = norm.with_weights(own)
                else:
                    norm.replaced[slot] = (own["weight"].float() + norm.offset).to(norm.current.device)
            are_launched_anew = [adapters.put(slot, added.to(current.device)) for adapters, added, current in built]
            self._launches += any(are_launched_anew)
            is_low_rank = not changes and not replaced and not any(place.is_expert for place, _ in deltas)
            self._loaded[name] = _Loaded(mark, slot, is_low_rank, tables.num_tokens, own_tokenizer)

        return put_in_place

    def remove(self, name: str) -> None:
        """See AdapterStore."""
        loaded = self._loaded.pop(name, None)
        if loaded is not None:
            for place in self._places.values():
                place.adapters.drop(loaded.slot)
            for norm in self._norms.values():
                norm.replaced.pop(loaded.slot, None)
            for module in (self._tables.embedding, self._tables.head):
                if module is not None:
                    module.changes.pop(loaded.slot, None)
        self.room.give_back(name)

    def tokenizer(self, name: str) -> Tokenizer | None:
        """See AdapterStore."""
        loaded = self._loaded.get(name)
        return None if loaded is None else loaded.tokenizer

    def fingerprint(self, name: str) -> str:
        """See AdapterStore."""
        return self._loaded[name].fingerprint

    def num_tokens(self, name: str | None) -> int:
        """How many tokens a chunk with this adapter may be made of."""
        return self._tables.num_tokens if name is None else self._loaded[name].num_tokens

    def rows(self, chunks: Sequence[Chunk]) -> AdapterRows | None:
        """Which adapter each row of a step uses, on the CPU; None when none uses any."""
        if all(chunk.adapter is None for chunk in chunks):
            return None
        used = [None if chunk.adapter is None else self._loaded[chunk.adapter] for chunk in chunks]
        slots = [NONE if loaded is None else loaded.slot for loaded in used]
        are_low_rank = all(loaded is None or loaded.is_low_rank for loaded in used)
        counts = [len(chunk.token_ids) for chunk in chunks]
        scales = [chunk.adapter_scale for chunk in chunks]
        return AdapterRows(
            torch.from_numpy(np.repeat(np.array(slots, np.int32), counts)),
            torch.from_numpy(np.repeat(np.array(scales, np.float32), counts)),
            tuple(sorted({slot for slot in slots if slot != NONE})),
            self._launches if are_low_rank else None,
        )

    def ruled_out(self, logits: Tensor, rows: AdapterRows) -> Tensor:
        """Logits [n, V] with -inf for the tokens that a row's adapter, or the model alone, doesn't have.

        V becomes the largest number of tokens among them.
        """
        head = self._tables.head
        changes = {} if head is None else head.changes
        known = {loaded.slot: loaded.num_tokens for loaded in self._loaded.values() if loaded.slot in rows.present}
        theirs = self._tables.num_tokens
        if all(n == theirs for n in known.values()) and not changes.keys() & known.keys():
            return logits
        logits = F.pad(logits, (0, max(theirs, *known.values(), logits.shape[1]) - logits.shape[1]))
        for slot, num_tokens in {NONE: theirs, **known}.items():
            scored = changes[slot].num_rows if slot in changes else theirs
            mine = (rows.slots == slot).nonzero()[:, 0]
            logits[mine, min(num_tokens, scored) :] = -torch.inf
        return logits

    def _deltas(self, adapter: PeftAdapter, num_scored: int) -> list[tuple[_Place, _Pieces]]:
        """What each of our linears gets, by headers; a head has `num_scored` outputs with this adapter."""
        found: dict[int, tuple[_Place, _Pieces]] = {}
        head = self._tables.head
        for module, delta in adapter.deltas.items():
            place = next((self._places[name] for name in spellings(module) if name in self._places), None)
            if place is None:
                raise BackendError(
                    f"{delta.down.file}: {module!r} is no linear of this model that can be adapted: an adapter for "
                    "another base"
                )
            is_head = head is not None and place.adapters is head.adapters
            outputs = num_scored if is_head else place.outputs
            for entry, side, wanted in ((delta.down, 1, place.inputs), (delta.up, 0, outputs)):
                check_float(entry)
                if entry.shape[side] != wanted:
                    raise BackendError(
                        f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}, the model's linear has "
                        f"{wanted} {'inputs' if side else 'outputs'}: an adapter for another base"
                    )
            pieces = found.setdefault(id(place.adapters), (place, []))[1]
            if any(other.first == place.first for other, *_ in pieces):
                raise BackendError(f"{delta.down.file}: {module!r} is there twice, by two names")
            pieces.append((place, delta.down, delta.up, delta.scaling))
        return list(found.values())

    def _own_norms(
        self, adapter: PeftAdapter, tables: frozenset[str]
    ) -> list[tuple[RMSNorm | KeptNorm, dict[str, TensorEntry]]]:
        """The norms that get weights of the adapter's own, by headers; `tables` are modules that are none."""
        found: dict[str, tuple[RMSNorm | KeptNorm, dict[str, TensorEntry]]] = {}
        for (module, part), entry in adapter.own.items():
            if module in tables:
                continue
            name = next((name for name in spellings(module) if name in self._norms), None)
            if name is None:
                raise BackendError(f"{entry.file}: tensor {entry.name!r} can't be used with this model; {USED} can")
            norm = self._norms[name]
            wanted = {"weight": norm.size} if isinstance(norm, RMSNorm) else norm.sizes
            check_float(entry)
            if part not in wanted or entry.shape != (wanted[part],):
                raise BackendError(
                    f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}, the model's norm has "
                    f"{dict(wanted)}: an adapter for another base"
                )
            found.setdefault(name, (norm, {}))[1][part] = entry
        return list(found.values())

    def _reader(self, adapter: PeftAdapter) -> Callable[[TensorEntry], Tensor]:
        def read(entry: TensorEntry) -> Tensor:
            tensor = adapter.checkpoint.read(entry.name)
            adapter.checkpoint.check_finite(entry.name, tensor)
            return tensor

        return read


def _build(pieces: _Pieces, read: Callable[[TensorEntry], Tensor]) -> LowRank:
    parts = []
    for place, down, up, scaling in pieces:
        a, b = balanced(read(down).float(), read(up).float(), scaling)
        own = torch.cat([b[begin:end] for begin, end in place.own]) if size_of(place.own) < place.outputs else b
        parts.append((place.first, a, own, scaling))
    return make_low_rank(parts, low_rank_dtype(pieces[0][0].current))


def _places(tree: nn.Module) -> Iterator[tuple[str, _Place]]:
    for module in tree.modules():
        if isinstance(module, Linear):
            first = 0
            for name, outputs, own in module.parts:
                yield name, _Place(module.adapters, first, outputs, module.num_inputs, module.current, own)
                first += size_of(own)
        elif isinstance(module, Experts):
            for name, adapters, first, (outputs, inputs), span in module.places():
                yield name, _Place(adapters, first, outputs, inputs, module.current, (span,), is_expert=True)


def _norms(
    tree: nn.Module, hidden_size: int, current_of: Callable[[str], CurrentStep]
) -> Iterator[tuple[str, RMSNorm | KeptNorm]]:
    for name, module in tree.named_modules():
        if isinstance(module, RMSNorm):
            if module.runs_by_row:
                yield module.name, module
        elif is_kept_norm(module, hidden_size):
            yield name, KeptNorm(name, module, current_of(name))
