"""A step as a plain value: from chunks and the cache's block tables to what a runner is sent."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from tightrope.backends.hf.cache.live import Ints
from tightrope.backends.hf.cache.pages import PagedKVCache
from tightrope.backends.protocol import Chunk
from tightrope.backends.rope.scaling import RopeSpec
from tightrope.kernels.forms.layout import PAGE, StepLayout
from tightrope.kernels.forms.low_rank import AdapterRows


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All that a runner needs to know of a step, in numbers alone and on the CPU, so that it may be sent anywhere.

    A runner elsewhere gives the same logits where its weights, cached pages and adapters are the same.
    """

    token_ids: Tensor  # [T] int64
    layout: StepLayout
    rope_lengths: tuple[int, ...]  # [B] Each sequence computes with the frequencies of one of so many tokens.
    rows: Tensor  # [n] int64, rising: the rows whose logits are wanted
    adapters: AdapterRows | None  # None when no row of the step uses any.


class StepBuilder:
    """Lays out steps for one model and its cache."""

    def __init__(self, specs: Mapping[str, RopeSpec], window: int) -> None:
        """specs: the rotation of each kind of layer. window: the longest sequence, in tokens."""
        self.window = window
        self._specs = tuple(specs.values())

    def frequencies_at(self, length: int) -> Hashable:
        """What tells the frequencies of all layers apart, for the cache's sharing."""
        return tuple(spec.key(length) for spec in self._specs)

    def build(self, chunks: Sequence[Chunk], kv: PagedKVCache, adapters: AdapterRows | None = None) -> StepInputs:
        """The inputs of a step; the chunks' room is reserved. adapters: which of them each row of the step uses."""
        counts, starts = [len(chunk.token_ids) for chunk in chunks], [chunk.start for chunk in chunks]
        lengths, query_starts = [start + n for start, n in zip(starts, counts, strict=True)], [0, *accumulate(counts)]
        longest, num_tokens = max(lengths), query_starts[-1]
        assert longest <= self.window, f"a sequence of {longest} tokens in a window of {self.window}"
        # In a step of few numbers each call of numpy takes longer than they do.
        has_one_each = max(counts) == 1
        if has_one_each:
            positions, sequence_of = np.array(starts, np.int32), np.arange(num_tokens, dtype=np.int32)
        else:
            sequence_of = np.repeat(np.arange(len(chunks), dtype=np.int32), counts)
            first_of = np.array(starts, np.int32) - np.array(query_starts[:-1], np.int32)
            positions = np.arange(num_tokens, dtype=np.int32) + np.repeat(first_of, counts)

        def places(table_of: Callable[[int, int], Ints]) -> tuple[Tensor, Tensor]:
            """Block tables and slots of the pages that `table_of` names."""
            block_tables = np.zeros((len(chunks), -(-longest // PAGE)), np.int32)
            for row, chunk, length in zip(block_tables, chunks, lengths, strict=True):
                pages = table_of(chunk.seq_id, length)
                row[: len(pages)] = pages
            if has_one_each:
                pages_of = zip(block_tables, starts, strict=True)
                at = [int(row[start // PAGE]) * PAGE + start % PAGE for row, start in pages_of]
                slots = np.array(at, np.int64)
            else:
                slots = block_tables[sequence_of, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
            return torch.from_numpy(block_tables), torch.from_numpy(slots)

        block_tables, slots = places(kv.block_table)
        layout = StepLayout(
            query_starts=torch.from_numpy(np.array(query_starts, np.int32)),
            context_lens=torch.from_numpy(np.array(lengths, np.int32)),
            block_tables=block_tables,
            slots=slots,
            positions=torch.from_numpy(positions),
            sequence_of=torch.from_numpy(sequence_of),
            max_query_len=max(counts),
            max_context_len=longest,
            lengths=tuple(zip(counts, lengths, strict=True)),
        )
        if kv.has_windows:
            block_tables, slots = places(kv.window_table)
            layout = replace(layout, windowed=replace(layout, block_tables=block_tables, slots=slots))
        return StepInputs(
            token_ids=torch.from_numpy(np.concatenate([np.asarray(chunk.token_ids, np.int64) for chunk in chunks])),
            layout=layout,
            rope_lengths=tuple(
                kv.effective_len(chunk.seq_id, length) for chunk, length in zip(chunks, lengths, strict=True)
            ),
            rows=torch.from_numpy(_wanted_rows(chunks)),
            adapters=adapters,
        )


def _wanted_rows(chunks: Sequence[Chunk]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Rows of the step whose logits are wanted."""
    if all(chunk.want_logits == "last" and len(chunk.token_ids) == 1 for chunk in chunks):
        return np.arange(len(chunks))
    parts: list[range] = []
    end = 0
    for chunk in chunks:
        begin, end = end, end + len(chunk.token_ids)
        parts.append(range({"all": begin, "last": end - 1, "none": end}[chunk.want_logits], end))
    return np.concatenate([np.asarray(part, np.int64) for part in parts])
