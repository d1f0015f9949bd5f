"""Files of a model, opened without trust: ordinary files only, and never more of one than was asked for."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tightrope.backends.errors import BackendError

# how a text begins that git leaves in place of a large file; source: the git-lfs specification
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """The file for reading, at its start; links are followed.

    Raises BackendError, which names the file and the reason, when there is none, when it is a folder, a pipe or a
    device, when it can't be read, now or while it is open, and when it is the pointer that git leaves without git-lfs.
    """
    try:
        # without O_NONBLOCK opening a pipe would wait for someone to write into it
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(number, "rb") as file:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                raise BackendError(f"{path}: can't be read: no ordinary file but a pipe, a device or a folder")
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise BackendError(
                    f"{path}: a git-lfs pointer in place of the file itself: fetch that with `git lfs pull`, or "
                    "download it again"
                )
            file.seek(0)
            yield file
    except FileNotFoundError:
        if path.is_symlink():
            raise BackendError(
                f"{path}: a link to {path.resolve()}, which is missing; bring that back, or download the file again"
            ) from None
        raise BackendError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise BackendError(f"{path}: can't be read: a folder, where a file is expected") from None
    except OSError as error:
        raise BackendError(f"{path}: can't be read: {error.strerror or error}") from None


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """All of a file. Raises BackendError as open_file, and when it has more than `max_bytes`."""
    with open_file(path) as file:
        raw = file.read(max_bytes + 1)
        if len(raw) > max_bytes:
            size = max(len(raw), os.fstat(file.fileno()).st_size)
            raise BackendError(f"{path}: {size} bytes are too many; at most {max_bytes} are expected")
    return raw
