"""`tightrope sessions`: what is in a folder of chats, and how it is deleted."""

import errno
import os
from pathlib import Path

import pytest
from pieces import FINGERPRINT, bytes_of, piece_of

from tightrope.backends.sessions.folder import Folder
from tightrope.backends.sessions.piece import Piece
from tightrope.server.cli.commands import run

pytestmark = pytest.mark.quick

FIRST = piece_of(range(256))
LONG, SHORT, OTHER = piece_of(range(100), after=FIRST), piece_of([7], after=FIRST), piece_of([1, 2, 3])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Two chats with a common beginning, of use just now, and one that was of none for two days."""
    made = Folder(tmp_path / "chats")
    for piece in (FIRST, LONG, SHORT, OTHER):
        made.write(piece, bytes_of(piece), FINGERPRINT, "a model")
    old_s = (tmp_path / "chats").stat().st_mtime - 2 * 86_400
    os.utime(made.path / f"{OTHER.name.hex()}.run", (old_s, old_s))
    return made


def left(folder: Folder) -> set[bytes]:
    return {stored.piece.name for stored in folder.scan()}


def names(*pieces: Piece) -> set[bytes]:
    return {piece.name for piece in pieces}


def test_each_chat_is_a_line_with_its_tokens_age_and_model(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sessions", str(folder.path)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "tokens", "MiB", "unused", "for", "model"]
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows.keys() == {piece.name.hex()[:12] for piece in (LONG, SHORT, OTHER)}
    assert rows[LONG.name.hex()[:12]][0] == "356"
    assert rows[OTHER.name.hex()[:12]][2:] == ["2.0", "days", "a", "model"]


def test_what_other_chats_share_stays(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sessions", str(folder.path), "--delete", LONG.name.hex()[:12]]) == 0
    assert left(folder) == names(FIRST, SHORT, OTHER)
    assert run(["sessions", str(folder.path), "--delete", SHORT.name.hex()[:12]]) == 0
    assert left(folder) == names(OTHER)
    assert capsys.readouterr().out == "deleted 1 of 3 chats\ndeleted 1 of 2 chats\n"


def test_chats_that_were_of_no_use_for_some_days_are_deleted(folder: Folder) -> None:
    assert run(["sessions", str(folder.path), "--older-than", "1.5"]) == 0
    assert left(folder) == names(FIRST, LONG, SHORT)


def test_what_else_is_kept_of_a_chat_belongs_to_it(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    text = [*range(1000, 1400)]
    window = piece_of([*text[:40], *text[120:], *range(2000, 2050)])  # The chat, once its oldest message had gone.
    state, older = piece_of(window.token_ids[:300], is_whole=True), piece_of(text)
    begun = piece_of([*text[:40], *text[130:200]])  # A window that is being computed again.
    for piece in (state, older, window, begun):
        folder.write(piece, bytes_of(piece), FINGERPRINT, "a model")
    minute_ago_s = (folder.path / f"{window.name.hex()}.run").stat().st_mtime - 60
    os.utime(folder.path / f"{older.name.hex()}.run", (minute_ago_s, minute_ago_s))
    foreign = piece_of(window.token_ids[:200])
    folder.write(foreign, bytes_of(foreign), b"other weights", "another model")
    assert run(["sessions", str(folder.path)]) == 0
    rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows.keys() == {piece.name.hex()[:12] for piece in (LONG, SHORT, OTHER, window, foreign)}
    assert rows[window.name.hex()[:12]] == "370"
    assert run(["sessions", str(folder.path), "--delete", window.name.hex()[:12]]) == 0
    assert left(folder) == names(FIRST, LONG, SHORT, OTHER, foreign)


def test_all_is_deleted_also_what_can_not_be_read(folder: Folder) -> None:
    (folder.path / ("0" * 40 + ".run")).write_bytes(b"of an older format")
    assert run(["sessions", str(folder.path), "--delete", "all"]) == 0
    assert os.listdir(folder.path) == ["tightrope-sessions"]
    assert run(["sessions", str(folder.path)]) == 0


@pytest.mark.parametrize(
    ("more", "said", "status"),
    [
        (["--delete", "zzzz"], "no chat is called so", 2),
        (["--delete", "../../x"], "no chat is called so", 2),
        (["--older-than", "-1"], "a number of days is expected", 2),
    ],
)
def test_what_can_not_be_meant_is_told_in_one_line(
    folder: Folder, more: list[str], said: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sessions", str(folder.path), *more]) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert left(folder) == names(FIRST, LONG, SHORT, OTHER)


@pytest.mark.parametrize("chosen", [("--delete", "all"), ("--older-than", "1.5")])
def test_what_can_not_be_deleted_is_told_in_one_line(
    chosen: tuple[str, str], folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str, dir_fd: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "unlink", refuse)
    assert run(["sessions", str(folder.path), *chosen]) == 1
    told = capsys.readouterr()
    assert told.err == f"tightrope: {folder.path}: chats can't be deleted: Read-only file system\n"
    assert told.out == ""


def test_a_folder_that_is_none_of_chats_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    told = {
        "none": "no such folder",
        "mine": "no folder of chats, which would hold tightrope-sessions; name the one that --session-dir named",
    }
    for name, said in told.items():
        assert run(["sessions", str(tmp_path / name)]) == 1
        assert capsys.readouterr().err == f"tightrope: {tmp_path / name}: {said}\n"
    assert not [*(tmp_path / "mine").iterdir()]
