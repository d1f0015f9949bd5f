"""Steps and rotary tables for tests, built plainly: contiguous pages for each sequence, angles in float64."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tightrope.backends.rope.scaling import RopeSpec
from tightrope.kernels.forms.layout import PAGE, RopeTable, StepLayout


def step_of(chunks: Sequence[tuple[int, int]], pages_each: int) -> StepLayout:
    """A step of (tokens cached before, tokens now) for each sequence; sequence b owns pages_each pages, in reverse."""
    starts = np.cumsum([0, *(now for _, now in chunks)])
    tables = np.stack([np.arange(pages_each)[::-1] + b * pages_each for b in range(len(chunks))])
    positions = np.concatenate([np.arange(before, before + now) for before, now in chunks])
    owner = np.repeat(np.arange(len(chunks)), [now for _, now in chunks])
    return StepLayout(
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([before + now for before, now in chunks], dtype=torch.int32),
        block_tables=torch.tensor(tables.copy(), dtype=torch.int32),
        slots=torch.tensor(tables[owner, positions // PAGE] * PAGE + positions % PAGE, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int32),
        sequence_of=torch.tensor(owner, dtype=torch.int32),
        max_query_len=max(now for _, now in chunks),
        max_context_len=max(before + now for before, now in chunks),
    )


def rope_tables(rope: Mapping[str, RopeSpec], lengths: Sequence[int], pages: int) -> dict[str, RopeTable]:
    """Tables for sequences of these lengths, one set of frequencies each."""
    return {key: _table(spec, lengths, pages) for key, spec in rope.items()}


def _table(spec: RopeSpec, lengths: Sequence[int], pages: int) -> RopeTable:
    frequencies = np.stack([spec.frequencies(length)[0] for length in lengths]).astype(np.float64)  # [S, R/2]
    factor = torch.tensor([spec.frequencies(length)[1] for length in lengths], dtype=torch.float32)

    def angles(positions: np.ndarray) -> Tensor:
        angle = positions[None, :, None] * frequencies[:, None, :]
        return torch.from_numpy(np.stack((np.cos(angle), np.sin(angle)), 2)).float()

    return RopeTable(
        pages=angles(np.arange(pages) * PAGE),
        places=angles(np.arange(PAGE)),
        set_of=torch.arange(len(lengths), dtype=torch.int32),
        query_scale=factor**2,
    )
