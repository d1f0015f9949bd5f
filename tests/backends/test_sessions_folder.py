"""The folder of a server's chats: whatever lies in it, a piece is read bit for bit or not at all."""

import os
import random
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pieces import FINGERPRINT, bytes_of, piece_of

from tightrope.backends.errors import BackendError
from tightrope.backends.sessions import piece_file
from tightrope.backends.sessions.folder import MARK, Folder
from tightrope.backends.sessions.piece import Piece
from tightrope.backends.sessions.store import RunStore

pytestmark = pytest.mark.quick


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "chats")


def write(folder: Folder, piece: Piece) -> Path:
    folder.write(piece, bytes_of(piece), FINGERPRINT, "a model")
    return folder.path / f"{piece.name.hex()}.run"


def is_read(folder: Folder, piece: Piece) -> bool:
    """Whether a piece is found; what is found must be right."""
    payload = folder.read(piece, FINGERPRINT)
    assert payload is None or np.array_equal(payload, bytes_of(piece))
    return payload is not None


def test_a_piece_is_read_as_it_was_written(folder: Folder) -> None:
    first = piece_of(range(256))
    second = piece_of([7], after=first, num_bytes=0)
    for piece in (first, second):
        write(folder, piece)
    assert is_read(folder, first)
    assert is_read(folder, second)
    found = {stored.piece.name: stored for stored in folder.scan()}
    assert found.keys() == {first.name, second.name}
    assert found[second.name].header.model == "a model"
    assert (found[second.name].piece.parent, found[second.name].piece.start) == (first.name, 256)


def test_only_the_owner_may_read_what_is_kept(folder: Folder) -> None:
    file = write(folder, piece_of(range(10)))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_a_folder_that_others_may_read_is_closed_to_them(tmp_path: Path) -> None:
    Folder(tmp_path / "chats").close()
    (tmp_path / "chats").chmod(0o755)
    Folder(tmp_path / "chats").close()
    assert stat.S_IMODE((tmp_path / "chats").stat().st_mode) == 0o700


def test_a_flipped_bit_in_any_of_a_thousand_places_is_a_miss(folder: Folder) -> None:
    piece = piece_of(range(256), num_bytes=3000)
    file = write(folder, piece)
    whole = file.read_bytes()
    places = random.Random(7).sample(range(8 * len(whole)), 1000)
    for place in places:
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        assert not is_read(folder, piece)
    file.write_bytes(whole)
    assert is_read(folder, piece)


def test_a_file_of_another_length_is_a_miss(folder: Folder) -> None:
    piece = piece_of(range(256))
    whole = write(folder, piece).read_bytes()
    for length in (0, 1, 11, 12, 40, len(whole) // 2, len(whole) - 33, len(whole) - 1):
        (folder.path / f"{piece.name.hex()}.run").write_bytes(whole[:length])
        assert not is_read(folder, piece)
    (folder.path / f"{piece.name.hex()}.run").write_bytes(whole + b"\0")
    assert not is_read(folder, piece)


def test_files_that_have_changed_places_are_misses(folder: Folder) -> None:
    first, second = piece_of(range(256)), piece_of(range(1, 257))
    one, other = write(folder, first), write(folder, second)
    one.rename(folder.path / "between")
    other.rename(one)
    (folder.path / "between").rename(other)
    assert not [*folder.scan()]
    assert not is_read(folder, first)
    assert not is_read(folder, second)


def test_a_file_of_an_older_format_is_a_miss(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = piece_of(range(256))
    with monkeypatch.context() as older:
        older.setattr(piece_file, "MAGIC", b"tr-run\0\0")
        write(folder, piece)
        assert is_read(folder, piece)
    assert not [*folder.scan()]
    assert not is_read(folder, piece)


def test_what_another_model_has_stored_is_a_miss(folder: Folder) -> None:
    piece = piece_of(range(256))
    folder.write(piece, bytes_of(piece), b"other weights", "another model")
    store = RunStore(1 << 20, FINGERPRINT, folder=folder, disk_bytes=1 << 20)
    assert store.num_pieces == 0
    store.close()
    assert folder.read(piece, FINGERPRINT) is None


def test_whatever_else_lies_in_the_folder_is_left_out(folder: Folder, tmp_path: Path) -> None:
    piece = piece_of(range(256))
    real = write(folder, piece)
    outside = tmp_path / "outside"
    real.rename(outside)
    real.symlink_to(outside)  # a link to the very piece
    os.mkfifo(folder.path / ("0" * 40 + ".run"))
    (folder.path / ("1" * 40 + ".run")).mkdir()
    (folder.path / ("2" * 40 + ".run")).write_bytes(struct.pack("<8sI", piece_file.MAGIC, 0xFFFFFFFF))
    (folder.path / ("3" * 40 + ".run")).write_bytes(struct.pack("<8sI", piece_file.MAGIC, 3) + b"\xc1\0\0" + bytes(90))
    (folder.path / "notes.txt").write_text("mine")
    assert not [*folder.scan()]
    assert not is_read(folder, piece)
    assert outside.exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_text("a file"), "no folder"),
        (lambda path: (path.mkdir(), (path / "thesis.txt").write_text("")), "no folder of chats"),
        (lambda path: path.symlink_to(path.parent), "link"),
    ],
)  # fmt: skip
def test_what_is_no_folder_of_chats_is_refused_in_one_line(tmp_path: Path, make: object, said: str) -> None:
    assert callable(make)
    make(tmp_path / "chats")
    with pytest.raises(BackendError, match=said) as error:
        Folder(tmp_path / "chats")
    assert str(tmp_path / "chats") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_of_another_owner_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Folder(tmp_path / "chats").close()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(BackendError, match="belongs to another user"):
        Folder(tmp_path / "chats")


def test_a_file_of_another_owner_is_a_miss(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = piece_of(range(256))
    write(folder, piece)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert not is_read(folder, piece)


def test_a_folder_below_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="the folder above it doesn't exist"):
        Folder(tmp_path / "none" / "chats")


def test_what_was_of_no_use_for_longest_goes_first(folder: Folder) -> None:
    pieces = [piece_of([number], num_bytes=1000) for number in range(10)]
    for age, piece in enumerate(pieces):
        os.utime(write(folder, piece), (1000 + age, 1000 + age))
    folder.touch(pieces[0].name)
    size = (folder.path / f"{pieces[0].name.hex()}.run").stat().st_size
    gone = folder.trim(4 * size + 10)
    assert sum(file.stat().st_size for file in folder.path.glob("*.run")) <= 4 * size
    assert gone == [piece.name for piece in pieces[1 : 1 + len(gone)]]
    assert is_read(folder, pieces[0])
    assert is_read(folder, pieces[-1])
    assert not is_read(folder, pieces[1])


def test_files_that_were_never_finished_are_cleared_away_once_they_are_old(folder: Folder) -> None:
    old, new = (folder.path / f".{name * 40}.123" for name in "ab")
    for file in (old, new):
        file.write_bytes(b"torn")
    os.utime(old, (1000, 1000))
    folder.trim(0)
    assert (old.exists(), new.exists()) == (False, True)


def test_what_a_killed_process_has_begun_keeps_nobody_from_writing_it(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = piece_of(range(256))

    def killed(file: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as first:
        first.setattr(os, "fsync", killed)
        first.setattr(os, "unlink", lambda *args, **named: None)
        with pytest.raises(KeyboardInterrupt):
            write(folder, piece)
    assert len([*folder.path.glob(".*")]) == 1
    write(folder, piece)
    assert is_read(folder, piece)
    Folder(folder.path).close()


def test_a_folder_that_has_vanished_is_a_miss(folder: Folder) -> None:
    piece = piece_of(range(256))
    write(folder, piece)
    shutil.rmtree(folder.path)
    assert not is_read(folder, piece)
    assert not [*folder.scan()]
    assert folder.trim(0) == []


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from pieces import FINGERPRINT, bytes_of, piece_of
from tightrope.backends.sessions.folder import Folder
from tightrope.backends.sessions.store import RunStore

def write(seed):
    store = RunStore(64 << 20, FINGERPRINT, folder=Folder(Path(sys.argv[2])), disk_bytes=8 << 20)
    chance = random.Random(seed)
    while True:
        piece = None
        for _ in range(4):  # A chat's turns.
            length = chance.randrange(1, 256)
            piece = piece_of(chance.choices(range(9), k=length), after=piece, num_bytes=chance.randrange(300_000))
            store.put(piece, bytes_of(piece))
        store.flush(60)

for seed in range(int(sys.argv[3])):
    child = os.fork()
    if not child:
        write(seed)
    time.sleep(random.Random(-seed).uniform(0.001, 0.08))  # Any moment will do.
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.plain
def test_after_a_hundred_kills_while_it_was_written_every_piece_is_right_or_absent(tmp_path: Path) -> None:
    support = Path(__file__).parent.parent / "support"
    Folder(tmp_path / "chats").close()
    subprocess.run([sys.executable, "-c", KILLED, str(support), str(tmp_path / "chats"), "100"], check=True)
    folder = Folder(tmp_path / "chats")
    found = [stored.piece for stored in folder.scan()]
    assert len(found) > 10
    assert all(is_read(folder, piece) for piece in found)
    assert sum(file.stat().st_size for file in folder.path.glob("*.run")) <= 9 << 20
    assert (folder.path / MARK).exists()
