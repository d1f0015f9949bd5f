"""From the chunks of a step and the cache's block tables to what kernels read: StepLayout and rotary tables."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tightrope.backends.hf.cache.pages import Ints, PagedKVCache
from tightrope.backends.protocol import Chunk
from tightrope.backends.rope.scaling import RopeSpec
from tightrope.kernels.forms.layout import PAGE, RopeTable, StepLayout


class RotarySets:
    """The rotary table of one kind of layer: a set of angles for each set of frequencies in use.

    Most kinds have one, made at once for the served window. Where frequencies depend on the length, sequences that
    agree share a set, and sets that a step doesn't use make place for those it needs.
    """

    def __init__(self, spec: RopeSpec, window: int, device: torch.device | str = "cpu") -> None:
        """window: positions that can be rotated, in tokens."""
        self._spec = spec
        self._num_pages = -(-window // PAGE)
        half = spec.rotary_dim // 2
        self._pages = torch.zeros(0, self._num_pages, 2, half, device=device)
        self._places = torch.zeros(0, PAGE, 2, half, device=device)
        self._query_scale = torch.zeros(0, device=device)
        self._sets: OrderedDict[Hashable, int] = OrderedDict()  # by frequencies; least recently used first
        self._filled: list[int] = []  # pages of each set that hold angles
        self._static: dict[int, RopeTable] = {}  # by number of sequences, where all always agree
        if not spec.depends_on_length:
            self.table([window])

    def key(self, length: int) -> Hashable:
        """What tells the frequencies of a sequence of `length` tokens from those of others."""
        if not self._spec.depends_on_length:
            return None
        inv_freq, attention_factor = self._spec.frequencies(length)
        return inv_freq.tobytes(), attention_factor

    def table(self, lengths: Sequence[int]) -> RopeTable:
        """The table of a step whose sequences compute with the frequencies of these lengths [B], in tokens."""
        if len(lengths) in self._static:
            return self._static[len(lengths)]
        keys = [self.key(length) for length in lengths]
        in_use = set(keys)
        for key, length in zip(keys, lengths, strict=True):
            self._fill(self._set_of(key, in_use, length), length)
        set_of = torch.tensor([self._sets[key] for key in keys], dtype=torch.int32)
        table = RopeTable(self._pages, self._places, set_of.to(self._pages.device), self._query_scale)
        if not self._spec.depends_on_length:
            self._static[len(lengths)] = table
        return table

    def _set_of(self, key: Hashable, in_use: set[Hashable], length: int) -> int:
        """The set of these frequencies: its own, one that isn't in use, or a new one."""
        if key not in self._sets:
            idle = next((other for other in self._sets if other not in in_use), None)
            number = self._grow() if idle is None else self._sets.pop(idle)
            self._begin(number, length)
            self._sets[key] = number
        self._sets.move_to_end(key)
        return self._sets[key]

    def _grow(self) -> int:
        """A new set. The tensors are made anew; tables of earlier steps keep theirs."""
        self._pages, self._places, self._query_scale = (
            torch.cat((tensor, tensor.new_zeros(1, *tensor.shape[1:])))
            for tensor in (self._pages, self._places, self._query_scale)
        )
        self._filled.append(0)
        return len(self._filled) - 1

    def _begin(self, number: int, length: int) -> None:
        self._filled[number] = 0
        self._places[number] = self._angles(length, torch.arange(PAGE))
        self._query_scale[number] = self._spec.frequencies(length)[1] ** 2  # queries and keys had one factor each

    def _fill(self, number: int, length: int) -> None:
        """Have the angles of all pages of a sequence of this length."""
        begin, end = self._filled[number], -(-length // PAGE)
        if begin < end:
            self._pages[number, begin:end] = self._angles(length, torch.arange(begin, end) * PAGE)
            self._filled[number] = end

    def _angles(self, length: int, positions: Tensor) -> Tensor:
        """Cosines and sines [n, 2, R/2] float32 of positions [n], computed in float64."""
        inv_freq = torch.from_numpy(self._spec.frequencies(length)[0]).double()
        angles = positions.double().outer(inv_freq)
        return torch.stack((angles.cos(), angles.sin()), 1).float().to(self._pages.device)


class StepBuilder:
    """Lays out steps for one model and its cache."""

    def __init__(self, specs: Mapping[str, RopeSpec], window: int, device: torch.device | str = "cpu") -> None:
        """specs: the rotation of each kind of layer. window: the longest sequence, in tokens."""
        self.window = window
        self._device = device
        self._rotary = {name: RotarySets(spec, window, device) for name, spec in specs.items()}

    def frequencies_at(self, length: int) -> Hashable:
        """What tells the frequencies of all layers apart, for the cache's sharing."""
        return tuple(rotary.key(length) for rotary in self._rotary.values())

    def build(self, chunks: Sequence[Chunk], kv: PagedKVCache) -> tuple[StepLayout, dict[str, RopeTable]]:
        """The layout of a step and the tables of each kind of layer; the chunks' room is reserved."""
        counts = np.array([len(chunk.token_ids) for chunk in chunks], np.int32)
        starts = np.array([chunk.start for chunk in chunks], np.int32)
        query_starts = np.zeros(len(chunks) + 1, np.int32)
        np.cumsum(counts, out=query_starts[1:])
        context_lens = starts + counts
        longest = int(context_lens.max())
        assert longest <= self.window, f"a sequence of {longest} tokens in a window of {self.window}"
        sequence_of = np.repeat(np.arange(len(chunks), dtype=np.int32), counts)
        positions = np.arange(query_starts[-1], dtype=np.int32) + np.repeat(starts - query_starts[:-1], counts)

        def places(table_of: Callable[[int, int], Ints]) -> tuple[Tensor, Tensor]:
            """Block tables and slots of the pages that `table_of` names."""
            block_tables = np.zeros((len(chunks), -(-longest // PAGE)), np.int32)
            for row, chunk, length in zip(block_tables, chunks, context_lens.tolist(), strict=True):
                pages = table_of(chunk.seq_id, length)
                row[: len(pages)] = pages
            slots = block_tables[sequence_of, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
            return self._on_device(block_tables), self._on_device(slots)

        block_tables, slots = places(kv.block_table)
        step = StepLayout(
            query_starts=self._on_device(query_starts),
            context_lens=self._on_device(context_lens),
            block_tables=block_tables,
            slots=slots,
            positions=self._on_device(positions),
            sequence_of=self._on_device(sequence_of),
            max_query_len=int(counts.max()),
            max_context_len=longest,
        )
        if kv.has_windows:
            block_tables, slots = places(kv.window_table)
            step = replace(step, windowed=replace(step, block_tables=block_tables, slots=slots))
        lengths = [
            kv.effective_len(chunk.seq_id, length) for chunk, length in zip(chunks, context_lens.tolist(), strict=True)
        ]
        return step, {name: rotary.table(lengths) for name, rotary in self._rotary.items()}

    def _on_device(self, numbers: Ints | np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
        return torch.from_numpy(numbers).to(self._device)
