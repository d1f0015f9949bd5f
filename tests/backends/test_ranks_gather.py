"""Ranks hand their columns to each other: whole, in order, to the bit, however uneven, and whichever comes last."""

import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from tightrope.backends.hf.ranks.gather import SharedGather, new_memory
from tightrope.backends.hf.ranks.heads import LayerHeads, joined, split
from tightrope.backends.tensor_parallel import Share
from tightrope.kernels.forms.ranks import BUFFER_BYTES

Result = TypeVar("Result")


def on_ranks(count: int, run: Callable[[SharedGather], Result]) -> list[Result]:
    """What `run` returns on each rank, all of them at the same time, each in a thread."""
    memory = new_memory(count)
    try:
        gathers = [SharedGather(Share(rank, count), memory, 1) for rank in range(count)]
    finally:
        os.close(memory)
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, gathers))


def parts_of(num_rows: int, sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(num_rows, size).to(dtype) for size in sizes]


@pytest.mark.parametrize("sizes", [(64, 64), (32, 17), (5, 0), (128, 64, 64), (1, 2, 3, 4)])
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_every_rank_has_all_columns_in_the_order_of_the_ranks(sizes: tuple[int, ...], num_rows: int):
    parts = parts_of(num_rows, sizes)

    found = on_ranks(len(sizes), lambda gather: gather(parts[gather.share.rank], sizes))

    assert all(torch.equal(whole, torch.cat(parts, 1)) for whole in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_numbers_of_any_dtype_come_as_they_are(dtype: torch.dtype):
    parts = parts_of(3, (20, 12), dtype)

    found = on_ranks(2, lambda gather: gather(parts[gather.share.rank], (20, 12)))

    assert all(torch.equal(whole, torch.cat(parts, 1)) for whole in found)


def test_more_rows_than_the_shared_memory_holds_come_in_pieces():
    sizes = (50_000, 30_001)
    num_rows = 3 * BUFFER_BYTES // (4 * sum(sizes)) + 5
    parts = parts_of(num_rows, sizes)

    found = on_ranks(2, lambda gather: gather(parts[gather.share.rank], sizes))

    assert all(torch.equal(whole, torch.cat(parts, 1)) for whole in found)


def test_thousands_of_meetings_in_a_row_lose_nothing():
    """Numbers tell whose they are, and of which meeting; ranks are now ahead and now behind."""
    shapes = random.Random(0)
    meetings = [(shapes.randrange(1, 4), [shapes.randrange(1, 40) for _ in range(3)]) for _ in range(3000)]

    def meet(gather: SharedGather) -> int:
        pace = random.Random(gather.share.rank)
        for number, (num_rows, sizes) in enumerate(meetings):
            own = torch.full((num_rows, sizes[gather.share.rank]), 10.0 * number + gather.share.rank)
            if pace.random() < 0.01:
                sum(range(pace.randrange(5000)))  # Another rank gets to the meeting long before.
            whole = gather(own, sizes)
            expected = torch.cat([torch.full((num_rows, n), 10.0 * number + r) for r, n in enumerate(sizes)], 1)
            assert torch.equal(whole, expected)
        return len(meetings)

    assert on_ranks(3, meet) == [len(meetings)] * 3


SIZES = (8, 8, 8)
PATIENCE_S = 240


def own_of(gather: SharedGather, number: int) -> Tensor:
    return torch.full((1, SIZES[gather.share.rank]), 10.0 * number + gather.share.rank)


def is_whole(whole: Tensor, number: int) -> bool:
    return whole[0].tolist() == [10.0 * number + rank for rank, size in enumerate(SIZES) for _ in range(size)]


def test_a_rank_that_leaves_a_step_keeps_nobody_waiting_and_all_meet_again():
    """The others come to more meetings than it, and end none of them with its numbers."""
    are_out = threading.Barrier(len(SIZES))

    def meet(gather: SharedGather) -> int:
        met = 0
        for number in range(1, 41):
            met += is_whole(gather(own_of(gather, number), SIZES), number)
            if number % 4:
                continue
            are_out.wait(PATIENCE_S)
            assert not gather.has_any_left
            are_out.wait(PATIENCE_S)
            if gather.share.rank == number // 4 % len(SIZES):
                gather.leave_step()
            else:
                for _ in range(5):
                    gather(own_of(gather, number), SIZES)
                assert gather.has_any_left
            are_out.wait(PATIENCE_S)
            gather.meet_again(1000 * number)
            are_out.wait(PATIENCE_S)
        return met

    assert on_ranks(len(SIZES), meet) == [40] * len(SIZES)


def test_what_ranks_have_read_of_pages_is_what_one_would_have_and_is_split_likewise():
    """Three KV heads over two ranks, and one head that both keep; of a layer with a window there are fewer pages."""
    layers = [LayerHeads(3, ((0, 2), (2, 1)), (8, 0, 4)), LayerHeads(1, ((0, 1), (0, 1)), (6,))]
    counts = (4, 2)
    pages = [[torch.randint(0, 255, (n, layer.total, size), dtype=torch.uint8) for size in layer.head_bytes]
             for layer, n in zip(layers, counts, strict=True)]  # fmt: skip
    whole = torch.cat([tensor.flatten() for tensors in pages for tensor in tensors])

    parts = split(layers, counts, whole)

    for rank, part in enumerate(parts):
        spans = [layer.kept[rank] for layer in layers]
        own = [t[:, first : first + n] for (first, n), tensors in zip(spans, pages, strict=True) for t in tensors]
        assert torch.equal(part, torch.cat([tensor.flatten() for tensor in own]))
    assert torch.equal(joined(layers, counts, parts), whole)
