"""The store of runs: what it finds, what it lets go of, and what becomes of it where the disk fails."""

import errno
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from pieces import FINGERPRINT, ROOT, bytes_of, found, piece_of

from tightrope.backends.sessions.folder import Folder
from tightrope.backends.sessions.piece import Piece, root_name
from tightrope.backends.sessions.store import RunStore

pytestmark = pytest.mark.quick

WAIT_S = 240


def put(store: RunStore, *pieces: Piece) -> None:
    for piece in pieces:
        store.put(piece, bytes_of(piece))


@contextmanager
def on_disk(path: Path, host_bytes: int = 1 << 20, disk_bytes: int = 1 << 20) -> Iterator[RunStore]:
    store = RunStore(host_bytes, FINGERPRINT, "a model", Folder(path), disk_bytes)
    yield store
    store.close()


def test_a_text_is_found_as_far_as_its_pieces_go() -> None:
    store = RunStore(1 << 20)
    first = piece_of(range(256))
    second = piece_of(range(256, 300), after=first)
    put(store, first, second)
    assert found(store, [*range(300), 7]) == 300
    assert found(store, [*range(280), 7]) == 280
    assert found(store, [*range(256)]) == 256
    assert found(store, [*range(100), 7]) == 100
    assert found(store, [7, *range(300)]) == 0
    assert found(store, []) == 0


def test_the_same_tokens_behind_others_are_another_piece() -> None:
    store = RunStore(1 << 20)
    first = piece_of(range(256))
    put(store, first, piece_of([1, 2, 3], after=first))
    assert found(store, [*range(1, 257), 1, 2, 3]) == 0


def test_what_one_namespace_stores_no_other_finds() -> None:
    store = RunStore(1 << 20)
    put(store, piece_of(range(256)))
    assert found(store, [*range(256)], root_name("a test", "")) == 0
    assert root_name("a", "b") != root_name("ab", "") != root_name("ab")


def test_a_longer_piece_takes_the_place_of_its_beginnings() -> None:
    store = RunStore(1 << 20)
    put(store, piece_of(range(10)), piece_of(range(100)), piece_of([*range(50), 7]))
    assert store.num_pieces == 2
    assert store.host_used == 2000
    assert store.covers(piece_of(range(20)))
    assert found(store, [*range(100)]) == 100


def test_a_state_is_of_use_at_its_end_alone_and_takes_no_other_s_place() -> None:
    store = RunStore(1 << 20)
    put(store, *(piece_of(range(length), is_whole=True) for length in (10, 20)))
    assert store.num_pieces == 2
    assert not store.covers(piece_of(range(15), is_whole=True))
    path = store.longest(
        ROOT, np.arange(15, dtype=np.int32), lambda piece, length: length if length == len(piece.token_ids) else 0
    )
    assert [match.length for match in path] == [10]


def test_memory_keeps_what_was_of_use_last() -> None:
    store = RunStore(3500)
    pieces = [piece_of([number]) for number in range(4)]
    put(store, *pieces[:3])
    store.use(pieces[:1])
    put(store, pieces[3])
    assert [found(store, [number]) for number in range(4)] == [1, 0, 1, 1]
    assert store.host_used == 3000


def test_what_is_larger_than_the_memory_pushes_nothing_out() -> None:
    store = RunStore(3500)
    put(store, piece_of([1]))
    large = piece_of([2], num_bytes=4000)
    assert not store.put(large, bytes_of(large))
    assert found(store, [1]) == 1


def test_the_next_process_finds_what_this_one_has_written(tmp_path: Path) -> None:
    first = piece_of(range(256))
    with on_disk(tmp_path / "chats") as store:
        put(store, first, piece_of(range(256, 300), after=first))
    with on_disk(tmp_path / "chats") as store:
        assert store.host_used == 0
        assert found(store, [*range(300)]) == 300


def test_a_chat_that_goes_on_leaves_no_old_ends_on_disk(tmp_path: Path) -> None:
    with on_disk(tmp_path / "chats") as store:
        for length in range(10, 100, 10):
            put(store, piece_of(range(length)))
            assert store.flush(WAIT_S)
    assert len([*(tmp_path / "chats").glob("*.run")]) == 1


def test_what_memory_has_no_room_for_any_more_is_found_on_disk(tmp_path: Path) -> None:
    with on_disk(tmp_path / "chats", host_bytes=2500) as store:
        for number in range(5):
            put(store, piece_of([number]))
            assert store.flush(WAIT_S)
        assert store.host_used <= 2500
        assert [found(store, [number]) for number in range(5)] == [1] * 5


def test_what_is_on_disk_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [piece_of(range(256))]
    pieces.append(piece_of(range(256, 300), after=pieces[0]))
    with on_disk(tmp_path / "chats") as store:
        put(store, *pieces)
    with on_disk(tmp_path / "chats") as store:
        deadline = time.monotonic() + WAIT_S
        while not all(store.fetch([piece]) for piece in pieces):
            assert time.monotonic() < deadline, "they were never read"
        monkeypatch.setattr(Folder, "read", lambda *args: pytest.fail("it was read again"))
        assert found(store, [*range(300)]) == 300
        assert not [*store.faults()]


def test_what_can_not_be_read_ahead_is_not_waited_for(tmp_path: Path) -> None:
    piece = piece_of(range(256))
    with on_disk(tmp_path / "chats") as store:
        put(store, piece)
    for host_bytes, name in ((10, ""), (1 << 20, piece.name.hex() + ".run")):  # There is no room, or no file.
        with on_disk(tmp_path / "chats", host_bytes) as store:
            if name:
                (tmp_path / "chats" / name).unlink()
            deadline = time.monotonic() + WAIT_S
            while not store.fetch([piece]):
                assert time.monotonic() < deadline, "it is waited for"
            assert found(store, [*range(256)]) == (0 if name else 256)


def test_the_disk_keeps_what_was_of_use_last(tmp_path: Path) -> None:
    with on_disk(tmp_path / "chats", host_bytes=1000, disk_bytes=5000) as store:
        for number in range(12):
            put(store, piece_of([number]))
            assert store.flush(WAIT_S)
        kept = [found(store, [number]) for number in range(12)]
        assert kept == sorted(kept)
        assert 2 <= sum(kept) <= 4
    assert sum(file.stat().st_size for file in (tmp_path / "chats").glob("*.run")) <= 5000


def test_a_full_disk_costs_one_line_and_what_is_in_memory_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with on_disk(tmp_path / "chats") as store:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))  # A real write fails half-way.
        try:
            for number in range(3):
                put(store, piece_of([number], num_bytes=100_000))
            assert store.flush(WAIT_S)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [found(store, [number]) for number in range(3)] == [1] * 3
        assert len(caplog.messages) == 1
        assert str(tmp_path / "chats") in caplog.messages[0]
        assert os.listdir(tmp_path / "chats") == ["tightrope-sessions"]
        put(store, piece_of([9]))
        assert store.flush(WAIT_S)
        assert len(caplog.messages) == 2  # It is said when it goes on.
        assert store.flush(WAIT_S)
        assert len([*(tmp_path / "chats").glob("*.run")]) == 4  # What waited in memory is written, too.


def test_a_disk_that_may_only_be_read_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with on_disk(tmp_path / "chats") as store:
        put(store, piece_of(range(256)))
    plain_open, plain_utime = os.open, os.utime

    def read_only(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return plain_open(path, flags, mode, dir_fd=dir_fd)

    def no_utime(*args: object, **named: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "utime", no_utime)
    with on_disk(tmp_path / "chats") as store:
        put(store, piece_of([1]), piece_of([2]))
        assert found(store, [*range(256)]) == 256
    monkeypatch.setattr(os, "utime", plain_utime)
    assert len(caplog.messages) == 1


def test_a_folder_that_vanishes_costs_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with on_disk(tmp_path / "chats", host_bytes=1500) as store:
        put(store, piece_of([1]))
        assert store.flush(WAIT_S)
        shutil.rmtree(tmp_path / "chats")
        for number in (2, 3):
            put(store, piece_of([number]))
            assert store.flush(WAIT_S)
        assert [found(store, [number]) for number in (1, 2, 3)] == [0, 0, 1]
    assert len(caplog.messages) == 1
