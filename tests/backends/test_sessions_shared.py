"""Several servers over one folder of chats: each finds what the others write, and none harms another."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
from checkout import SUPPORT
from pieces import FINGERPRINT, ROOT, bytes_of, found, piece_of
from told_blocks import Told, blocks_of

from tightrope.backends.sessions.folder import Folder
from tightrope.backends.sessions.piece import Piece
from tightrope.backends.sessions.store import RunStore

WAIT_S = 240
Open = Callable[..., RunStore]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    stores: list[RunStore] = []

    def open_one(disk_bytes: int = 1 << 20) -> RunStore:
        stores.append(RunStore(1 << 20, FINGERPRINT, "a model", Folder(tmp_path / "chats"), disk_bytes))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


def write(store: RunStore, *pieces: Piece) -> None:
    for piece in pieces:
        assert store.put(piece, bytes_of(piece))
    assert store.flush(WAIT_S)


def look(store: RunStore) -> None:
    """Have it look at the folder now, as it does every quarter of a second."""
    store._queue.put(store._look)
    assert store.flush(WAIT_S)


def size_of(path: Path) -> int:
    """Bytes of all pieces, some of which others may be deleting."""
    total = 0
    for file in path.glob("*.run"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def test_what_one_writes_another_finds_without_a_new_start_and_tells_of(opened: Open) -> None:
    one, other, told = opened(), opened(), Told()
    other.report_to(told.holdings)
    first = piece_of(range(256))
    write(one, first, piece_of(range(256, 300), after=first))
    look(other)
    assert found(other, range(300)) == 300
    told.update()
    assert told.stored == blocks_of([(ROOT, range(300))])


def test_what_is_found_is_looked_for_without_being_asked_to(opened: Open) -> None:
    one, other = opened(), opened()
    write(one, piece_of(range(256)))
    deadline_s = time.monotonic() + WAIT_S
    while not found(other, range(256)):
        assert other.flush(WAIT_S)
        assert time.monotonic() < deadline_s, "it is never found"


def test_what_one_deletes_another_misses_and_computes_anew(opened: Open) -> None:
    one, other = opened(), opened()
    first = piece_of(range(256))
    second = piece_of(range(256, 300), after=first)
    write(one, first, second)
    look(other)
    one.forget(second)
    assert one.flush(WAIT_S)
    assert found(other, range(300)) == 256  # Before it has looked.
    look(other)
    assert found(other, range(300)) == 256
    write(other, second)
    look(one)
    assert found(one, range(300)) == 300


def test_a_chat_that_goes_on_elsewhere_has_its_shorter_piece_replaced_for_all(opened: Open) -> None:
    one, other = opened(), opened()
    write(one, piece_of(range(100)))
    look(other)
    write(other, piece_of(range(200)))
    look(one)
    look(other)
    assert [found(store, range(200)) for store in (one, other)] == [200, 200]
    assert (one.num_pieces, other.num_pieces) == (1, 1) or one.num_pieces == 2  # Its own memory may hold the shorter.


def test_the_same_tokens_in_other_bytes_are_never_taken_for_one_s_own(opened: Open, tmp_path: Path) -> None:
    """A window's pages were still there for the one and not for the other: the piece has one name and two sizes."""
    one, other = opened(), opened()
    mine, theirs = piece_of(range(256), num_bytes=1000), piece_of(range(256), num_bytes=1500)
    write(one, mine)
    look(other)
    other.forget(mine)
    write(other, theirs)
    one._make_room(1 << 20, ())
    assert one.read(mine) is None
    assert one.flush(WAIT_S)
    (match,) = one.longest(ROOT, np.arange(256, dtype=np.int32))
    assert match.piece.num_bytes == 1500
    assert found(one, range(256)) == 256
    assert found(other, range(256)) == 256


def test_two_that_write_hold_one_budget_together(opened: Open, tmp_path: Path) -> None:
    budget = 20_000
    one, other = opened(budget), opened(budget)
    for number in range(40):
        write((one, other)[number % 2], piece_of([number], num_bytes=1000))
        assert size_of(tmp_path / "chats") <= budget
    assert size_of(tmp_path / "chats") > budget // 2
    look(one)
    look(other)
    assert found(one, [39]) == found(other, [38]) == 1


def test_a_chat_larger_than_the_budget_is_not_written_and_takes_nobody_s_place(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(5000)
    small = piece_of([1], num_bytes=1000)
    write(store, small, piece_of([2], num_bytes=9000))
    assert found(opened(5000), [1]) == 1
    assert size_of(tmp_path / "chats") < 5000
    assert "larger than all of them may be" in caplog.text


WRITER = """
import sys
from pathlib import Path
from pieces import FINGERPRINT, bytes_of, piece_of
from tightrope.backends.sessions.folder import Folder
from tightrope.backends.sessions.store import RunStore

path, first, budget = sys.argv[1:]
store = RunStore(1 << 24, FINGERPRINT, "a model", Folder(Path(path)), int(budget))
print("ready", flush=True)
for number in range(int(first), int(first) + 100_000):
    piece = piece_of([number], num_bytes=100_000)
    store.put(piece, bytes_of(piece))
    store.flush(60)
    if number % 4 == 3:
        print("four", flush=True)
"""


def test_processes_that_write_and_are_killed_leave_a_sound_folder_within_its_budget(
    opened: Open, tmp_path: Path
) -> None:
    budget = 1_000_000
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "chats"), str(first), str(budget)],
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": str(SUPPORT), "PATH": ""},
        )
        for first in (0, 1_000_000)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert [writer.stdout.readline() for _ in range(3)] == [b"ready\n", b"four\n", b"four\n"]
        assert size_of(tmp_path / "chats") <= budget
    for writer in writers:
        writer.kill()
        writer.communicate()
    store = opened(budget)
    with closing(Folder(tmp_path / "chats")) as folder:
        left = [stored.piece for stored in folder.scan()]
    assert len(left) > 4
    assert all(found(store, piece.token_ids) == 1 for piece in left)
    write(store, piece_of([5_000_000], num_bytes=100_000))
    assert size_of(tmp_path / "chats") <= budget
