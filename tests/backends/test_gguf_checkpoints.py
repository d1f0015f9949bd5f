"""Models that can't drop a sequence's last tokens: how far a prompt that parts from an earlier one goes back."""

import random
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from cells_driver import Driver
from gguf_models import gemma
from recurrent_gguf import TURN_END, write_lfm2, write_mamba

from tightrope.backends.errors import BackendError
from tightrope.backends.gguf import rollback
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.gguf.cache import SharedKVCache
from tightrope.backends.gguf.checkpoints import Checkpoint, Checkpoints, places_to_save
from tightrope.backends.protocol import Chunk
from tightrope.backends.settings import CacheSettings, ModelSettings

SEED = 20261129
STEP = 128
_ids = count(1)


class Chats:
    """Prompts and answers of random tokens on a loaded model."""

    def __init__(self, backend: GGUFBackend) -> None:
        cache = backend.kv
        assert isinstance(cache, SharedKVCache)
        self.backend, self.cache = backend, cache
        self._rng = random.Random(SEED)

    def tokens(self, length: int) -> list[int]:
        return [self._rng.randrange(110, 200) for _ in range(length)]

    def ask(self, prompt: Sequence[int], namespace: str, answer: Sequence[int] = ()) -> tuple[int, torch.Tensor]:
        """How many tokens of a prompt are reused, and the logits after it; the answer is added one by one."""
        seq_id = next(_ids)
        logits, found = self.begin(seq_id, prompt, namespace)
        for place, token_id in enumerate(answer, len(prompt)):
            self.run(seq_id, [token_id], place)
        self.cache.close(seq_id, keep=True)
        self.cache.check_integrity()
        return found, logits

    def begin(self, seq_id: int, prompt: Sequence[int], namespace: str) -> tuple[torch.Tensor, int]:
        found = self.cache.open(seq_id, prompt, namespace).num_tokens
        logits = torch.empty(0)
        for start in range(found, len(prompt), STEP):
            logits = self.run(seq_id, prompt[start : start + STEP], start)
        return logits, found

    def run(self, seq_id: int, token_ids: Sequence[int], start: int) -> torch.Tensor:
        assert self.cache.reserve(seq_id, len(token_ids))
        logits = self.backend.forward([Chunk(seq_id, token_ids, start, "last")]).clone()
        self.cache.commit(seq_id, start, token_ids)
        return logits

    def cells_found(self, prompt: Sequence[int], namespace: str, expected: int) -> np.ndarray:
        """llama.cpp's cells of what a prompt finds, in the order of their positions."""
        seq_id = next(_ids)
        assert self.cache.open(seq_id, prompt, namespace).num_tokens == expected
        cells = self.backend._context.save_cells(self.cache.slot(seq_id)).copy()
        self.cache.close(seq_id, keep=True)
        return cells


def chats(path: Path, **settings: object) -> Iterator[Chats]:
    cache = CacheSettings(tokens=8192)
    values = {"max_model_len": 4096, "max_num_seqs": 4, "step_tokens": 256, "threads": 1, "cache": cache, **settings}
    backend = GGUFBackend(path, ModelSettings.model_validate(values), lambda _: None)
    yield Chats(backend)
    backend.close()


@pytest.fixture(scope="module", params=[write_mamba, write_lfm2], ids=["recurrent", "hybrid"])
def recurrent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chats]:
    yield from chats(request.param(tmp_path_factory.mktemp("recurrent") / "model.gguf"))


@pytest.fixture(scope="module")
def sliding() -> Iterator[Chats]:
    """Gemma 3, most of whose layers see 512 tokens."""
    yield from chats(gemma(), threads=2)


def test_a_swipe_on_a_recurrent_model_runs_the_last_token_of_its_prompt_only(recurrent: Chats) -> None:
    prompt = recurrent.tokens(999)
    _, first = recurrent.ask(prompt, "swipe", recurrent.tokens(100))
    for _ in range(3):
        found, logits = recurrent.ask(prompt, "swipe", recurrent.tokens(20))
        assert found == 998
        assert torch.equal(logits, first)  # A state is copied bit for bit.


def test_an_answer_that_was_trimmed_goes_back_to_the_end_of_its_prompt(recurrent: Chats) -> None:
    prompt, answer = recurrent.tokens(999), recurrent.tokens(100)
    recurrent.ask(prompt, "trim", answer)
    found, logits = recurrent.ask([*prompt, *answer[:99]], "trim")
    cold, expected = recurrent.ask([*prompt, *answer[:99]], "trimmed, cold")
    assert (found, cold) == (998, 0)
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-3)


def test_the_next_turn_goes_on_where_the_answer_ended(recurrent: Chats) -> None:
    prompt, answer = recurrent.tokens(300), recurrent.tokens(50)
    recurrent.ask(prompt, "turn", answer)
    assert recurrent.ask([*prompt, *answer, *recurrent.tokens(40)], "turn")[0] == 350


def test_an_edited_message_goes_back_to_where_it_began(recurrent: Chats) -> None:
    """In a prompt never seen before, by the tokens that end a turn; in a chat that goes on, also by where it ended."""
    history = [*recurrent.tokens(400), TURN_END, *recurrent.tokens(60), TURN_END]
    recurrent.ask([*history, *recurrent.tokens(80), TURN_END, 5, 6], "edit")
    assert recurrent.ask([*history, *recurrent.tokens(80), TURN_END, 5, 6], "edit")[0] == len(history)

    prompt, answer = recurrent.tokens(300), recurrent.tokens(50)
    recurrent.ask(prompt, "edit", answer)
    recurrent.ask([*prompt, *answer, *recurrent.tokens(40)], "edit")
    assert recurrent.ask([*prompt, *answer, *recurrent.tokens(40)], "edit")[0] == 350


def test_where_two_prompts_parted_a_third_begins(recurrent: Chats) -> None:
    common = recurrent.tokens(500)
    assert recurrent.ask([*common, *recurrent.tokens(90)], "fork")[0] == 0
    assert recurrent.ask([*common, *recurrent.tokens(90)], "fork")[0] == 0
    assert recurrent.ask([*common, *recurrent.tokens(90)], "fork")[0] == 500


def test_answers_to_the_prompt_of_a_live_sequence_share_it(recurrent: Chats) -> None:
    prompt = recurrent.tokens(200)
    first, second = next(_ids), next(_ids)
    logits, _ = recurrent.begin(first, prompt, "n=2")
    recurrent.run(first, [7], 200)
    again, found = recurrent.begin(second, prompt, "n=2")
    assert found == 199
    assert torch.equal(logits, again)
    for seq_id in (first, second):
        recurrent.cache.close(seq_id, keep=False)


def test_several_prompts_in_one_step_are_saved_each_at_its_own_end(recurrent: Chats) -> None:
    prompts = [recurrent.tokens(length) for length in (50, 70, 40)]
    seq_ids = [next(_ids) for _ in prompts]
    for seq_id, prompt in zip(seq_ids, prompts, strict=True):
        recurrent.cache.open(seq_id, prompt, "step")
        assert recurrent.cache.reserve(seq_id, len(prompt))
    chunks = [Chunk(seq_id, prompt, 0, "all") for seq_id, prompt in zip(seq_ids, prompts, strict=True)]
    logits = recurrent.backend.forward(chunks).clone()
    assert logits.shape[0] == 160
    ends = [49, 119, 159]
    for seq_id, prompt in zip(seq_ids, prompts, strict=True):
        recurrent.cache.commit(seq_id, 0, prompt)
    for seq_id in seq_ids:
        recurrent.cache.close(seq_id, keep=True)
    for prompt, end in zip(prompts, ends, strict=True):
        found, again = recurrent.ask(prompt, "step")
        assert found == len(prompt) - 1
        torch.testing.assert_close(again[0], logits[end], rtol=0, atol=5e-3)


def test_a_chat_that_was_swapped_out_goes_back_as_well(recurrent: Chats) -> None:
    prompt = recurrent.tokens(600)
    _, first = recurrent.ask(prompt, "swapped", recurrent.tokens(64))
    recurrent.cache._swap_out_idle(0)  # One without keys and values has no cells to free, and stays.
    found, logits = recurrent.ask(prompt, "swapped")
    assert found == 599
    assert torch.equal(logits, first)


def test_tokens_taken_back_lead_to_the_end_of_the_prompt(recurrent: Chats) -> None:
    """A banned string makes the engine take tokens back; it then begins again from what is kept."""
    prompt, seq_id = recurrent.tokens(100), next(_ids)
    recurrent.begin(seq_id, prompt, "ban")
    recurrent.run(seq_id, [5, 6, 7], 100)
    with pytest.raises(BackendError, match="can't go back to token 101"):
        recurrent.cache.truncate(seq_id, 101)
    recurrent.cache.close(seq_id, keep=True)
    recurrent.cache.check_integrity()
    assert recurrent.ask([*prompt, 5, 9], "ban")[0] == 99


def test_namespaces_have_checkpoints_of_their_own(recurrent: Chats) -> None:
    prompt = recurrent.tokens(100)
    recurrent.ask(prompt, "alice", [1])
    assert recurrent.ask(prompt, "bob", [1])[0] == 0


@pytest.mark.slow
def test_a_sliding_chat_that_was_swapped_out_is_continued_only_where_its_layers_can(sliding: Chats) -> None:
    """What a copy holds of sliding layers is their window at its end."""
    prompt = sliding.tokens(600)
    sliding.ask(prompt, "swapped", [101, 102, 103])
    stayed = sliding.cells_found(prompt, "swapped", 599)
    sliding.cache._swap_out_idle(0)
    assert np.array_equal(sliding.cells_found(prompt, "swapped", 599), stayed)

    sliding.cache._swap_out_idle(0)
    assert sliding.ask([*prompt[:540], *prompt[:30]], "swapped")[0] == 0  # The layers have left it.
    sliding.cache._swap_out_idle(0)
    assert sliding.ask([*prompt[:540], *prompt[50:80]], "swapped")[0] == 540


def test_a_sliding_chat_in_the_cache_is_swiped_and_trimmed_freely(sliding: Chats) -> None:
    prompt, answer = sliding.tokens(200), sliding.tokens(4)
    sliding.ask(prompt, "in cache", answer)
    assert sliding.ask(prompt, "in cache")[0] == 199
    assert sliding.ask([*prompt, *answer[:2], 9], "in cache")[0] == 202


def test_states_are_saved_before_the_last_token_at_ends_of_turns_and_where_prompts_parted() -> None:
    prompt = np.array([*range(100, 300), 2, *range(100, 200), 2, *range(100, 180), 2, 5, 6], np.int32)
    # The last turn ends 2 before the last token: where that is saved, a place so close before it is of no use.
    assert places_to_save(prompt, 0, 120, {2}, 32) == [120, 302, 384]
    assert places_to_save(prompt, 0, 380, {2}, 32) == [302, 380, 384]
    assert places_to_save(prompt, 0, 120, {2}, 303) == [384]
    assert places_to_save(prompt, 280, 120, {2}, 32) == [384]
    assert places_to_save(prompt, 384, 120, {2}, 32) == []
    assert places_to_save(prompt[:20], 0, 10, {2}, 32) == []


def test_checkpoints_keep_to_their_memory_and_the_least_used_go_first() -> None:
    held = Checkpoints(3 * (100 + 4 * 40))
    made = [Checkpoint("", np.arange(start, start + 40, dtype=np.int32), np.zeros(100, np.uint8)) for start in range(4)]
    for checkpoint in made[:3]:
        held.put(checkpoint)
    held.use(made[0])
    held.put(made[3])
    assert [held.at(checkpoint.token_ids, "") for checkpoint in made] == [made[0], None, made[2], made[3]]
    held.put(Checkpoint("", np.arange(9, dtype=np.int32), np.zeros(10_000, np.uint8)))
    assert [held.at(checkpoint.token_ids, "") for checkpoint in made] == [made[0], None, made[2], made[3]]


@pytest.mark.parametrize("kind", [{"whole_only": True}, {"swa_window": 5}], ids=["recurrent", "sliding"])
@pytest.mark.parametrize("swap_bytes", [0, 100])
@pytest.mark.parametrize("seed", range(8))
def test_random_operations_keep_states_where_the_tokens_end(
    seed: int, swap_bytes: int, kind: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of 300 operations the books are right, and what a sequence needs of its layers is there."""
    monkeypatch.setattr(rollback, "MIN_PLACE", 3)
    monkeypatch.setattr("tightrope.backends.gguf.checkpoints.MIN_PLACE", 3)
    monkeypatch.setattr("tightrope.backends.gguf.entry_pool.MIN_RESTORE_GAIN", 1)
    rng = random.Random(SEED + seed)
    capacity, slots = rng.choice([(60, 4), (120, 6)])
    driver = Driver(capacity, slots, swap_bytes=swap_bytes, checkpoint_bytes=600, turn_ends=lambda: {1}, **kind)
    store, live = driver.store, dict[int, list[int]]()
    for seq_id in range(300):
        operation = rng.choice(("open", "open", "extend", "extend", "lose", "truncate", "close"))
        if operation == "open" and len(live) < slots - 1:
            prompt = [rng.randrange(2) for _ in range(rng.randrange(2, 24))]
            found = driver.cache.open(seq_id, prompt, "").num_tokens
            live[seq_id] = prompt[:found]
            if driver.extend(seq_id, prompt[found:]):
                live[seq_id] = prompt
        elif operation == "lose" and store.window:  # llama.cpp gives cells that sliding layers have left to others.
            for slot, cells in store.slots.items():
                store.first[slot] = max(store.first_position(slot), len(cells) - store.window, 0)
        elif live:
            chosen = rng.choice(list(live))
            if operation == "extend" and driver.extend(chosen, more := [rng.randrange(2) for _ in range(3)]):
                live[chosen] = [*live[chosen], *more]
            elif operation == "truncate":
                length = rng.randrange(len(live[chosen]) + 1)
                try:
                    driver.cache.truncate(chosen, length)
                    live[chosen] = live[chosen][:length]
                except BackendError:
                    driver.cache.close(chosen, keep=True)
                    del live[chosen]
            elif operation == "close":
                driver.cache.close(chosen, keep=rng.random() < 0.8)
                del live[chosen]
        driver.cache.check_integrity()
        assert driver.cache.usage().used + driver.cache.usage().reusable >= store.num_cells()
        for open_id, tokens in live.items():
            slot = driver.cache.slot(open_id)
            assert len(store.slots.get(slot, [])) == len(tokens)
            first = store.first_position(slot)
            assert first == len(tokens) - 1 if store.keeps_state else first <= max(0, len(tokens) - store.window)
    assert store.loaded > 3 or store.window
