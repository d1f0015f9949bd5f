"""What an adapter's file says of the embedding and the head, as peft puts it in place over a base that may tie the two.

peft resizes nothing by itself: an adapter with more rows than its base was trained beside one that transformers'
resize_token_embeddings had made larger. Its tokens are known to those alone who use the adapter.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tightrope.backends.errors import BackendError
from tightrope.backends.files.peft import USED, Delta, PeftAdapter, TokenRows, check_float
from tightrope.backends.files.safetensors import TensorEntry
from tightrope.backends.files.tensor_names import spellings
from tightrope.backends.hf.modules.embedding import Embedding
from tightrope.backends.hf.modules.linear import Linear
from tightrope.backends.hf.modules.step import CurrentStep
from tightrope.backends.hf.modules.token_tables import TableChange, table_change
from tightrope.kernels.forms.low_rank import balanced

Read = Callable[[TensorEntry], Tensor]


@dataclass(frozen=True, slots=True)
class Tables:
    """A model's embedding and head, where they are ours, by name; `num_tokens` is its vocabulary's size.

    `read` gives a tensor of theirs as the files have it, without keeping it: a rank holds but some of its rows.
    """

    embedding: Embedding | None
    head: Linear | None
    names: tuple[str, str]
    is_tied: bool
    num_tokens: int
    width: int
    read: Callable[[str], Tensor]

    def whole(self, table: Embedding | Linear) -> Tensor | None:
        """All rows of a plain table; None where it is quantized."""
        weight = table.weight if isinstance(table.weight, Tensor) else None
        return self._whole(table, weight, "weight")

    def whole_bias(self, head: Linear) -> Tensor | None:
        """All of a head's bias; None where it has none."""
        return self._whole(head, head.bias, "bias")

    def _whole(self, table: Embedding | Linear, own: Tensor | None, kind: str) -> Tensor | None:
        return own if table.sizes is None or own is None else self.read(f"{self.names[table is self.head]}.{kind}")

    def find(self, module: str) -> Embedding | Linear | None:
        """The table that a file calls so."""
        for name in spellings(module):
            if name in self.names:
                return (self.embedding, self.head)[self.names.index(name)]
        return None


@dataclass(slots=True)
class _Said:
    """What the file says of one table."""

    own: TensorEntry | None = None
    bias: TensorEntry | None = None
    base: TensorEntry | None = None
    tokens: TokenRows | None = None
    delta: Delta | None = None

    @property
    def whole(self) -> TensorEntry | None:
        return self.own or self.base

    def num_rows(self, ours: int, width: int) -> int:
        """How many rows the table has, of which the model has `ours`. Raises BackendError."""
        rows = None if self.tokens is None else self.tokens.entry
        entries = [entry for entry in (self.whole, rows) if entry is not None]
        for entry in entries:
            if len(entry.shape) != 2 or entry.shape[1] != width:
                raise _other_base(entry, f"rows of {width} numbers")
        count = ours if self.whole is None else self.whole.shape[0]
        ids = () if self.tokens is None else self.tokens.token_ids
        end = max(count, max(ids, default=-1) + 1)
        if missing := set(range(count, end)).difference(ids):
            raise BackendError(f"{entries[-1].file}: tensor {entries[-1].name!r}: token {min(missing)} has no row")
        if self.bias is not None and self.bias.shape != (count,):
            raise _other_base(self.bias, f"{count} rows")
        return end


@dataclass(frozen=True, slots=True)
class PlannedTables:
    """What the two tables become, known from headers.

    names: modules of the file that are tables. num_tokens can be read and num_scored of them be drawn. tied_delta: of
    the embedding, and to be added to the head as well.
    """

    ours: Tables
    embedding: _Said
    head: _Said
    names: frozenset[str]
    num_tokens: int
    num_scored: int
    tied_delta: Delta | None
    notes: tuple[str, ...]

    @property
    def has_own_tokens(self) -> bool:
        """Whether the adapter's folder may know tokens that the model's doesn't."""
        return self.embedding.whole is not None or self.embedding.tokens is not None

    def build(self, read: Read) -> list[tuple[Embedding | Linear, TableChange]]:
        """The changes, on the CPU."""
        built: list[tuple[Embedding | Linear, TableChange]] = []
        embedding, head = self.ours.embedding, self.ours.head
        if embedding is not None:
            change = _change(self.embedding, self.ours.whole(embedding), None, read, embedding.shape[0])
            if (delta := self.embedding.delta) is not None:
                dtype = low_rank_dtype(embedding.current)
                down, up = balanced(read(delta.down).float(), read(delta.up).float(), delta.scaling)
                down, up = down.T.to(dtype).contiguous(), (up.T * delta.scaling).to(dtype).contiguous()
                change = replace(change, down=down, up=up)
            if _does_something(change, embedding.shape[0]):
                built.append((embedding, change))
        if head is not None:
            change = _change(self.head, self.ours.whole(head), self.ours.whole_bias(head), read, head.num_outputs)
            if _does_something(change, head.num_outputs):
                built.append((head, change))
        return built


def low_rank_dtype(current: CurrentStep) -> torch.dtype:
    """Of low-rank matrices there. On a CPU, too, what each step reads has sixteen bits: what it adds is small."""
    return torch.float16 if current.device.type == "cpu" else current.dtype


def planned_tables(adapter: PeftAdapter, ours: Tables) -> PlannedTables:
    """Raises BackendError, naming file and tensor, for tables that this model can't have."""
    embedding, head, names = _sorted(adapter, ours)
    tied_delta = None
    if ours.is_tied:
        embedding.base = head.base = head.base or embedding.base  # They are one tensor, and peft loads the head's last.
        if head.tokens is None:
            head.tokens = embedding.tokens
        if adapter.config.ties_tables:
            head.own = head.own or embedding.own
            tied_delta = embedding.delta if head.delta is None else None
    num_tokens = embedding.num_rows(_rows_of(ours.embedding, ours), ours.width)
    num_scored = head.num_rows(_rows_of(ours.head, ours), ours.width)
    if (delta := embedding.delta) is not None:
        if delta.down.shape[1] != num_tokens:
            raise _other_base(delta.down, f"{num_tokens} tokens")
        if delta.up.shape[0] != ours.width:
            raise _other_base(delta.up, f"rows of {ours.width} numbers")
    if tied_delta is not None and num_scored != num_tokens:
        raise _other_base(tied_delta.down, f"a head of {num_scored} rows")
    if (entry := head.whole) is not None and num_scored > num_tokens:
        raise BackendError(
            f"{entry.file}: tensor {entry.name!r} has {num_scored} rows, and the embedding {num_tokens}: tokens that "
            "can be written and not read; save the embedding with the adapter, too"
        )
    notes = []
    if num_scored < num_tokens and num_tokens > ours.num_tokens:
        notes.append(
            f"{adapter.folder}: tokens {num_scored} to {num_tokens - 1} can be read and not written: its file has no "
            "rows of the head for them"
        )
    num_tokens = num_tokens if num_tokens != _rows_of(ours.embedding, ours) else ours.num_tokens
    return PlannedTables(ours, embedding, head, names, num_tokens, num_scored, tied_delta, tuple(notes))


def _sorted(adapter: PeftAdapter, ours: Tables) -> tuple[_Said, _Said, frozenset[str]]:
    """What the file says of the embedding, of the head, and what it calls them."""
    embedding, head = _Said(), _Said()
    names: set[str] = set()

    def said(module: str, entry: TensorEntry) -> _Said:
        table = ours.find(module)
        if table is None:
            raise BackendError(f"{entry.file}: tensor {entry.name!r} can't be used with this model; {USED} can")
        names.add(module)
        return embedding if table is ours.embedding else head

    for (module, part), entry in adapter.own.items():
        if ours.find(module) is None:
            continue  # It may be a norm's.
        check_float(entry)
        if part == "weight":
            said(module, entry).own = entry
        else:
            said(module, entry).bias = entry
    for module, entry in adapter.base.items():
        check_float(entry)
        said(module, entry).base = entry
    for module, rows in adapter.tokens.items():
        check_float(rows.entry)
        said(module, rows.entry).tokens = rows
    for module, delta in adapter.table_deltas.items():
        check_float(delta.down)
        check_float(delta.up)
        said(module, delta.down).delta = delta
    if head.delta is not None:
        raise BackendError(f"{head.delta.down.file}: tensor {head.delta.down.name!r}: this model's head is a linear")
    head.delta = next((delta for module, delta in adapter.deltas.items() if ours.find(module) is ours.head), None)
    if (bias := embedding.bias or (head.bias if head.own is None else None)) is not None:
        raise BackendError(f"{bias.file}: tensor {bias.name!r} can't be used without a head of the adapter's own")
    return embedding, head, frozenset(names)


def _rows_of(table: Embedding | Linear | None, ours: Tables) -> int:
    return ours.num_tokens if table is None else table.shape[0]


def _change(said: _Said, theirs: Tensor | None, bias: Tensor | None, read: Read, num_theirs: int) -> TableChange:
    table = None if said.whole is None else read(said.whole)
    tokens = None if said.tokens is None else (said.tokens.token_ids, read(said.tokens.entry))
    own_bias = bias if said.bias is None else read(said.bias)
    return table_change(table, own_bias, theirs, tokens, num_theirs, is_bias_theirs=said.bias is None)


def _does_something(change: TableChange, num_theirs: int) -> bool:
    return change.rows is not None or change.down is not None or change.num_rows != num_theirs


def _other_base(entry: TensorEntry, wanted: str) -> BackendError:
    return BackendError(
        f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}, which doesn't fit {wanted}: an adapter "
        "for another base"
    )
