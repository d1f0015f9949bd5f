"""A model in two ranks of this CPU gives the bits of one: steps, caches of every type, moved pages, stored chats."""

import itertools
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import get_args

import psutil
import pytest
import torch
from checkout import ADAPTERS
from torch import Tensor

from tightrope.backends.errors import BackendError, DeviceLost
from tightrope.backends.hf.backend import SOURCE, HFBackend
from tightrope.backends.hf.ranks.team import Team, shared_out
from tightrope.backends.protocol import Chunk
from tightrope.backends.settings import CacheSettings, ModelSettings, RopeSettings
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layout import PAGE, CacheDtype

FOLDER, ADAPTER = ADAPTERS / "llama-bf16", ADAPTERS / "llama-lora-r4"
SETTINGS = ModelSettings(
    max_model_len=512,
    max_num_seqs=4,
    threads=2,
    device="cpu",
    cache=CacheSettings(tokens=2048, dtype="q8"),
    adapters={"first": str(ADAPTER)},
    adapter_folder=str(ADAPTERS),
)
PROMPT, OTHER = tuple(range(5, 45)), tuple(range(60, 20, -1))
PATIENCE_S = 240

_fresh_ids = itertools.count()


def in_ranks(count: int, settings: ModelSettings = SETTINGS) -> HFBackend:
    return HFBackend(FOLDER, settings.model_copy(update={"tensor_parallel": count}), lambda _: None)


@contextmanager
def both_with(settings: ModelSettings) -> Iterator[tuple[HFBackend, HFBackend]]:
    """The model in one rank and in two."""
    with closing(in_ranks(1, settings)) as one, closing(in_ranks(2, settings)) as two:
        yield one, two


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[HFBackend, HFBackend]]:
    with both_with(SETTINGS) as backends:
        yield backends


def run(backend: HFBackend, token_ids: Sequence[int], adapter: str | None = None, namespace: str = "") -> Tensor:
    """Logits of all rows that weren't found in the cache, where all stays that was run."""
    seq_id = next(_fresh_ids)
    found = backend.kv.open(seq_id, token_ids, f"{namespace} {adapter}").num_tokens
    assert backend.kv.reserve(seq_id, len(token_ids) - found)
    chunk = Chunk(seq_id, token_ids[found:], found, "all", adapter, 0.5)
    logits = backend.forward([chunk]).clone()
    backend.kv.commit(seq_id, found, chunk.token_ids)
    backend.kv.close(seq_id, keep=True)
    return logits


def decoded(backend: HFBackend, prompts: Sequence[Sequence[int]], num_steps: int) -> Tensor:
    """Logits of prompts, and of steps side by side behind them."""
    seq_ids, logits = [next(_fresh_ids) for _ in prompts], []
    for step in range(num_steps + 1):
        chunks = [
            Chunk(seq_id, [6 + step] if step else prompt, len(prompt) + step - 1 if step else 0, "last")
            for seq_id, prompt in zip(seq_ids, prompts, strict=True)
        ]
        for chunk in chunks:
            if not step:
                backend.kv.open(chunk.seq_id, chunk.token_ids, "", reuse="nothing")
            assert backend.kv.reserve(chunk.seq_id, len(chunk.token_ids))
        logits.append(backend.forward(chunks).clone())
        for chunk in chunks:
            backend.kv.commit(chunk.seq_id, chunk.start, chunk.token_ids)
    for seq_id in seq_ids:
        backend.kv.close(seq_id, keep=False)
    return torch.cat(logits)


Both = tuple[HFBackend, HFBackend]


def test_prompts_and_steps_side_by_side_give_the_logits_of_one_rank(both: Both):
    one, two = (decoded(backend, (PROMPT, OTHER), 3) for backend in both)

    assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_scaled_positions_give_the_logits_of_one_rank(kind: str):
    rope = RopeSettings.model_validate({"kind": kind, "factor": 2.0})
    with both_with(SETTINGS.model_copy(update={"rope": rope, "max_model_len": 0})) as backends:
        one, two = (decoded(backend, (PROMPT, OTHER), 1) for backend in backends)

        assert torch.equal(one, two)


def test_pages_copied_on_write_are_copied_by_every_rank(both: Both):
    shared = (*PROMPT[: PAGE + 5], 50, 51)
    for backend in both:
        run(backend, PROMPT)

    one, two = (run(backend, shared) for backend in both)

    assert len(one) == 2
    assert torch.equal(one, two)


def test_a_moved_run_of_cached_tokens_gives_the_logits_of_one_rank(both: Both):
    """The oldest message of a chat goes, and what stood behind it is moved."""
    system, oldest, second, new = (list(range(*ends)) for ends in ((10, 40), (100, 170), (200, 350), (400, 420)))
    found = []
    for backend in both:
        run(backend, [*system, *oldest, *second], namespace="moved")
        prompt, seq_id = [*system, *second, *new], next(_fresh_ids)
        reuse = backend.kv.open(seq_id, prompt, "moved None", reuse="moved")
        assert reuse.num_inexact
        missing = reuse.missing(len(prompt))
        assert backend.kv.reserve(seq_id, sum(map(len, missing)))
        chunks = [Chunk(seq_id, prompt[part.start : part.stop], part.start, "all") for part in missing]
        found.append(backend.forward(chunks).clone())
        backend.kv.close(seq_id, keep=False)

    assert torch.equal(*found)


def test_stored_pages_are_the_same_bytes_for_any_number_of_ranks_and_are_read_by_any(both: Both):
    one, two = both
    for backend in both:
        run(backend, PROMPT)
    pages = [1, 0, 2]

    read = [torch.from_numpy(backend.read_pages(pages, [])) for backend in both]

    assert read[0].any()
    assert torch.equal(*read)
    assert one._form(one._part.own.plan) == two._form(two._part.own.plan)
    two.write_pages(read[0].numpy(), (3, 0), [(0, 120), (2, 121)], [])
    assert torch.equal(torch.from_numpy(two.read_pages([120, 0, 121], [])), read[0])


@pytest.fixture
def batch_invariant() -> Iterator[ModelSettings]:
    """Settings whose kernels are so, in this process until the test has ended."""
    yield SETTINGS.model_copy(update={"batch_invariant": True})
    dispatch.set_batch_invariant(is_wanted=SETTINGS.batch_invariant)


def test_a_chat_that_two_ranks_have_stored_is_found_on_disk_by_one(tmp_path: Path, batch_invariant: ModelSettings):
    cache = CacheSettings(tokens=512, dtype="q8", session_dir=str(tmp_path))
    chat = (*PROMPT, *OTHER)
    settings = batch_invariant.model_copy(update={"cache": cache})
    with closing(in_ranks(2, settings)) as two:
        logits = run(two, chat)
        two.kv.leave(chat, " None")
    with closing(in_ranks(1, settings)) as one:
        again = run(one, chat)

        assert 0 < len(again) <= len(chat) - PAGE
        assert torch.equal(again, logits[-len(again) :])


def test_adapters_loaded_at_the_start_and_later_give_the_logits_of_one_rank(both: Both):
    for backend in both:
        backend.adapters.prepare("later", ADAPTER)()
    for name in ("first", "later"):
        one, two = (run(backend, PROMPT, name) for backend in both)
        assert torch.equal(one, two)
    for backend in both:
        backend.adapters.remove("later")
    one, two = (run(backend, OTHER) for backend in both)
    assert torch.equal(one, two)


def test_an_adapter_that_does_not_fit_the_model_is_refused_and_the_ranks_go_on(both: Both):
    with pytest.raises(BackendError):
        both[1].adapters.prepare("wrong", ADAPTERS)

    one, two = (run(backend, PROMPT, namespace="on") for backend in both)
    assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", get_args(CacheDtype))
def test_caches_of_every_type_beside_the_weights_give_the_logits_of_one_rank(both: Both, dtype: CacheDtype):
    found = []
    for backend in both:
        seq_id = next(_fresh_ids)
        backend.kv.open(seq_id, PROMPT, "", reuse="nothing")
        assert backend.kv.reserve(seq_id, len(PROMPT))
        chunk = Chunk(seq_id, PROMPT, 0, "all")
        backend.forward([chunk])
        variants = backend.variants()
        found.append(variants.variant([dtype] * variants.num_layers).forward([chunk]).clone())
        backend.kv.close(seq_id, keep=False)

    assert torch.equal(*found)


def test_threads_are_shared_out_and_none_has_none():
    assert [shared_out(5, 2), shared_out(2, 2), shared_out(1, 3)] == [[3, 2], [1, 1], [1, 1, 1]]


def test_a_model_with_too_little_memory_in_two_ranks_is_refused_in_one_line_and_leaves_no_process():
    before = psutil.Process().children()
    settings = SETTINGS.model_copy(update={"cache": CacheSettings(tokens=1 << 30)})

    with pytest.raises(BackendError) as raised:
        in_ranks(2, settings)

    assert "\n" not in str(raised.value)
    assert not set(psutil.Process().children()) - set(before)


def test_a_rank_that_ends_tells_the_first_one_whose_next_step_finds_the_device_lost():
    lost: list[str] = []
    is_lost = threading.Event()

    def on_lost(reason: str) -> None:
        lost.append(reason)
        is_lost.set()

    team = Team(FOLDER, SETTINGS, [torch.device("cpu")] * 2, SOURCE, on_lost)
    with closing(team):
        team.make_plan(SETTINGS)
        team.load(lambda _: None)
        os.kill(team.ranks.processes[0].pid, signal.SIGKILL)
        assert is_lost.wait(PATIENCE_S)

        assert lost == ["rank 1 of 2 was killed by SIGKILL"]
        with pytest.raises(DeviceLost, match="rank 1 of 2 is gone"):
            team.adapters.remove("any")


def test_a_rank_that_ends_while_it_loads_is_an_error_of_the_load():
    team = Team(FOLDER, SETTINGS, [torch.device("cpu")] * 2, SOURCE)
    with closing(team):
        os.kill(team.ranks.processes[0].pid, signal.SIGKILL)

        with pytest.raises(BackendError, match="rank 1 of 2 was killed by SIGKILL"):
            team.make_plan(SETTINGS)
