"""Ranks of a tensor-parallel model in threads of one process, which meet at a barrier."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier
from typing import Any

import torch
from step_builder import rope_tables, step_of
from torch import Tensor

from tightrope.backends.hf.load.blueprint import Blueprint
from tightrope.backends.hf.load.model import LoadedModel, build
from tightrope.backends.rope.scaling import RopeSpec
from tightrope.backends.tensor_parallel import Share
from tightrope.kernels.forms.layout import CacheDtype, CacheFormat, LayerCache
from tightrope.kernels.forms.low_rank import AdapterRows

PAGES_EACH = 4
WAIT_S = 240.0


class Meeting:
    """Where all ranks bring their columns."""

    def __init__(self, count: int) -> None:
        self.parts: list[Tensor] = [torch.empty(0)] * count
        self.barrier = Barrier(count)

    def gather(self, rank: int) -> "Gathering":
        return Gathering(self, Share(rank, len(self.parts)))


@dataclass
class Gathering:
    """A Gather. It counts how often it was called."""

    meeting: Meeting
    share: Share
    shared: None = None
    calls: int = 0

    def __call__(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        assert local.shape[1] == sizes[self.share.rank]
        self.meeting.parts[self.share.rank] = local
        self.meeting.barrier.wait(WAIT_S)
        whole = torch.cat(self.meeting.parts, 1)
        self.meeting.barrier.wait(WAIT_S)
        self.calls += 1
        return whole

    def close(self) -> None:
        """See Gather."""


class Ranks:
    """Models of all ranks over caches of their own. One rank gathers nothing."""

    def __init__(self, models: Sequence[LoadedModel], rope: Mapping[str, RopeSpec]) -> None:
        self.models, self.rope = models, rope
        self.meeting = Meeting(len(models))
        self.gathers = [self.meeting.gather(rank) for rank in range(len(models))]
        for model, gather in zip(models, self.gathers, strict=True):
            model.current.gather = gather if len(models) > 1 else None
        self.caches: list[list[LayerCache]] = []

    def open(self, num_sequences: int, dtype: CacheDtype) -> None:
        """Empty caches."""
        formats = [[CacheFormat(dtype, one.num_kv_heads, one.head_dim) for one in m.layers] for m in self.models]
        pages = num_sequences * PAGES_EACH
        self.caches = [[LayerCache.allocate(format, pages) for format in of_rank] for of_rank in formats]

    def each(self, run: Callable[[int], Any]) -> list[Any]:
        """What `run` gives for each rank, all at a time. Raises what the first rank raised that failed."""

        def guarded(rank: int) -> Any:  # noqa: ANN401 - see above
            try:
                return run(rank)
            except BaseException:
                self.meeting.barrier.abort()
                raise

        with ThreadPoolExecutor(len(self.models)) as threads:
            found = [threads.submit(guarded, rank) for rank in range(len(self.models))]
        errors = [error for one in found if (error := one.exception()) is not None]
        for error in errors:
            if type(error).__name__ != "BrokenBarrierError":
                raise error
        return [one.result() for one in found]

    def forward(self, ids: Tensor, chunks: Sequence[tuple[int, int]], adapters: AdapterRows | None = None) -> Tensor:
        """Logits of all rows of a step, which every rank has to the same bits."""
        tables = rope_tables(self.rope, [before + now for before, now in chunks], PAGES_EACH)
        rows = torch.arange(len(ids))

        def run(rank: int) -> Tensor:
            step = step_of(chunks, PAGES_EACH)
            return self.models[rank].forward(self.caches[rank], ids, step, tables, rows, adapters)

        first, *others = self.each(run)
        assert all(torch.equal(first, other) for other in others)
        return first

    def run(
        self, prompts: Sequence[Tensor], steps: Sequence[Sequence[int]], dtype: CacheDtype = "q8",
        adapters: Callable[[Sequence[int]], AdapterRows] | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits of every token, step after step; each step runs so many further tokens of each prompt."""
        self.open(len(prompts), dtype)
        done, outputs = [0] * len(prompts), []
        for counts in steps:
            ids = torch.cat([p[d : d + n] for p, d, n in zip(prompts, done, counts, strict=True)])
            chunks = [(d, n) for d, n in zip(done, counts, strict=True)]
            outputs.append(self.forward(ids, chunks, None if adapters is None else adapters(counts)))
            done = [d + n for d, n in chunks]
        return torch.cat(outputs)


def build_ranks(draw: Callable[[Share], Blueprint], rope: Mapping[str, RopeSpec], count: int) -> Ranks:
    """`draw` makes a rank's blueprint. One after the other, as transformers can't in two threads at once."""
    return Ranks([build(draw(Share(rank, count))) for rank in range(count)], rope)


def stored(ranks: Ranks, layer: int) -> dict[str, Tensor]:
    """All ranks' keys and values of a layer as one rank has them, by the names of LayerCache's tensors."""
    found: dict[str, Tensor] = {}
    for model, caches in zip(ranks.models, ranks.caches, strict=True):
        info, cache = model.layers[layer], caches[layer]
        for name, tensor in (("key_codes", cache.key_codes), ("value_codes", cache.value_codes)):
            count = info.all_kv_heads or info.num_kv_heads
            whole = found.setdefault(name, torch.zeros(len(tensor), count, *tensor.shape[2:], dtype=tensor.dtype))
            whole[:, info.first_kv_head : info.first_kv_head + info.num_kv_heads] = tensor
    return found


def rows_of(slots: Sequence[int], scales: Sequence[float]) -> Callable[[Sequence[int]], AdapterRows]:
    """Which adapter each prompt's rows use: its slot, -1 for none."""

    def rows(counts: Sequence[int]) -> AdapterRows:
        of_rows = torch.tensor(slots, dtype=torch.int32).repeat_interleave(torch.tensor(counts))
        own = torch.tensor(scales).repeat_interleave(torch.tensor(counts))
        return AdapterRows(of_rows, own, tuple(sorted({slot for slot in slots if slot >= 0})))

    return rows
