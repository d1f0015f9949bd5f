"""A runner on its own: steps as values that are sent to another process, runners on shared weights, copied pages."""

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkout import ADAPTERS
from other_runner import other_runner
from step_builder import step_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tightrope.backends import sharing
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.modules.step import CurrentStep
from tightrope.backends.hf.run.rotary import RotarySets
from tightrope.backends.hf.run.steps import StepInputs
from tightrope.backends.hf.runner import ModelRunner
from tightrope.backends.protocol import Chunk
from tightrope.backends.rope.scaling import RopeSpec
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.backends.sharing import Counters, Threads
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layout import PAGE, CacheDtype, CacheFormat, LayerCache, StepLayout

FOLDER, ADAPTER = ADAPTERS / "llama-bf16", ADAPTERS / "llama-lora-r4"
SETTINGS = ModelSettings(
    max_model_len=128,
    max_num_seqs=4,
    threads=1,
    cache=CacheSettings(tokens=256, dtype="q8"),
    adapters={"mine": str(ADAPTER)},
)
PROMPT = tuple(range(5, 45))


def opened(backend: HFBackend, seq_id: int, token_ids: Sequence[int], adapter: str | None = None) -> Chunk:
    """A sequence with room for a few more tokens, and the chunk that runs what wasn't found of it."""
    found = backend.kv.open(seq_id, token_ids, str(adapter)).num_tokens
    assert backend.kv.reserve(seq_id, len(token_ids) - found + 4)
    return Chunk(seq_id, token_ids[found:], found, "last", adapter, 0.5)


def test_a_step_sent_through_a_pipe_gives_the_same_logits_in_another_process():
    with closing(HFBackend(FOLDER, SETTINGS, lambda _: None)) as backend, other_runner(FOLDER, SETTINGS) as other:

        def step(*chunks: Chunk) -> None:
            inputs = backend.inputs(chunks)
            assert torch.equal(other.run(inputs), backend.runner.run(inputs))
            for chunk in chunks:
                backend.kv.commit(chunk.seq_id, chunk.start, chunk.token_ids)

        prompt, adapted = opened(backend, 1, PROMPT), opened(backend, 2, PROMPT[::-1], "mine")
        step(prompt, adapted)
        step(Chunk(1, [7], len(PROMPT), "last"), Chunk(2, [8, 9], len(PROMPT), "all", "mine", 0.5))


def test_copies_of_pages_sent_ahead_of_a_step_leave_another_process_with_the_same_cache():
    with closing(HFBackend(FOLDER, SETTINGS, lambda _: None)) as backend, other_runner(FOLDER, SETTINGS) as other:
        other.run(backend.inputs([opened(backend, 1, PROMPT)]))
        backend.forward([Chunk(1, PROMPT, 0, "none")])
        backend.kv.commit(1, 0, PROMPT)
        again = opened(backend, 2, (*PROMPT[: PAGE + 5], 50, 51))
        assert again.start == PAGE + 5
        copies = [*backend._pages.copies.next().pages]
        assert copies

        other.run(copies)
        there = other.run(backend.inputs([again]))

        assert torch.equal(there, backend.forward([again]))


@pytest.mark.parametrize("dtype", ["f16", "q8", "q4"])
def test_pages_read_to_the_host_s_memory_come_back_bit_for_bit_to_other_places(dtype: CacheDtype):
    with closing(HFBackend(FOLDER, SETTINGS, lambda _: None)) as backend:
        formats = [replace(cache.format, dtype=dtype) for cache in backend.runner.caches]
        layers = [
            [LayerCache.allocate(format, 8, is_windowed=number % 2 == 1) for number, format in enumerate(formats)]
            for _ in range(2)
        ]
        for tensor in (tensor for cache in layers[0] for tensor in cache.stored):
            tensor.copy_(torch.randint(-100, 100, tensor.shape))
        here, there = map(backend.runner.beside, layers)
        saved = here.read_pages([3, 5, 7], [2, 6])
        assert len(saved) == sum((2 if cache.is_windowed else 3) * cache.format.page_bytes for cache in here.caches)

        there.write_pages(saved, (3, 2), [(0, 1), (2, 4)], [(1, 0)])

        for source, target in zip(here.caches, there.caches, strict=True):
            placed = {0: 6} if target.is_windowed else {1: 3, 4: 7}
            for before, after in zip(source.stored, target.stored, strict=True):
                for number in range(8):
                    expected = before[placed[number]] if number in placed else torch.zeros_like(after[number])
                    assert torch.equal(after[number], expected)


def test_runners_of_shared_weights_store_into_caches_of_their_own():
    with closing(HFBackend(FOLDER, SETTINGS, lambda _: None)) as backend:
        first = backend.runner
        second = first.beside([LayerCache.allocate(cache.format, len(cache.key_codes)) for cache in first.caches])
        inputs = backend.inputs([opened(backend, 1, PROMPT)])

        second.run(inputs)

        assert all(cache.key_codes.any() for cache in second.caches)
        assert not any(cache.key_codes.any() for cache in first.caches)
        assert second.model is first.model


def test_steps_have_fewer_threads_while_others_keep_the_machine_busy(monkeypatch: pytest.MonkeyPatch):
    # For nine of ten seconds others ran and we waited; then the machine idled.
    counted = iter([Counters(0, 0, 0, 0), Counters(1, 9, 0, 9), Counters(1, 9, 100, 9)])
    monkeypatch.setattr(sharing, "read_counters", lambda: next(counted))
    monkeypatch.setattr(sharing, "LOOK_EVERY_S", 0.0)
    given: list[int] = []
    monkeypatch.setattr(dispatch, "set_threads", given.append)
    settings = SETTINGS.model_copy(update={"threads": 2, "cache": CacheSettings(tokens=256, dtype="f16")})

    with closing(HFBackend(FOLDER, settings, lambda _: None)) as backend:
        for seq_id in (1, 2):
            backend.runner.run(backend.inputs([opened(backend, seq_id, PROMPT)]))

    assert given == [2, 1, 2]


def runner_of(caches: Sequence[LayerCache]) -> ModelRunner:
    """One whose model is never run."""
    model: Any = SimpleNamespace(layers=caches, forward=list, device=torch.device("cpu"), currents=[CurrentStep()])
    return ModelRunner(model, caches, {}, threads=Threads(1))


def test_every_step_brings_the_scratch_of_its_runner_along():
    scratch, seen = torch.empty(64, dtype=torch.uint8), []

    def forward(caches: object, token_ids: Tensor, step: StepLayout, *args: object) -> Tensor:
        seen.append(step.scratch)
        return torch.zeros(1, 3)

    model: Any = SimpleNamespace(
        layers=[],
        forward=forward,
        device=torch.device("cpu"),
        currents=[CurrentStep()],
        embedded=lambda token_ids: None,
    )
    runner = ModelRunner(model, [], {}, Threads(1), scratch)
    inputs = StepInputs(torch.zeros(5, dtype=torch.int64), step_of([(0, 5)], 1), (5,), torch.tensor([4]), None)

    for one in (runner, runner.beside([])):
        one.run(inputs)

    assert [found is scratch for found in seen] == [True, True]


def parts(cache: LayerCache) -> tuple[Tensor, ...]:
    return cache.key_codes, cache.key_scales, cache.value_codes, cache.value_scales


@pytest.mark.parametrize("dtype", ["f16", "q8", "q4"])
def test_copied_pages_hold_what_their_sources_held(dtype: Any) -> None:  # noqa: ANN401
    cache = LayerCache.allocate(CacheFormat(dtype, 2, 40), 6)
    for tensor in parts(cache):
        tensor.copy_(torch.randint(0, 100, tensor.shape))
    before = [tensor.clone() for tensor in parts(cache)]

    runner_of([cache]).copy_pages([(0, 3), (0, 4), (2, 5)], are_windowed=False)

    for tensor, old in zip(parts(cache), before, strict=True):
        assert torch.equal(tensor, old[[0, 1, 2, 0, 0, 2]])


class Calls(TorchDispatchMode):
    """Counts what torch is asked to compute, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def test_copying_pages_makes_its_tensors_of_numbers_once_for_all_layers():
    calls = []
    for num_layers in (1, 7):
        caches = [LayerCache.allocate(CacheFormat("q8", 1, 32), 4) for _ in range(num_layers)]
        with Calls() as counted:
            runner_of(caches).copy_pages([(0, 1), (2, 3)], are_windowed=False)
        calls.append(counted.counts)

    one, seven = calls
    assert {name for name in one if seven[name] > one[name]} == {"index", "index_put_"}
    assert seven["index"] == seven["index_put_"] == 7 * one["index"] == 7 * 4


def test_pages_are_copied_in_the_layers_of_their_kind_alone():
    full, windowed = (LayerCache.allocate(CacheFormat("f16", 1, 8), 2, is_windowed=kind) for kind in (False, True))
    for cache in (full, windowed):
        cache.key_codes[0] = 1

    runner_of([full, windowed]).copy_pages([(0, 1)], are_windowed=True)

    assert windowed.key_codes.all()
    assert not full.key_codes[1].any()


def test_kinds_of_layers_have_tables_of_their_own():
    plain, dynamic = (RopeSpec(kind, 4.0, 10_000.0, 16, 16, trained_len=64, window=512) for kind in ("none", "dynamic"))
    rotary = {name: RotarySets(spec, 512) for name, spec in {"full": dynamic, "sliding": plain}.items()}
    runner = ModelRunner(runner_of([]).model, [], rotary, threads=Threads(1))
    inputs: Any = SimpleNamespace(rope_lengths=(200,))

    tables = runner.tables(inputs)

    for name, spec in (("full", dynamic), ("sliding", plain)):
        angles = torch.arange(PAGE).outer(torch.from_numpy(spec.frequencies(200)[0]))
        torch.testing.assert_close(tables[name].places[tables[name].set_of[0]][:, 0], angles.cos())
