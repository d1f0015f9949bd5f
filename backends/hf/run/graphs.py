"""Decode under CUDA graphs: a step of one token a sequence is recorded once for each size and played back.

A recorded step always works on the same memory, so what changes from step to step is copied into fixed inputs first.
A smaller batch fills the rest of its size with sequences that have no tokens, whose slot -1 stores nothing; launches
are sized by the longest context of a step, which is rounded up as well: each recording takes memory, so they are few.
Which rows use which adapters is an input, too: what is launched for adapters is the same for all that only add to
linears.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from tightrope.backends.hf.run.device_errors import errors_of, first_line
from tightrope.kernels.forms.layout import PAGE, RopeTable, StepLayout
from tightrope.kernels.forms.low_rank import NONE, AdapterRows

# Batches of up to SMALL_BATCH sequences are recorded for contexts up to SHORT_CONTEXT tokens as well. In larger ones
# attention cuts each context into few stretches anyway, as they fill the card together.
SHORT_CONTEXT, SMALL_BATCH = 2048, 2

log = logging.getLogger("tightrope.hf")

Replay = Callable[[], Tensor]
TablesOf = Callable[[int], Mapping[str, RopeTable]]
EmbeddedOf = Callable[[Tensor], Tensor | None]


class Forward(Protocol):
    """LoadedModel.forward over caches of its own."""

    def __call__(
        self,
        token_ids: Tensor,
        step: StepLayout,
        tables: Mapping[str, RopeTable],
        rows: Tensor,
        adapters: AdapterRows | None = None,
        embedded: Tensor | None = None,
    ) -> Tensor: ...


class CudaCapture:
    """Records work as a CUDA graph; all graphs share one pool of memory, since one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # One for all: cuBLAS keeps a workspace for each stream that it has run on.

    def __call__(self, run: Replay) -> Replay:
        """`run` recorded; what it returned is written again by each replay."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()  # It compiles kernels and sets up libraries, which a recording can't do.
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = run()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class DecodeGraphs:
    """A model's forward, recorded for steps in which every sequence has one token.

    Other steps run as they are, and all do after a recording that failed: the next would most likely fail, too. A call
    stores keys and values as the forward does, and its result is the caller's own.
    """

    def __init__(
        self,
        forward: Forward,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device | str = "cuda",
        capture: Callable[[Replay], Replay] | None = None,
        *,
        has_windows: bool = False,
    ) -> None:
        """max_num_seqs: the largest batch that is recorded; max_model_len: the longest context, in tokens.

        has_windows: steps are `windowed` as well.
        """
        self._forward = forward
        self._largest = batch_size(max_num_seqs)
        self._max_model_len = max_model_len
        self._capture = capture or CudaCapture()
        self._token_ids = torch.zeros(self._largest, dtype=torch.int64, device=device)
        self._step = _empty_step(self._largest, -(-max_model_len // PAGE), device)
        if has_windows:
            self._step = replace(self._step, windowed=_empty_step(self._largest, -(-max_model_len // PAGE), device))
        self._embedded: Tensor | None = None  # [largest, hidden] of a table in the machine's own memory
        self._sets: dict[str, Tensor] = {}  # set_of [largest] of each table
        self._addresses: tuple[tuple[str, int], ...] = ()  # Where the tables that the graphs read lie.
        slots = torch.full((self._largest,), NONE, dtype=torch.int32, device=device)
        self._adapters = AdapterRows(slots, torch.zeros(self._largest, device=device), ())
        self._launches: int | None = None  # Of the recordings with adapters.
        self._graphs: dict[tuple[int, int, bool], Replay] = {}  # By batch size, context, and whether with adapters.
        self._is_on = True

    def forward(
        self,
        token_ids: Tensor,
        step: StepLayout,
        tables: Mapping[str, RopeTable],
        rows: Tensor,
        adapters: AdapterRows | None = None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """Logits [len(rows), V] float32, as `forward` gives them. Rows rise, none twice."""
        num_seqs = len(step.context_lens)
        is_decode = step.max_query_len == 1 and len(token_ids) == num_seqs <= self._largest and len(rows) > 0
        is_other = adapters is not None and adapters.launches is None
        if not (self._is_on and is_decode) or is_other:
            return self._forward(token_ids, step, tables, rows, adapters, embedded)
        self._forget_moved(tables)
        self._forget_others(adapters)
        size, context = batch_size(num_seqs), context_size(num_seqs, step.max_context_len, self._max_model_len)
        self._fill(token_ids, step, tables, adapters, size)
        if embedded is not None:
            if self._embedded is None:
                self._embedded = embedded.new_zeros(self._largest, embedded.shape[1])
            self._embedded[:num_seqs].copy_(embedded)
        key = size, context, adapters is not None
        if key not in self._graphs and not self._try_to_record(*key, tables):
            return self._forward(token_ids, step, tables, rows, adapters, embedded)
        logits = self._graphs[key]()
        return logits[:num_seqs].clone() if len(rows) == num_seqs else logits[rows]

    def record_all(self, tables_of: TablesOf, embedded_of: EmbeddedOf, progress: Callable[[float], None]) -> None:
        """Record now all that steps without adapters can ask for, until a recording fails.

        tables_of, embedded_of: the tables of so many sequences, and what LoadedModel.embedded gives for token ids.
        """
        device = self._token_ids.device
        sizes = recordings(self._largest, self._max_model_len)
        for num_done, (size, context) in enumerate(sizes, 1):
            step = replace(_empty_step(size, 1, device), max_context_len=context)
            if self._step.windowed is not None:
                step = replace(step, windowed=step)
            token_ids = torch.zeros(size, dtype=torch.int64, device=device)
            rows = torch.arange(size, device=device)
            self.forward(token_ids, step, tables_of(size), rows, embedded=embedded_of(token_ids))
            progress(num_done / len(sizes))
            if not self._is_on:
                return

    def _forget_moved(self, tables: Mapping[str, RopeTable]) -> None:
        """Angles are read where they lie; when one table has grown it lies elsewhere, and graphs are recorded anew."""
        addresses = tuple((name, table.pages.data_ptr()) for name, table in sorted(tables.items()))
        if addresses == self._addresses:
            return
        self._graphs.clear()
        self._addresses = addresses
        self._sets = {name: self._step.context_lens.new_zeros(self._largest) for name in tables}

    def _forget_others(self, adapters: AdapterRows | None) -> None:
        """Recordings with adapters go when other kernels are launched for these from now on."""
        if adapters is not None and adapters.launches != self._launches:
            self._graphs = {key: replay for key, replay in self._graphs.items() if not key[2]}
            self._launches = adapters.launches

    def _fill(
        self,
        token_ids: Tensor,
        step: StepLayout,
        tables: Mapping[str, RopeTable],
        adapters: AdapterRows | None,
        size: int,
    ) -> None:
        """Put a step into the first `size` places of the fixed inputs."""
        used = len(token_ids)
        fixed = self._step
        pairs = [
            (self._token_ids, token_ids),
            (fixed.context_lens, step.context_lens),
            (fixed.slots, step.slots),
            (fixed.positions, step.positions),
            *((self._sets[name], table.set_of) for name, table in tables.items()),
        ]
        if adapters is not None:
            pairs += [(self._adapters.slots, adapters.slots), (self._adapters.scales, adapters.scales)]
        block_tables = [(fixed.block_tables, step.block_tables)]
        if fixed.windowed is not None and step.windowed is not None:
            pairs.append((fixed.windowed.slots, step.windowed.slots))
            block_tables.append((fixed.windowed.block_tables, step.windowed.block_tables))
        for target, source in pairs:
            target[:used].copy_(source)
            target[used:size].zero_()
        for target, source in block_tables:
            width = min(source.shape[1], target.shape[1])
            target[:used, :width].copy_(source[:, :width])
        for layout in (fixed, fixed.windowed):
            if layout is not None:
                layout.slots[used:size].fill_(-1)
        self._adapters.slots[used:size].fill_(NONE)

    def _try_to_record(self, size: int, context: int, has_adapters: bool, tables: Mapping[str, RopeTable]) -> bool:
        """False, with no graphs from now on, where that fails: for want of memory, or in what can't be recorded."""
        try:
            self._graphs[size, context, has_adapters] = self._record(size, context, has_adapters, tables)
        except errors_of(self._token_ids.device) as error:
            log.warning("graphs=off: a step of %d tokens can't be recorded: %s", size, first_line(error))
            self._is_on = False
            self._graphs.clear()
        return self._is_on

    def _record(self, size: int, context: int, has_adapters: bool, tables: Mapping[str, RopeTable]) -> Replay:
        fixed = self._step
        step = StepLayout(
            query_starts=fixed.query_starts[: size + 1],
            context_lens=fixed.context_lens[:size],
            block_tables=fixed.block_tables[:size],
            slots=fixed.slots[:size],
            positions=fixed.positions[:size],
            sequence_of=fixed.sequence_of[:size],
            max_query_len=1,
            max_context_len=context,
        )
        if fixed.windowed is not None:
            block_tables, slots = fixed.windowed.block_tables[:size], fixed.windowed.slots[:size]
            step = replace(step, windowed=replace(step, block_tables=block_tables, slots=slots))
        angles = {
            name: RopeTable(table.pages, table.places, self._sets[name][:size], table.query_scale)
            for name, table in tables.items()
        }
        rows = torch.arange(size, device=self._token_ids.device)
        fixed_rows = self._adapters
        adapters = AdapterRows(fixed_rows.slots[:size], fixed_rows.scales[:size], ()) if has_adapters else None
        embedded = None if self._embedded is None else self._embedded[:size]
        return self._capture(lambda: self._forward(self._token_ids[:size], step, angles, rows, adapters, embedded))


def batch_size(num_seqs: int) -> int:
    """The batch that `num_seqs` sequences are recorded with: a power of two."""
    return 1 << max(num_seqs - 1, 0).bit_length()


def context_size(num_seqs: int, num_tokens: int, max_model_len: int) -> int:
    """The longest context, in tokens, that a step of `num_seqs` with one of `num_tokens` is recorded for."""
    is_short = num_tokens <= SHORT_CONTEXT and batch_size(num_seqs) <= SMALL_BATCH
    return min(SHORT_CONTEXT, max_model_len) if is_short else max_model_len


def recordings(max_num_seqs: int, max_model_len: int) -> list[tuple[int, int]]:
    """(batch, longest context) of all steps that are recorded; the largest first, whose memory others use."""
    sizes = [1 << power for power in reversed(range(batch_size(max_num_seqs).bit_length()))]
    lengths = (max_model_len, SHORT_CONTEXT)
    return list(
        dict.fromkeys((size, context_size(size, length, max_model_len)) for size in sizes for length in lengths)
    )


def _empty_step(num_seqs: int, num_pages: int, device: torch.device | str) -> StepLayout:
    """One row for each of `num_seqs` sequences, all of them without tokens."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32, device=device)

    return StepLayout(
        query_starts=torch.arange(num_seqs + 1, dtype=torch.int32, device=device),
        context_lens=zeros(num_seqs),
        block_tables=zeros(num_seqs, num_pages),
        slots=torch.full((num_seqs,), -1, dtype=torch.int64, device=device),
        positions=zeros(num_seqs),
        sequence_of=torch.arange(num_seqs, dtype=torch.int32, device=device),
        max_query_len=1,
        max_context_len=0,
    )
