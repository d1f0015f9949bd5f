"""What an engine tells of the tokens that it holds: hashes that cover all before them, counted, and bounded."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pieces import FINGERPRINT, ROOT, bytes_of, piece_of
from told_blocks import Told, blocks_of, split, take_in

from tightrope.backends import holdings as module
from tightrope.backends.holdings import BLOCK, Holdings, chain, root_of
from tightrope.backends.sessions.folder import Folder
from tightrope.backends.sessions.piece import Piece
from tightrope.backends.sessions.store import RunStore

TEXT = [(7 * place) % 1000 for place in range(100)]


def test_a_block_s_hash_covers_all_tokens_before_it_and_whose_they_are() -> None:
    blocks = list(chain(root_of(b"model", "mine"), TEXT))
    assert len(blocks) == len(TEXT) // BLOCK
    assert list(chain(root_of(b"model", "mine"), [*TEXT[:40], 9])) == blocks[:2]
    changed = list(chain(root_of(b"model", "mine"), [TEXT[0] + 1, *TEXT[1:]]))
    others = list(chain(root_of(b"model", "yours"), TEXT)), list(chain(root_of(b"another", "mine"), TEXT))
    assert len({*blocks, *changed, *others[0], *others[1]}) == 4 * len(blocks)


def test_a_block_that_two_hold_is_gone_when_the_second_lets_it_go() -> None:
    told, blocks = Told(), list(chain(b"root", TEXT))
    for _ in range(2):
        told.holdings.add("cached", blocks, 0)
    told.update()
    told.holdings.remove("cached", blocks)
    told.update()
    assert told.cached == {*blocks}
    told.holdings.remove("cached", reversed(blocks))
    told.update()
    assert told.cached == set()


def test_what_comes_and_goes_between_two_news_is_not_told() -> None:
    holdings, blocks = Holdings(), list(chain(b"root", TEXT))
    holdings.take()
    holdings.add("cached", blocks, 0)
    holdings.remove("cached", blocks)
    assert not any(holdings.take())


@given(st.randoms(use_true_random=False), st.integers(1, 40))
def test_what_is_told_stays_within_its_bound_and_is_a_part_of_each_text_alike(rng: random.Random, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_BLOCKS", most)
        holdings, held, told = Holdings(), dict[int, list[bytes]](), set[bytes]()
        for number in range(30):
            if held and rng.random() < 0.4:
                holdings.remove("stored", held.pop(rng.choice(list(held))))
            else:
                first, length = rng.randrange(3), BLOCK * rng.randrange(1, 12)
                held[number] = list(chain(b"root", [*range(first * BLOCK), *range(number, number + length)]))
                holdings.add("stored", held[number], 0)
            _, news = holdings.take()
            take_in(told, news)
            assert len(told) <= most
            assert told == {block for text in held.values() for block in text[news.stride - 1 :: news.stride]}
            assert news.stride == 1 or len({block for text in held.values() for block in text}) > most // 2


def test_a_piece_is_told_once_all_before_it_is_there_and_no_longer_than_that() -> None:
    told, store = Told(), RunStore(1 << 20)
    store.report_to(told.holdings)
    first = piece_of(range(256))
    second = piece_of(range(256, 300), after=first)
    put(store, second)
    told.update()
    assert told.stored == set()
    put(store, first)
    told.update()
    assert told.stored == blocks_of([(ROOT, range(300))])
    store.forget(first)
    told.update()
    assert told.stored == set()


def test_pieces_of_the_folder_are_told_of_from_the_start_and_as_they_go(tmp_path: Path) -> None:
    first, other = piece_of(range(256)), piece_of(range(500, 600))
    for _ in range(2):
        told = Told()
        store = RunStore(1 << 20, FINGERPRINT, "model", Folder(tmp_path / "chats"), 1 << 20)
        put(store, first, other)
        store.flush(60)
        store.report_to(told.holdings)
        told.update()
        assert told.stored == blocks_of([(ROOT, range(256)), (ROOT, range(500, 600))])
        assert told.holdings.fingerprint == FINGERPRINT
        (tmp_path / "chats" / f"{other.name.hex()}.run").unlink()
        store._make_room(1 << 20, ())
        assert store.read(other) is None
        told.update()
        assert told.stored == blocks_of([(ROOT, range(256))])
        store.close()


def put(store: RunStore, *pieces: Piece) -> None:
    for piece in pieces:
        assert store.put(piece, bytes_of(piece))


def test_hashes_are_eight_bytes_each() -> None:
    assert [len(block) for block in split(b"".join(chain(b"root", TEXT)))] == [8] * (len(TEXT) // BLOCK)
