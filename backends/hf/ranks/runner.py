"""A Runner over all ranks: each step, and each change of the cache, goes to every one of them, in one order."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from weakref import finalize

import torch
from torch import Tensor

from tightrope.backends.hf.load.model import LoadedModel
from tightrope.backends.hf.modules.step import LayerInfo
from tightrope.backends.hf.ranks.heads import LayerHeads, Span, joined, split
from tightrope.backends.hf.ranks.messages import (
    AllocateCache,
    Beside,
    Calibrate,
    CopyPages,
    Drop,
    ReadPages,
    Record,
    WritePages,
    slots_message,
    step_message,
)
from tightrope.backends.hf.ranks.processes import Ranks, answers
from tightrope.backends.hf.ranks.steps import Steps, among_others
from tightrope.backends.hf.run.steps import StepInputs
from tightrope.backends.hf.runner import ModelRunner, Runner
from tightrope.kernels.forms.layout import CacheFormat, LayerCache

MAIN = 0  # The number of the runner over the cache of the plan.


class RunnersOfAll:
    """Makes runners over all ranks, and has the others forget theirs once nobody uses them."""

    def __init__(self, ranks: Ranks, steps: Steps, kept: Sequence[Sequence[Span]]) -> None:
        """kept: which KV heads each rank keeps, [ranks][layers]."""
        self.ranks, self.steps = ranks, steps
        self.kept = [tuple(of_layer) for of_layer in zip(*kept, strict=True)]
        self._numbers = count(MAIN + 1)
        self._unused: list[int] = []

    def main(self, own: ModelRunner) -> "RankedRunner":
        """Over the caches of the plan, which the others allocate as well. Raises BackendError."""
        found = answers(self.ranks.ask(AllocateCache()))
        payloads = [torch.frombuffer(payload, dtype=torch.uint8) for _, payload in found]
        return RankedRunner(own, self, MAIN, self._whole_factors(own, payloads))

    def beside(self, own: ModelRunner) -> "RankedRunner":
        """Over other caches, such as `own` has. Keys are divided as calibrated where its are divided at all."""
        self._forget()
        number = next(self._numbers)
        caches = [
            (c.format.dtype, len(c.key_codes), c.is_windowed, bool((c.key_factor != 1).any())) for c in own.caches
        ]
        self.ranks.tell(Beside(number, caches))
        runner = RankedRunner(own, self, number, [])
        finalize(runner, self._unused.append, number)  # It may be called at any moment, also within a message.
        return runner

    def _forget(self) -> None:
        unused = [self._unused.pop() for _ in range(len(self._unused))]
        if unused:
            self.ranks.tell(Drop(unused))

    def _whole_factors(self, own: ModelRunner, others: Sequence[Tensor]) -> list[Tensor]:
        """All heads' key factors, [Hkv, D] for each layer."""
        mine = torch.cat([factor.view(torch.uint8).flatten() for factor in own.key_factors])
        layers = [
            LayerHeads(total_heads(layer), kept, (4 * layer.head_dim,))
            for layer, kept in zip(own.model.layers, self.kept, strict=True)
        ]
        whole = joined(layers, [1] * len(layers), [mine, *others]).view(torch.float32)
        sizes = [layer.total * layer.head_bytes[0] // 4 for layer in layers]
        return [factor.view(layer.total, -1) for factor, layer in zip(whole.split(sizes), layers, strict=True)]


class RankedRunner:
    """The first rank's runner, and by messages those of the others, whose caches have other heads.

    A step that one of them can't end fails as it does with one rank, where ranks meet in memory that they share. What
    else fails on one alone leaves their caches different, so that it is the end of the device.
    """

    def __init__(self, own: ModelRunner, of_all: RunnersOfAll, number: int, factors: Sequence[Tensor]) -> None:
        """own: of this rank. number: of the others' runners. factors: those of all heads."""
        self._own, self._of_all, self._ranks, self._number = own, of_all, of_all.ranks, number
        self.key_factors = list(factors)
        self._layers = [
            LayerHeads(total_heads(layer), kept, tuple(t[0, 0].numel() * t.element_size() for t in cache.stored))
            for layer, cache, kept in zip(own.model.layers, own.caches, of_all.kept, strict=True)
        ]

    @property
    def model(self) -> LoadedModel:
        """This rank's."""
        return self._own.model

    @property
    def caches(self) -> Sequence[LayerCache]:
        """This rank's."""
        return self._own.caches

    @property
    def formats(self) -> list[CacheFormat]:
        """See ModelRunner."""
        return [
            replace(cache.format, num_kv_heads=layer.total)
            for cache, layer in zip(self.caches, self._layers, strict=True)
        ]

    def beside(self, caches: Sequence[LayerCache]) -> Runner:
        """See ModelRunner."""
        return self._of_all.beside(self._own.beside(caches))

    def found_factors(self) -> list[Tensor]:
        """Those of this rank's heads; the others keep theirs."""
        asked = self._ranks.ask(Calibrate(self._number))
        own = self._own.found_factors()
        answers(asked)
        return own

    def record_decode(self, max_num_seqs: int, max_model_len: int, progress: Callable[[float], None]) -> None:
        """See ModelRunner; a recording holds what ranks exchange."""
        asked = self._ranks.ask(Record(max_num_seqs, max_model_len), do_meet=True)
        with among_others():
            self._own.record_decode(max_num_seqs, max_model_len, progress)
        answers(asked)

    def run(self, inputs: StepInputs) -> Tensor:
        """See ModelRunner."""
        self._ranks.tell(step_message(self._number, inputs))
        with self._of_all.steps.step():
            return self._own.run(inputs)

    def copy_pages(self, copies: Sequence[tuple[int, int]], *, are_windowed: bool) -> None:
        """See ModelRunner."""
        self._ranks.tell(CopyPages(copies, are_windowed))
        with among_others():
            self._own.copy_pages(copies, are_windowed=are_windowed)

    def copy_slots(self, sources: Tensor, targets: Tensor) -> None:
        """See ModelRunner."""
        self._ranks.tell(slots_message(sources, targets))
        with among_others():
            self._own.copy_slots(sources, targets)

    def read_pages(self, numbers: Sequence[int], window_numbers: Sequence[int]) -> Tensor:
        """See ModelRunner: all heads' bytes, as one rank would give them."""
        numbers, window_numbers = _plain(numbers), _plain(window_numbers)
        asked = self._ranks.ask(ReadPages(numbers, window_numbers))
        own = self._own.read_pages(numbers, window_numbers)
        others = [torch.frombuffer(payload, dtype=torch.uint8) for _, payload in answers(asked)]
        return joined(self._layers, self._counts((len(numbers), len(window_numbers))), [own, *others])

    def write_pages(
        self,
        stored: Tensor,
        shape: tuple[int, int],
        pages: Sequence[tuple[int, int]],
        windows: Sequence[tuple[int, int]],
    ) -> None:
        """See ModelRunner."""
        own, *others = split(self._layers, self._counts(shape), stored)
        command = WritePages(shape, list(pages), list(windows))
        for process, part in zip(self._ranks.processes, others, strict=True):
            process.tell(command, part.numpy().tobytes())
        with among_others():
            self._own.write_pages(own, shape, pages, windows)

    def _counts(self, shape: tuple[int, int]) -> list[int]:
        """Pages of each layer, where so many and so many window pages are read."""
        return [shape[1] if cache.is_windowed else shape[0] for cache in self.caches]


def total_heads(layer: LayerInfo) -> int:
    """All KV heads of a layer."""
    return layer.all_kv_heads or layer.num_kv_heads


def _plain(numbers: Sequence[int]) -> list[int]:
    """Numbers that may be numpy's, as a message takes them."""
    return [int(number) for number in numbers]
