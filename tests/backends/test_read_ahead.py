"""Files are asked for in their order, so far ahead of the reader and no farther."""

import os
import threading
from pathlib import Path

import pytest

from tightrope.backends.files import read_ahead
from tightrope.backends.files.read_ahead import reading_ahead

pytestmark = pytest.mark.quick

Asked = list[tuple[int, int]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> "tuple[Asked, threading.Semaphore]":
    """What the system is asked for: how many bytes from where on, with a count to wait for. Pieces are of 10 bytes."""
    found: Asked = []
    count = threading.Semaphore(0)

    def advise(file: int, at: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        found.append((at, size))
        count.release()

    monkeypatch.setattr(read_ahead, "WINDOW", 30)
    monkeypatch.setattr(read_ahead, "PIECE", 10)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    return found, count


def files(folder: Path, *sizes: int) -> list[Path]:
    paths = [folder / f"{i}.safetensors" for i in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(bytes(size))
    return paths


def test_pieces_are_asked_for_up_to_the_window_ahead_of_the_reader(
    tmp_path: Path, asked: tuple[Asked, threading.Semaphore]
):
    found, count = asked
    (path,) = files(tmp_path, 100)

    with reading_ahead([(path, 5, 100)]) as ahead:
        for _ in range(3):
            assert count.acquire(timeout=30)
        ahead.reached(25)
        for _ in range(3):
            assert count.acquire(timeout=30)

    assert found == [(5 + 10 * i, 10) for i in range(6)]


def test_ranges_follow_each_other_as_they_will_be_read(tmp_path: Path, asked: tuple[Asked, threading.Semaphore]):
    found, count = asked
    first, second = files(tmp_path, 15, 100)

    with reading_ahead([(second, 50, 65), (first, 0, 4), (second, 0, 100)]) as ahead:
        for _ in range(5):
            assert count.acquire(timeout=30)
        assert found == [(50, 10), (60, 5), (0, 4), (0, 10), (10, 10)]
        ahead.reached(15)
        assert count.acquire(timeout=30)

    assert found[5:] in ([(20, 10)], [(20, 10), (30, 10)])


def test_a_missing_file_is_left_to_its_reader(tmp_path: Path):
    with reading_ahead([(tmp_path / "missing.safetensors", 0, 10)]) as ahead:
        ahead.reached(10)
