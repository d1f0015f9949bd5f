"""Steps laid out from chunks: every token's place, and rotary tables that equal the frequencies of each sequence."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from error_bounds import UNIT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tightrope.backends.hf.cache.pages import PagedKVCache
from tightrope.backends.hf.run.rotary import RotarySets
from tightrope.backends.hf.run.steps import StepBuilder
from tightrope.backends.protocol import Chunk
from tightrope.backends.rope.scaling import RopeSpec
from tightrope.kernels.forms.layout import PAGE, RopeTable, StepLayout
from tightrope.kernels.reference import rotate

pytestmark = pytest.mark.quick

HALF = 8
PLAIN = RopeSpec("none", 1.0, 10_000.0, 2 * HALF, 2 * HALF, trained_len=64, window=512)
DYNAMIC = RopeSpec("dynamic", 4.0, 10_000.0, 2 * HALF, 2 * HALF, trained_len=64, window=512)
LONGROPE = RopeSpec(
    "longrope",
    4.0,
    10_000.0,
    2 * HALF,
    2 * HALF,
    trained_len=64,
    window=512,
    attention_factor=1.2,
    short_factor=tuple(1 + 0.1 * i for i in range(HALF)),
    long_factor=tuple(2 + 0.5 * i for i in range(HALF)),
)


def layout(chunks: Sequence[Chunk], kv: PagedKVCache) -> StepLayout:
    return StepBuilder({}, 512).build(chunks, kv).layout


def opened(kv: PagedKVCache, seq_id: int, num_tokens: int, stored: int, room: int) -> None:
    """A sequence opened with num_tokens, of which `stored` have run, and room for more."""
    kv.open(seq_id, range(num_tokens), str(seq_id))
    assert kv.reserve(seq_id, stored + room)
    kv.commit(seq_id, 0, range(stored))


@given(st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=6))
@settings(max_examples=50)
def test_every_token_is_stored_where_the_block_table_says(parts: list[tuple[int, int]]) -> None:
    """parts: tokens that have run, and tokens of this step, of each sequence."""
    kv = PagedKVCache(200)
    for seq_id, (stored, count) in enumerate(parts):
        opened(kv, seq_id, stored + count, stored, count)
    step = layout([Chunk(i, range(count), stored, "last") for i, (stored, count) in enumerate(parts)], kv)

    assert step.query_starts.tolist() == [sum(count for _, count in parts[:i]) for i in range(len(parts) + 1)]
    assert step.context_lens.tolist() == [stored + count for stored, count in parts]
    assert step.max_query_len == max(count for _, count in parts)
    assert step.max_context_len == max(stored + count for stored, count in parts)
    assert step.lengths == tuple((count, stored + count) for stored, count in parts)
    row = 0
    for b, (stored, count) in enumerate(parts):
        for position in range(stored, stored + count):
            page = int(kv.block_table(b, stored + count)[position // PAGE])
            assert step.block_tables[b, position // PAGE] == page
            assert (step.slots[row], step.positions[row]) == (page * PAGE + position % PAGE, position)
            assert step.sequence_of[row] == b
            row += 1
    assert row == len(step.slots) == len(set(step.slots.tolist()))


def test_layers_with_a_window_store_and_look_in_pages_of_their_own() -> None:
    kv = PagedKVCache(64, num_window_pages=6, window=20)
    opened(kv, 1, 200, 0, 200)
    kv.commit(1, 0, range(100))
    step = layout([Chunk(1, range(100, 130), 100, "last")], kv)

    assert step.windowed is not None
    table = step.windowed.block_tables[0]
    looked_at = table[(100 - 19) // PAGE :].tolist()
    assert table.tolist() == [0] * 5 + looked_at
    assert len(set(looked_at)) == 4
    assert step.windowed.slots.tolist() == [int(table[p // PAGE]) * PAGE + p % PAGE for p in range(100, 130)]
    assert step.windowed.positions is step.positions


def test_the_layout_has_the_dtypes_that_kernels_read() -> None:
    kv = PagedKVCache(8)
    opened(kv, 1, 20, 0, 20)
    step = layout([Chunk(1, range(20), 0, "last")], kv)
    for name in ("query_starts", "context_lens", "block_tables", "positions", "sequence_of"):
        assert getattr(step, name).dtype == torch.int32, name
    assert step.slots.dtype == torch.int64


def turned(table: RopeTable, positions: Sequence[int]) -> torch.Tensor:
    """Vectors of ones [B, 1, R], one a sequence, rotated to these positions."""
    count = len(positions)
    whole = torch.tensor(positions, dtype=torch.int32)
    each = torch.arange(count, dtype=torch.int32)
    step = StepLayout(
        torch.arange(count + 1), whole + 1, whole[:, None], whole.long(), whole, each, 1, max(positions) + 1
    )
    return rotate(torch.ones(count, 1, 2 * HALF), step, table)


def turned_plainly(spec: RopeSpec, length: int, position: int) -> np.ndarray:
    """The same of one position in float64, with the frequencies of a sequence of `length` tokens."""
    inv_freq, attention_factor = spec.frequencies(length)
    angles = position * inv_freq.astype(np.float64)
    return attention_factor**2 * np.concatenate((np.cos(angles) - np.sin(angles), np.cos(angles) + np.sin(angles)))


def check_turned(found: Tensor, spec: RopeSpec, length: int, position: int) -> None:
    """A pair of ones is turned by page and place, each a cosine, a sine, two products and a sum in float32."""
    exact = turned_plainly(spec, length, position)
    assert np.abs(found.numpy() - exact).max() <= 12 * UNIT * math.sqrt(2) * spec.frequencies(length)[1] ** 2


@pytest.mark.parametrize("spec", [PLAIN, DYNAMIC, LONGROPE], ids=lambda spec: spec.kind)
@given(st.lists(st.lists(st.integers(1, 512), min_size=1, max_size=5), min_size=1, max_size=6))
@settings(max_examples=40)
def test_each_sequence_is_rotated_with_the_frequencies_of_its_own_length(
    spec: RopeSpec, steps: list[list[int]]
) -> None:
    """Several steps, as sets are kept, given away and filled up from one step to the next."""
    rotary = RotarySets(spec, 512)
    for lengths in steps:
        table = rotary.table(lengths)
        positions = [length - 1 for length in lengths]
        for position in (positions, [p // 2 for p in positions]):
            got = turned(table, position)
            for row, length, p in zip(got, lengths, position, strict=True):
                check_turned(row[0], spec, length, p)


def test_sequences_that_agree_share_one_set() -> None:
    for spec, num_sets in ((PLAIN, 1), (DYNAMIC, 3), (LONGROPE, 2)):
        table = RotarySets(spec, 512).table([10, 64, 65, 100, 100])
        assert len(table.pages) == num_sets
        assert table.set_of.dtype == torch.int32


def test_sets_do_not_pile_up_while_a_sequence_grows() -> None:
    rotary = RotarySets(DYNAMIC, 512)
    for length in range(60, 400):
        table = rotary.table([length, 40])
    assert len(table.pages) <= 3


def test_chunks_of_a_prompt_use_the_frequencies_of_the_whole() -> None:
    builder = StepBuilder({"default": DYNAMIC}, 512)
    kv = PagedKVCache(64, builder.frequencies_at)
    opened(kv, 1, 300, 16, 32)
    opened(kv, 2, 30, 16, 32)
    inputs = builder.build([Chunk(1, range(16, 32), 16, "none"), Chunk(2, range(16, 30), 16, "last")], kv)
    got = turned(RotarySets(DYNAMIC, 512).table(inputs.rope_lengths), [31, 29])
    check_turned(got[0, 0], DYNAMIC, 300, 31)
    check_turned(got[1, 0], DYNAMIC, 30, 29)


def test_the_cache_tells_lengths_of_other_frequencies_apart() -> None:
    at = StepBuilder({"default": DYNAMIC}, 512).frequencies_at
    assert at(3) == at(64) != at(65) != at(66)
    at = StepBuilder({"default": LONGROPE}, 512).frequencies_at
    assert at(3) == at(64) != at(65) == at(512)
    at = StepBuilder({"default": PLAIN}, 512).frequencies_at
    assert at(3) == at(512)


def test_a_step_moved_to_another_device_is_there_whole_and_moves_what_windows_share_once() -> None:
    kv = PagedKVCache(64, num_window_pages=64, window=32)
    opened(kv, 1, 60, 40, 20)
    step = layout([Chunk(1, range(20), 40, "last")], kv)

    moved = step.to(torch.device("meta"))

    assert moved.windowed is not None
    for part in (moved, moved.windowed):
        tensors = [value for name in part.__slots__ if isinstance(value := getattr(part, name), Tensor)]
        assert len(tensors) == 6
        assert all(tensor.is_meta for tensor in tensors)
    assert moved.windowed.positions is moved.positions
    assert moved.windowed.slots is not moved.slots
    assert step.to(torch.device("cpu")) is step
