"""What stands behind a removed message in llama.cpp's cache is moved; what can't be is computed."""

import random
from collections.abc import Collection, Iterator, Sequence
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from cells_driver import Driver
from checkout import ADAPTERS
from gguf import GGUFWriter
from gguf_files import write_model
from pages_driver import EagerStore

from tightrope.backends.files.gguf.header import read_header
from tightrope.backends.gguf import swap_space
from tightrope.backends.gguf.backend import GGUFBackend
from tightrope.backends.gguf.layout import Memory
from tightrope.backends.gguf.plan import make_plan, without_moves
from tightrope.backends.protocol import Chunk
from tightrope.backends.reuse import Reuse, Run, Wanted
from tightrope.backends.sessions.piece import Bytes, Piece
from tightrope.backends.settings import ModelSettings

SEED = 20261129
GIB = 1 << 30
SYSTEM, OLD, REST = range(100, 140), range(1000, 1050), range(2000, 2100)
CHAT = [*SYSTEM, *OLD, *REST]
_ids = count(1)


def driver(capacity: int = 512, slots: int = 6, **options: object) -> Driver:
    made = Driver(capacity, slots, can_move=True, **options)
    made.run(1, CHAT)
    made.cache.close(1, keep=True)
    return made


def test_what_stands_behind_a_removed_message_is_moved() -> None:
    chats = driver()
    prompt = [*SYSTEM, *REST, *range(3000, 3020)]
    found = chats.cache.open(2, prompt, "", reuse="moved")
    assert found == Reuse((Run(0, 0, 40), Run(90, 40, 100, is_exact=False)))
    assert found.missing(len(prompt)) == [range(140, 160)]
    assert chats.extend(2, prompt[140:])
    assert chats.store.num_cells() == 160  # Nothing was copied.


def test_several_removals_count() -> None:
    chats = driver()
    prompt = [*SYSTEM, *REST[:40], *REST[60:], 7]
    found = chats.cache.open(2, prompt, "", reuse="moved")
    assert found == Reuse((Run(0, 0, 40), Run(90, 40, 40, is_exact=False), Run(150, 80, 40, is_exact=False)))
    assert chats.extend(2, [7])


@pytest.mark.parametrize(
    "prompt",
    [
        [*SYSTEM, *range(5000, 5020), *OLD, *REST],
        [*SYSTEM, *range(5000, 5050), *REST],
        [*range(6000, 6040), *REST],
        [*SYSTEM[:10], *REST],
        [*SYSTEM, *REST[:50], 9],
    ],
    ids=["an insertion", "a change", "another system message", "too short a one", "too little to gain"],
)
def test_only_what_is_behind_a_removal_is_moved(prompt: list[int]) -> None:
    chats = driver()
    found = chats.cache.open(2, prompt, "", reuse="moved")
    assert all(run.is_exact for run in found.runs)
    assert found.num_tokens <= 40


def test_what_is_found_by_moving_is_taken_only_if_the_engine_accepts_it() -> None:
    chats = driver()
    offers: list[Reuse] = []

    def refuse(offer: Reuse) -> int:
        offers.append(offer)
        return 0

    prompt = [*SYSTEM, *REST, 7]
    assert chats.cache.open(2, prompt, "", reuse="moved", accepts=refuse) == Reuse.prefix(40)
    assert offers == [Reuse((Run(0, 0, 40), Run(90, 40, 100, is_exact=False)))]
    chats.cache.close(2, keep=False)
    assert chats.run(3, [*CHAT, 5]) == 190  # Nothing was changed.


def test_moved_tokens_are_taken_as_far_as_the_engine_accepts_them() -> None:
    chats = driver()
    prompt = [*SYSTEM, *REST[:70], *REST[80:], 7]
    found = chats.cache.open(2, prompt, "", reuse="moved", accepts=lambda offer: offer.removals()[-1])
    assert found == Reuse((Run(0, 0, 40), Run(90, 40, 70, is_exact=False)))
    assert chats.extend(2, prompt[110:])


def test_the_exact_beginning_of_a_moved_chat_stays_where_more_of_it_is_refused() -> None:
    chats = driver()
    chats.cache.open(2, [*SYSTEM, *REST, 7], "", reuse="moved")
    chats.extend(2, [7])
    chats.cache.close(2, keep=True)
    prompt = [*SYSTEM, *REST[80:], *REST[:80], *REST[80:], 8]
    assert chats.cache.open(3, prompt, "", reuse="moved", accepts=lambda offer: 0) == Reuse.prefix(40)


def test_a_chat_that_was_computed_again_takes_the_place_of_the_moved_one() -> None:
    chats = driver()
    moved = [*SYSTEM, *REST, *range(3000, 3020)]
    chats.run(2, moved, reuse="moved")
    chats.cache.close(2, keep=True)
    assert chats.run(3, moved) == 40
    chats.cache.close(3, keep=True)
    assert chats.store.num_cells() == 160
    assert chats.cache.open(4, [*moved, 8], "", reuse="moved") == Reuse.prefix(160)


def test_exact_prompts_and_other_namespaces_find_nothing_moved() -> None:
    chats = driver()
    moved = [*SYSTEM, *REST, *range(3000, 3020)]
    assert chats.run(2, moved, reuse="moved") == 140
    chats.cache.close(2, keep=True)
    assert chats.run(3, [*moved, 8]) == 40
    assert chats.cache.open(4, [*moved, 8], "other", reuse="moved") == Reuse()
    assert chats.cache.open(5, [*moved, 8], "", reuse="moved") == Reuse(
        (Run(0, 0, 40), Run(40, 40, 120, is_exact=False))
    )


def test_copies_of_moved_tokens_outside_the_cache_are_found_by_those_alone_that_take_them() -> None:
    chats = driver(swap_bytes=2000)
    moved = [*SYSTEM, *REST, *range(3000, 3020)]
    chats.run(2, moved, reuse="moved")
    chats.cache.close(2, keep=True)
    chats.cache._swap_out_idle(0)
    assert chats.cache.usage().reusable == 0
    assert chats.run(3, [*moved, 8]) == 0
    chats.cache.close(3, keep=False)
    assert chats.run(4, [*moved, 8], reuse="moved") == 160


@pytest.mark.parametrize("piece", [16, 256])
@pytest.mark.parametrize("slots", [1, 6])
def test_the_exact_beginning_of_a_moved_chat_that_comes_back_stays_where_more_of_it_is_refused(
    slots: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap_space, "PIECE", piece)
    chats = driver(slots=slots, swap_bytes=2000)
    chats.run(2, [*SYSTEM, *REST, 7], reuse="moved")
    chats.cache.close(2, keep=True)
    chats.cache._swap_out_idle(0)
    prompt = [*SYSTEM, *REST[10:], 8]
    offers: list[Reuse] = []

    def refuse(offer: Reuse) -> int:
        offers.append(offer)
        return 0

    assert chats.cache.open(4, prompt, "", reuse="moved", accepts=refuse) == Reuse.prefix(40)
    assert [(run.start, run.length, run.is_exact) for run in offers[0].runs] == [(0, 40, True), (40, 90, False)]
    assert chats.extend(4, prompt[40:])
    chats.cache.check_integrity()


@pytest.mark.parametrize("piece", [16, 256])
def test_a_chat_outside_the_cache_that_lost_its_oldest_message_comes_back_to_be_moved(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap_space, "PIECE", piece)
    chats = driver(swap_bytes=2000)
    other = [*SYSTEM, *range(7000, 7100)]  # Another chat with the same system message.
    chats.run(2, other)
    chats.cache.close(2, keep=True)
    chats.cache._swap_out_idle(0)
    found = chats.cache.open(3, [*SYSTEM, *REST, 7], "", reuse="moved")
    assert found == Reuse((Run(0, 0, 40), Run(90, 40, 100, is_exact=False)))
    assert chats.extend(3, [7])
    chats.cache.close(3, keep=True)
    assert chats.run(4, [*other, 8]) == 140
    assert chats.run(5, [*SYSTEM, *REST, 7, 8], "other", reuse="moved") == 0


def test_a_chat_outside_the_cache_comes_back_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_space, "PIECE", 16)
    chats = driver(swap_bytes=2000)
    chats.cache._swap_out_idle(0)
    for prompt, num_pieces in (([*CHAT, 7], 12), ([*SYSTEM, *REST, 7], 0)):  # Then the second is moved from the first.
        held = [chats.cache.usage().reusable]
        while not chats.cache.fetch(2, prompt, "", reuse="moved"):
            held.append(chats.cache.usage().reusable)
            chats.cache.check_integrity()
        assert len(held) == num_pieces + 1
        assert all(after - before <= 16 for before, after in pairwise(held))
        before = chats.store.num_cells()
        assert chats.cache.open(2, prompt, "", reuse="moved").num_tokens == len(prompt) - 1
        assert chats.store.num_cells() <= before
        chats.cache.close(2, keep=True)


def test_moved_tokens_outlive_the_process_once_nobody_computes_them_anew() -> None:
    store = EagerStore(4000)
    chats = driver()
    chats.cache.swap_to(store)
    prompt = [*SYSTEM, *REST, *range(3000, 3020)]
    chats.run(2, prompt, reuse="moved")
    chats.cache.close(2, keep=True)
    assert store.num_pieces == 0
    chats.cache.leave(prompt, "")
    after = Driver(512, 6, can_move=True)
    after.cache.swap_to(store)
    assert after.run(1, [*prompt, 8]) == 0
    after.cache.close(1, keep=False)
    assert after.cache.open(2, [*prompt, 8], "", reuse="moved") == Reuse(
        (Run(0, 0, 40), Run(40, 40, 120, is_exact=False))
    )
    after.cache.check_integrity()


def test_a_chat_that_goes_on_has_its_last_piece_copied_anew_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_space, "PIECE", 16)
    store = EagerStore(4000)
    chats = Driver(512, 6)
    chats.cache.swap_to(store)
    chats.run(1, range(100))
    chats.cache.close(1, keep=True)
    copied: list[int] = []
    plain = store.put

    def put(piece: Piece, payload: Bytes, behind: Collection[Piece] = ()) -> bool:
        copied.append(len(payload))
        return plain(piece, payload, behind)

    monkeypatch.setattr(store, "put", put)
    assert chats.run(2, range(120)) == 100
    chats.cache.close(2, keep=True)
    assert copied == [16, 8]
    after = Driver(512, 6)
    after.cache.swap_to(store)
    assert after.run(1, [*range(120), 7]) == 120
    assert after.run(2, [*range(70), 7]) == 70


def test_what_a_live_sequence_shares_is_copied_and_moved_there() -> None:
    chats = driver()
    assert chats.run(2, [*CHAT, 5]) == 190  # It has taken the chat over and is still at work.
    found = chats.cache.open(3, [*SYSTEM, *REST, 6], "", reuse="moved")
    assert found == Reuse((Run(0, 0, 40), Run(90, 40, 100, is_exact=False)))
    chats.cache.check_integrity()
    assert chats.extend(2, [5])
    assert chats.extend(3, [6])

    full = driver(capacity=256)
    full.run(2, [*CHAT, 5])
    assert full.cache.open(3, [*SYSTEM, *REST, 6], "", reuse="moved") == Reuse.prefix(40)  # There is no room for it.


def test_other_swipes_make_way_for_the_answer_that_the_chat_goes_on_with() -> None:
    chats = driver(capacity=256)
    chats.run(2, [*CHAT, *range(300, 310)])
    chats.cache.close(2, keep=True)
    chats.run(3, [*CHAT, *range(400, 410)])
    chats.cache.close(3, keep=True)
    found = chats.cache.open(4, [*SYSTEM, *REST, *range(300, 310), 6], "", reuse="moved")
    assert found == Reuse((Run(0, 0, 40), Run(90, 40, 110, is_exact=False)))
    chats.cache.check_integrity()


@pytest.mark.parametrize("swap_bytes", [0, 300, 3000])
@pytest.mark.parametrize("seed", range(8))
def test_random_chats_that_lose_messages_keep_the_books_right(
    seed: int, swap_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(SEED + seed)
    monkeypatch.setattr(swap_space, "PIECE", rng.choice((16, 256)))
    chats = Driver(rng.choice((600, 900)), 6, swap_bytes=swap_bytes, can_move=True)
    message = count(1000)

    def say() -> list[int]:
        return [next(message) for _ in range(rng.randrange(20, 60))]

    texts = [[say()] for _ in range(3)]
    live: dict[int, list[int]] = {}
    num_moved = 0
    for seq_id in range(200):
        chat = rng.choice(texts)
        chat.append(say())
        while len(chat) > 6 or (len(chat) > 2 and rng.random() < 0.2):
            del chat[rng.randrange(1, len(chat) - 1)]
        prompt = [token_id for text in chat for token_id in text]
        reuse: Wanted = rng.choice(("exact", "moved", "moved"))
        for _ in range(rng.randrange(4)):  # Not all of it is there yet, or it is.
            chats.cache.fetch(seq_id, prompt, "", reuse=reuse)
            chats.cache.check_integrity()
        found = chats.cache.open(seq_id, prompt, "", reuse=reuse)
        chats.cache.check_integrity()
        assert found.num_tokens < len(prompt)
        assert reuse == "moved" or all(run.is_exact for run in found.runs)
        num_moved += sum(not run.is_exact for run in found.runs)
        live[seq_id] = prompt[: found.num_tokens]
        if chats.extend(seq_id, prompt[found.num_tokens :]):
            live[seq_id] = prompt
        while len(live) > rng.randrange(3):
            chats.cache.close(closed := rng.choice(list(live)), keep=rng.random() < 0.9)
            del live[closed]
        chats.cache.check_integrity()
        for open_id, tokens in live.items():
            assert len(chats.store.slots[chats.cache.slot(open_id)]) == len(tokens)
    assert num_moved > 10


def shallow(path: Path) -> Path:
    """A llama of one layer, whose keys and values depend on each token and its position alone."""

    def first_layer(name: str, values: np.ndarray) -> np.ndarray | None:
        return None if name.startswith("blk.") and not name.startswith("blk.0.") else values

    return write_model(ADAPTERS / "llama-bf16", path, change=first_layer, keys=lambda writer: writer.add_block_count(1))


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GGUFBackend]:
    path = shallow(tmp_path_factory.mktemp("one") / "llama.gguf")
    settings = {"max_model_len": 512, "max_num_seqs": 4, "step_tokens": 256, "threads": 1, "cache": {"tokens": 1024}}
    backend = GGUFBackend(path, ModelSettings.model_validate(settings), lambda _: None)
    yield backend
    backend.close()


def ask(backend: GGUFBackend, prompt: Sequence[int], namespace: str, reuse: Wanted) -> tuple[Reuse, torch.Tensor]:
    seq_id = next(_ids)
    found = backend.kv.open(seq_id, prompt, namespace, reuse=reuse)
    rest = prompt[found.num_tokens :]
    assert backend.kv.reserve(seq_id, len(rest))
    logits = backend.forward([Chunk(seq_id, rest, found.num_tokens, "last")]).clone()
    backend.kv.commit(seq_id, found.num_tokens, rest)
    backend.kv.close(seq_id, keep=True)
    backend.kv.check_integrity()
    return found, logits


def test_moved_keys_are_rotated_to_where_they_stand(one_layer: GGUFBackend) -> None:
    """With one layer what is moved is what would be computed, up to the rounding of 16 bits."""
    rng = random.Random(SEED)
    system, old, rest, new = ([rng.randrange(100, 200) for _ in range(n)] for n in (40, 57, 120, 30))
    ask(one_layer, [*system, *old, *rest], "moved", "moved")
    found, logits = ask(one_layer, [*system, *rest, *new], "moved", "moved")
    assert found == Reuse((Run(0, 0, 40), Run(97, 40, 120, is_exact=False)))
    nothing, cold = ask(one_layer, [*system, *rest, *new], "cold", "moved")
    assert nothing == Reuse()
    torch.testing.assert_close(logits, cold, rtol=0, atol=0.02 * float(cold.abs().max()))


def test_a_prompt_given_up_before_it_ran_leaves_its_chat_as_it_is(one_layer: GGUFBackend) -> None:
    """Keys are rotated in the next step; until then no copy of them may be taken."""
    rng = random.Random(SEED + 1)
    system, old, rest = ([rng.randrange(100, 200) for _ in range(n)] for n in (40, 57, 120))
    ask(one_layer, [*system, *old, *rest], "given up", "moved")
    seq_id = next(_ids)
    assert one_layer.kv.open(seq_id, [*system, *rest, 5], "given up", reuse="moved").num_tokens == 160
    one_layer.kv.close(seq_id, keep=True)
    _, expected = ask(one_layer, [*system, *rest, 5], "alone", "exact")
    found, logits = ask(one_layer, [*system, *rest, 5], "given up", "moved")
    assert found.num_tokens == 160
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"kv_cache": "f16"}, "what stands behind a removed message is moved, and computed again while nothing runs"),
        ({"kv_cache": "q8"}, "exact ones alone, since keys of q8 would be rounded again; behind a removed message"),
        ({"rope": {"kind": "yarn", "factor": 2}}, "exact ones alone, since keys under yarn scaling by 2 can't be"),
        ({"reuse": "exact"}, "exact ones alone, as asked; behind a removed message all is computed"),
    ],
)
def test_the_start_says_what_can_be_moved(values: dict[str, object], line: str, tmp_path: Path) -> None:
    header = read_header(shallow(tmp_path / "llama.gguf"))
    cache = {"dtype": values.get("kv_cache", "f16"), "reuse": values.get("reuse", "moved")}
    settings = ModelSettings.model_validate({"cache": cache, "rope": values.get("rope", {}), "max_model_len": 512})
    notes = make_plan(settings, header, Memory(64 * GIB)).notes
    assert next(note for note in notes if note.startswith("cached tokens: ")).startswith(f"cached tokens: {line}")


def test_a_model_whose_keys_llama_cpp_cannot_rotate_says_so(tmp_path: Path) -> None:
    plan = make_plan(ModelSettings(max_model_len=512), read_header(shallow(tmp_path / "llama.gguf")), Memory(64 * GIB))
    fixed = without_moves(plan)
    assert plan.can_move
    assert not fixed.can_move
    assert [note for note in fixed.notes if note not in plan.notes] == [
        "cached tokens: exact ones alone, since llama.cpp can't rotate the model's keys again; "
        "behind a removed message all is computed"
    ]


def test_a_model_with_embedded_positions_moves_nothing(tmp_path: Path) -> None:
    def add_positions(writer: GGUFWriter) -> None:
        writer.add_block_count(1)
        writer.add_tensor("position_embd.weight", np.zeros((4, 4), np.float32))

    path = write_model(ADAPTERS / "llama-bf16", tmp_path / "placed.gguf", keys=add_positions)
    plan = make_plan(ModelSettings(max_model_len=64), read_header(path), Memory(64 * GIB))
    assert not plan.can_move
    assert any("since tokens are told where they stand before the first layer" in note for note in plan.notes)
