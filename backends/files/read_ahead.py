"""Parts of files that will be read, asked for before they are needed.

Who unpacks a matrix in a mapped file touches it here and there, and waits for each piece of a disk that could read on.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from tightrope.backends.errors import BackendError
from tightrope.backends.files.opened import open_file

WINDOW = 256 << 20  # bytes: how far ahead of the reader
PIECE = 128 << 10  # Asked for at a time: of a larger piece Linux reads no more than a disk's read_ahead_kb, often that.


Range = tuple[Path, int, int]  # bytes begin .. end of a file


class ReadAhead:
    """A thread that asks the system for `ranges` in this order, WINDOW bytes ahead of the reader and no farther."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        self._ranges = ranges
        self._limit, self._moved = WINDOW, threading.Condition()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)

    def start(self) -> None:
        if hasattr(os, "posix_fadvise"):
            self._thread.start()

    def reached(self, num_bytes: int) -> None:
        """The reader has had so many bytes of the ranges."""
        with self._moved:
            self._limit = num_bytes + WINDOW
            self._moved.notify()

    def stop(self) -> None:
        with self._moved:
            self._is_over = True
            self._moved.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        done = 0
        with ExitStack() as stack:
            files: dict[Path, BinaryIO] = {}
            for path, begin, end in self._ranges:
                try:
                    if path not in files:
                        files[path] = stack.enter_context(open_file(path))
                    for at in range(begin, end, PIECE):
                        if not self._is_wanted(done + at - begin):
                            return
                        size = min(PIECE, end - at)
                        os.posix_fadvise(files[path].fileno(), at, size, os.POSIX_FADV_WILLNEED)
                except (OSError, BackendError):
                    return  # Whoever reads the file says what is wrong with it.
                done += end - begin

    def _is_wanted(self, place: int) -> bool:
        """Wait until the reader is near; False when it is to stop."""
        with self._moved:
            self._moved.wait_for(lambda: self._is_over or place < self._limit)
            return not self._is_over


@contextmanager
def reading_ahead(ranges: Sequence[Range]) -> Iterator[ReadAhead]:
    """Ask for these bytes while the block runs."""
    ahead = ReadAhead(ranges)
    ahead.start()
    try:
        yield ahead
    finally:
        ahead.stop()
