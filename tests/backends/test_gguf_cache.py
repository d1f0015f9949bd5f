"""The cache's bookkeeping against a plain model of it, over a pretend store and over llama.cpp's own."""

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from cells_driver import Driver
from checkout import ADAPTERS
from gguf_files import write_model

import tightrope.backends.gguf.entry_pool as pool_module
from tightrope.backends.errors import BackendError
from tightrope.backends.gguf import swap_space
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.gguf.cache import SharedKVCache
from tightrope.backends.protocol import Chunk, KVUsage
from tightrope.backends.reuse import Reuse
from tightrope.backends.settings import CacheSettings, ModelSettings

SEED = 20240917


def test_the_next_turn_of_a_chat_computes_only_what_is_new() -> None:
    driver = Driver()
    driver.run(1, range(20))
    driver.cache.close(1, keep=True)
    assert driver.run(2, range(30)) == 20
    assert driver.cache.usage() == KVUsage(64, 30, 0)  # the first turn was taken over, not copied


def test_the_same_prompt_again_runs_its_last_token_only() -> None:
    driver = Driver()
    driver.run(1, range(20))
    driver.cache.close(1, keep=True)
    assert driver.run(2, range(20)) == 19
    assert driver.cache.usage() == KVUsage(64, 20, 1)


def test_siblings_share_their_prompt_with_a_live_sequence() -> None:
    driver = Driver()
    driver.run(1, range(20))
    for seq_id in (2, 3, 4):
        assert driver.run(seq_id, range(20)) == 19
    assert driver.cache.usage() == KVUsage(64, 23, 0)


def test_namespaces_never_share() -> None:
    driver = Driver()
    driver.run(1, range(20), "alice")
    assert driver.run(2, range(20), "bob") == 0
    driver.cache.close(1, keep=True)
    assert driver.run(3, range(21), "bob") == 20
    assert driver.run(4, range(21), "alice") == 20


def test_a_reservation_that_can_not_be_met_changes_nothing() -> None:
    driver = Driver(capacity=64)
    driver.run(1, range(20))
    driver.cache.close(1, keep=True)
    driver.run(2, range(100, 150))
    before = driver.cache.usage()
    assert not driver.cache.reserve(2, 15)
    assert driver.cache.usage() == before
    assert driver.cache.reserve(2, 14)


def test_reserved_room_is_not_given_to_others() -> None:
    driver = Driver(capacity=64)
    driver.run(1, range(20))
    assert driver.cache.reserve(1, 30)
    driver.cache.open(2, range(100, 120), "")
    assert not driver.cache.reserve(2, 20)
    assert driver.extend(1, range(20, 30))
    assert not driver.cache.reserve(2, 20)  # 20 of the 30 are still reserved
    driver.cache.close(1, keep=True)
    assert driver.cache.reserve(2, 20)


def test_eviction_takes_the_end_of_the_least_recently_used_first() -> None:
    driver = Driver(capacity=64)
    for seq_id, start in ((1, 100), (2, 200)):
        driver.run(seq_id, range(start, start + 25))
        driver.cache.close(seq_id, keep=True)
    driver.run(3, range(300, 320))  # 6 short: the last 6 tokens of sequence 1 go
    assert driver.cache.usage() == KVUsage(64, 20, 44)
    driver.cache.close(3, keep=False)
    assert driver.cache.open(4, range(100, 125), "") == Reuse.prefix(19)
    assert driver.cache.open(5, range(200, 226), "") == Reuse.prefix(25)


def test_a_match_makes_a_kept_sequence_recent() -> None:
    driver = Driver(capacity=64)
    for seq_id, start in ((1, 100), (2, 200)):
        driver.run(seq_id, range(start, start + 25))
        driver.cache.close(seq_id, keep=True)
    assert driver.run(3, [*range(100, 110), 7]) == 10
    driver.cache.close(3, keep=False)
    driver.run(4, range(400, 430))  # 16 short: sequence 2 loses them, though 1 is older
    driver.cache.close(4, keep=False)
    assert driver.cache.open(5, range(100, 126), "") == Reuse.prefix(25)


def test_slots_that_run_out_are_taken_from_kept_sequences() -> None:
    driver = Driver(slots=3)
    for seq_id in range(8):
        driver.run(seq_id, [seq_id, 50, 51, 52])
        driver.cache.close(seq_id, keep=True)
    assert driver.cache.usage() == KVUsage(64, 0, 12)
    for seq_id in (5, 6, 7):
        assert driver.cache.open(seq_id, [seq_id, 50, 51, 52, 53], "") == Reuse.prefix(4)
    with pytest.raises(BackendError, match="slot"):
        driver.cache.open(9, [1, 2], "")


def test_the_source_of_a_match_survives_when_its_slot_is_the_only_one_left() -> None:
    driver = Driver(slots=2)
    driver.run(1, range(20))
    driver.cache.close(1, keep=True)
    driver.run(2, range(100, 110))
    assert driver.run(3, [*range(10), 99]) == 10  # no slot for a copy: the kept sequence is cut and continued
    assert driver.cache.usage() == KVUsage(64, 21, 0)


def test_what_another_sequence_holds_is_not_kept_twice() -> None:
    driver = Driver()
    driver.run(1, range(30))
    driver.run(2, [*range(20), 99])
    driver.cache.truncate(2, 20)
    driver.cache.close(2, keep=True)  # all of it is in sequence 1
    driver.cache.close(1, keep=True)
    assert driver.cache.usage() == KVUsage(64, 0, 30)
    assert len([cells for cells in driver.store.slots.values() if cells]) == 1


def test_the_bound_on_finished_sequences_holds() -> None:
    driver = Driver(capacity=64, max_reusable=16)
    for seq_id in range(3):
        driver.run(seq_id, range(100 * seq_id, 100 * seq_id + 10))
        driver.cache.close(seq_id, keep=True)
    assert driver.cache.usage() == KVUsage(64, 0, 16)
    assert driver.cache.open(9, range(100, 111), "") == Reuse.prefix(6)  # cut from its end; the one before went whole


def test_a_running_state_is_continued_from_its_end_or_not_at_all() -> None:
    driver = Driver(whole_only=True)
    driver.run(1, range(20))
    driver.cache.close(1, keep=True)
    assert driver.run(2, [*range(10), 99]) == 0
    assert driver.run(3, range(25)) == 20
    with pytest.raises(BackendError, match="go back"):
        driver.cache.truncate(3, 24)
    assert driver.cache.usage().used == 11  # what could not be rolled back is gone


def test_a_state_that_a_failed_step_moved_on_is_given_up() -> None:
    driver = Driver(whole_only=True)
    driver.run(1, range(10))
    assert driver.cache.reserve(1, 5)
    driver.store.append(driver.cache.slot(1), 3)
    driver.cache.forget_uncommitted([1])
    driver.cache.check_integrity()
    assert driver.cache.usage() == KVUsage(64, 0, 0)


def test_sliding_layers_that_lost_cells_are_not_matched_there() -> None:
    driver = Driver(swa_window=8)
    driver.run(1, range(30))
    driver.cache.close(1, keep=True)
    slot = next(slot for slot, cells in driver.store.slots.items() if cells)
    driver.store.first[slot] = 15  # llama.cpp gave the cells before to somebody else
    assert driver.cache.open(2, [*range(20), 99], "") == Reuse()
    assert driver.cache.open(3, [*range(23), 99], "") == Reuse.prefix(23)


def test_a_failed_step_leaves_no_trace() -> None:
    driver = Driver()
    driver.run(1, range(10))
    assert driver.cache.reserve(1, 5)
    driver.store.append(driver.cache.slot(1), 3)  # some of the step was stored before it failed
    driver.cache.forget_uncommitted([1])
    assert driver.store.num_cells() == 10
    driver.cache.close(1, keep=True)
    assert driver.cache.usage() == KVUsage(64, 0, 10)


def chat_that_is_swapped_out(monkeypatch: pytest.MonkeyPatch, **options: object) -> Driver:
    """A finished sequence of 40 tokens, and another one at work; 8 idle cells are allowed."""
    monkeypatch.setattr(pool_module, "MAX_IDLE_CELLS", 8)
    driver = Driver(capacity=128, swap_bytes=100, **options)
    driver.run(1, range(40))
    driver.cache.close(1, keep=True)
    driver.run(2, range(100, 120))
    return driver


def test_finished_sequences_leave_the_cache_while_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = chat_that_is_swapped_out(monkeypatch)
    assert driver.cache.usage() == KVUsage(128, 20, 0)
    assert driver.store.num_cells() == 20


def test_a_swapped_out_sequence_comes_back_for_the_prompt_that_continues_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = chat_that_is_swapped_out(monkeypatch)
    assert driver.run(3, range(50)) == 40
    assert driver.cache.usage() == KVUsage(128, 70, 0)


def test_a_swapped_out_sequence_of_another_namespace_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = chat_that_is_swapped_out(monkeypatch)
    assert driver.run(3, range(50), "other") == 0


def test_a_finished_sequence_stays_in_the_cache_while_nothing_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_IDLE_CELLS", 8)
    driver = Driver(capacity=128, swap_bytes=100)
    driver.run(1, range(40))
    driver.cache.close(1, keep=True)
    assert driver.cache.usage() == KVUsage(128, 0, 40)


def test_a_swapped_out_chat_stays_what_it_was_where_another_goes_on_from_its_middle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "MIN_RESTORE_GAIN", 1)
    driver = Driver(capacity=128, swap_bytes=200)
    driver.run(1, range(40))
    driver.cache.close(1, keep=True)
    branch = [*range(20), *range(500, 510)]
    assert driver.cache.open(2, branch, "", reproducible=True) == Reuse.prefix(20)
    assert driver.extend(2, branch[20:])
    driver.cache.close(2, keep=True)

    assert driver.cache.open(3, range(41), "", reproducible=True) == Reuse.prefix(40)


def test_a_chat_that_has_the_cache_to_itself_goes_on_in_its_own_cells() -> None:
    driver = Driver(capacity=128, swap_bytes=200)
    driver.run(1, range(40))
    cells = list(driver.store.slots[driver.cache.slot(1)])
    driver.cache.close(1, keep=True)

    assert driver.cache.open(2, range(50), "", reproducible=True) == Reuse.prefix(40)

    assert driver.store.slots[driver.cache.slot(2)] == cells


@pytest.mark.parametrize("others_end_first", [True, False])
def test_a_chat_that_others_ran_beside_is_laid_out_anew(others_end_first: bool) -> None:
    driver = Driver(capacity=128, swap_bytes=200)
    driver.run(1, range(20))
    driver.run(2, range(500, 510))
    driver.extend(1, range(20, 40))  # behind the other one's cells
    cells = list(driver.store.slots[driver.cache.slot(1)])
    for seq_id in (2, 1) if others_end_first else (1, 2):
        driver.cache.close(seq_id, keep=seq_id == 1)

    assert driver.cache.open(3, range(50), "", reproducible=True) == Reuse.prefix(40)

    assert driver.store.slots[driver.cache.slot(3)] != cells


def test_a_steady_prompt_finds_what_ran_in_large_steps_alone_and_leaves_one_to_run() -> None:
    driver = Driver(capacity=256, swap_bytes=1000, steady_tokens=8)
    driver.run(1, range(40))
    driver.extend(1, range(40, 45))
    driver.extend(1, range(45, 60))
    driver.cache.close(1, keep=True)

    for length, found in ((100, 40), (48, 40), (47, 39), (41, 33), (8, 0)):
        assert driver.cache.open(2, range(length), "", steady=True) == Reuse.prefix(found)
        driver.cache.close(2, keep=False)
        driver.run(1, range(40))
        driver.extend(1, range(40, 45))
        driver.cache.close(1, keep=True)


def test_what_ran_beside_others_is_not_steady() -> None:
    driver = Driver(capacity=256, swap_bytes=1000, steady_tokens=8)
    driver.run(1, range(20))
    driver.run(2, range(500, 520))
    driver.extend(1, range(20, 40))
    assert driver.cache.open(3, range(60), "", steady=True) == Reuse.prefix(40), "beside others all is found"
    for seq_id in (1, 2, 3):
        driver.cache.close(seq_id, keep=True)

    assert driver.cache.open(4, range(60), "", steady=True) == Reuse.prefix(20)


def test_steady_tokens_take_the_place_of_others_outside_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MIN_RESTORE_GAIN", 1)
    driver = Driver(capacity=2000, swap_bytes=5000, steady_tokens=8)
    driver.run(1, range(20))
    for place in range(20, 600, 5):
        driver.extend(1, range(place, place + 5))
    driver.cache.close(1, keep=True)

    for found, end in ((20, 600), (600, 700), (692, 700)):
        assert driver.cache.open(2, range(700), "", steady=True) == Reuse.prefix(found)
        driver.extend(2, range(found, end))
        driver.cache.close(2, keep=True)


def test_swapped_out_sequences_beyond_their_memory_go_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = chat_that_is_swapped_out(monkeypatch)  # 40 bytes of 100
    for seq_id, start in ((3, 200), (4, 300)):
        driver.run(seq_id, range(start, start + 40))
        driver.cache.close(seq_id, keep=True)
    assert driver.run(5, range(300, 345)) == 40
    assert driver.run(6, range(45)) == 0


def test_what_is_too_large_to_swap_out_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_IDLE_CELLS", 8)
    driver = Driver(capacity=128, swap_bytes=30)
    driver.run(1, range(40))
    driver.cache.close(1, keep=True)
    driver.run(2, range(100, 120))
    assert driver.cache.usage() == KVUsage(128, 20, 40)


@pytest.mark.parametrize("swap_bytes", [0, 60, 100_000])
@pytest.mark.parametrize("seed", range(12))
def test_random_operations_keep_every_count_exact(seed: int, swap_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts against the store's own cells, contents against what was said, after every one of 300 operations."""
    monkeypatch.setattr(pool_module, "MAX_IDLE_CELLS", 10)
    monkeypatch.setattr(pool_module, "MIN_RESTORE_GAIN", 1)
    rng = random.Random(SEED + seed)
    monkeypatch.setattr(swap_space, "PIECE", rng.choice((5, 256)))
    capacity, slots = rng.choice([(48, 4), (100, 6), (200, 16)])
    driver = Driver(capacity, slots, swap_bytes=swap_bytes)
    live: dict[int, tuple[str, list[int]]] = {}
    for seq_id in range(300):
        operation = rng.choice(("open", "open", "extend", "extend", "extend", "truncate", "close"))
        if operation == "open" and len(live) < slots:
            said = [rng.randrange(2) for _ in range(rng.randrange(1, 24))]  # two tokens: prefixes meet all the time
            namespace = rng.choice(("", "a"))
            found = driver.cache.open(seq_id, said, namespace).num_tokens
            assert 0 <= found < len(said)
            live[seq_id] = (namespace, said[:found])
        elif live:
            chosen = rng.choice(list(live))
            namespace, tokens = live[chosen]
            if operation == "extend":
                more = [rng.randrange(2) for _ in range(rng.randrange(1, 9))]
                before = driver.cache.usage()
                if driver.extend(chosen, more):
                    tokens += more
                else:
                    assert driver.cache.usage() == before
                    assert before.used + len(more) > capacity
            elif operation == "truncate":
                length = rng.randrange(len(tokens) + 1)
                driver.cache.truncate(chosen, length)
                del tokens[length:]
            elif operation == "close":
                driver.cache.close(chosen, keep=rng.random() < 0.7)
                del live[chosen]
        driver.cache.check_integrity()
        driver.check_told()
        usage = driver.cache.usage()
        assert usage.used + usage.reusable == driver.store.num_cells() <= capacity
        mine = [driver.store.slots.get(driver.cache.slot(seq_id), []) for seq_id in live]
        assert usage.used == len({id(cell) for cells in mine for cell in cells})
        assert [len(cells) for cells in mine] == [len(tokens) for _, tokens in live.values()]


@pytest.fixture(scope="module")
def small_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GGUFBackend]:
    """A tiny model in llama.cpp with a cache of 256 tokens for 3 sequences."""
    path = write_model(ADAPTERS / "llama-bf16", tmp_path_factory.mktemp("small") / "llama.gguf")
    cache = CacheSettings(tokens=256)
    settings = ModelSettings(max_model_len=200, max_num_seqs=3, step_tokens=32, threads=1, cache=cache)
    backend = GGUFBackend(path, settings, lambda _: None)
    yield backend
    backend.kv.check_integrity()
    backend.close()


def test_llama_cpp_finds_room_whenever_the_cache_said_so(small_backend: GGUFBackend) -> None:
    """Random use of a small real cache; a step fails if llama.cpp's cells and ours ever disagree."""
    rng = random.Random(SEED)
    cache = small_backend.kv
    assert isinstance(cache, SharedKVCache)
    live: dict[int, list[int]] = {}
    refused = 0
    for seq_id in range(160):
        if len(live) < 3:
            prompt = [rng.randrange(3) + 100 for _ in range(rng.randrange(2, 60))]
            live[seq_id] = prompt[: cache.open(seq_id, prompt, "").num_tokens]
        chosen = rng.choice(list(live))
        tokens = live[chosen]
        more = [rng.randrange(3) + 100 for _ in range(rng.randrange(1, 25))]
        if rng.random() < 0.2:
            length = rng.randrange(len(tokens) + 1)
            cache.truncate(chosen, length)
            del tokens[length:]
        if len(tokens) + len(more) > 200 or not cache.reserve(chosen, len(more)):
            refused += 1
            cache.close(chosen, keep=rng.random() < 0.8)
            del live[chosen]
            continue
        small_backend.forward([Chunk(chosen, more, len(tokens), "last")])
        cache.commit(chosen, len(tokens), more)
        cache.check_integrity()
        tokens += more
    assert refused > 5
    for seq_id in live:
        cache.close(seq_id, keep=False)


def test_a_chat_that_was_swapped_out_goes_on_as_if_it_had_stayed(
    small_backend: GGUFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "MAX_IDLE_CELLS", 0)
    cache = small_backend.kv
    assert isinstance(cache, SharedKVCache)

    def run(seq_id: int, token_ids: Sequence[int]) -> tuple[int, torch.Tensor]:
        found = cache.open(seq_id, token_ids, "swapped").num_tokens
        assert cache.reserve(seq_id, len(token_ids) - found)
        logits = torch.empty(0)
        for start in range(found, len(token_ids), 32):
            part = token_ids[start : start + 32]
            logits = small_backend.forward([Chunk(seq_id, part, start, "last")]).clone()
            cache.commit(seq_id, start, part)
        return found, logits

    chat = [100 + 3 * i for i in range(90)]
    run(1000, chat[:80])
    cache.close(1000, keep=True)
    stayed = run(1001, chat)
    cache.close(1001, keep=False)
    run(1002, chat[:80])
    cache.close(1002, keep=True)
    run(1003, [400 + i for i in range(50)])  # the chat is swapped out
    assert cache.usage().reusable == 0
    swapped = run(1004, chat)
    assert stayed[0] == swapped[0] == 80
    assert torch.equal(stayed[1], swapped[1])
    cache.close(1003, keep=False)
    cache.close(1004, keep=False)
