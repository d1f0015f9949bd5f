"""The folder of a server's chats: one file a piece, whole or absent, for its owner alone, bounded.

Everything is done relative to the open folder, and no link is followed: not the folder itself, nor a file in it.
"""

import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tightrope.backends.errors import BackendError
from tightrope.backends.sessions.piece import NAME_BYTES, Bytes, Piece
from tightrope.backends.sessions.piece_file import (
    Header,
    is_stored_otherwise,
    read_header,
    read_payload,
    write_piece,
)

MARK = "tightrope-sessions"  # A file of this name says that the folder is one of chats.
MEMORY, MAX_MEMORY = "tightrope-hashes", 1 << 20
SUFFIX = ".run"
TRIMMED = 0.95  # A full folder is emptied to this share of what it may hold.
ALONE_S = 5.0  # To make room for a piece and give it its name takes milliseconds.
OLD_S = 600.0  # A file that was begun so long ago will not be finished any more.
_PIECE = re.compile(rf"[0-9a-f]{{{2 * NAME_BYTES}}}\{SUFFIX}")
_UNFINISHED = re.compile(rf"\.([0-9a-f]{{{2 * NAME_BYTES}}}|{MEMORY})\.[0-9]+")
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Stored:
    """A file of the folder: the piece in it, when it was last of use (seconds since 1970), and its size in bytes."""

    header: Header
    piece: Piece
    used_s: float
    size: int


class Folder:
    """An open folder of chats. Methods but `close` may be used from any thread."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        """Open it, making it if need be. Raises BackendError where it is no such folder, or not ours alone."""
        self.path = path
        if create:
            _make(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise BackendError(f"{path}: no such folder") from None
        except NotADirectoryError:
            raise BackendError(f"{path}: no folder, or a link to one; name the folder of chats itself") from None
        except OSError as error:
            what = "a link; name the folder itself" if path.is_symlink() else error.strerror
            raise BackendError(f"{path}: can't be opened as a folder of chats: {what}") from None
        try:
            self._check(create=create)
        except BackendError:
            os.close(self._fd)
            raise

    def _check(self, *, create: bool) -> None:
        status = os.fstat(self._fd)
        if status.st_uid != os.geteuid():
            raise BackendError(f"{self.path}: belongs to another user; chats are kept in a folder of one's own alone")
        names = os.listdir(self._fd)
        if MARK not in names:
            if {*names} - {*self._names(unfinished=True), MEMORY} or not create:
                right = "name an empty one" if create else "name the one that --session-dir named"
                raise BackendError(f"{self.path}: no folder of chats, which would hold {MARK}; {right}")
            with suppress(OSError):  # Another server has just done so, or it is said when a chat can't be written.
                os.close(os.open(MARK, _WRITE, 0o600, dir_fd=self._fd))
        if status.st_mode & 0o077:
            try:
                os.fchmod(self._fd, 0o700)
            except OSError as error:
                reason = f"others may read it, and that can't be changed: {error.strerror}"
                raise BackendError(f"{self.path}: {reason}") from None

    def close(self) -> None:
        os.close(self._fd)

    def write(
        self,
        piece: Piece,
        payload: Bytes,
        fingerprint: bytes,
        model: str,
        make_room: Callable[[int], None] = lambda size: None,
    ) -> int:
        """Store a piece, and return the size of its file; it is whole now, and was absent before. Raises OSError.

        make_room: called with the size before that, while no other process stores one.
        """
        unfinished = _unfinished(piece.name.hex())
        file = os.open(unfinished, _WRITE, 0o600, dir_fd=self._fd)
        try:
            try:
                size = write_piece(file, piece, payload, fingerprint, model)
                os.utime(file, ns=(time.time_ns(),) * 2)  # A file system's own clock may tick in hundredths of seconds.
                os.fsync(file)
            finally:
                os.close(file)
            with self._alone():
                make_room(size)
                os.rename(unfinished, _file_of(piece.name), src_dir_fd=self._fd, dst_dir_fd=self._fd)
            os.fsync(self._fd)
        except BaseException:
            self._unlink(unfinished)
            raise
        return size

    def read(self, piece: Piece, fingerprint: bytes) -> Bytes | None:
        """The bytes of a piece; None where its file is gone, or isn't what it should be, which is then removed.

        None, too, where another process has stored the same tokens in its own way meanwhile.
        """
        name = _file_of(piece.name)
        try:
            file, status = self._open(name)
        except OSError:
            return None
        try:
            if status is not None and is_stored_otherwise(file, status.st_size, piece, fingerprint):
                return None
            payload = None if status is None else read_payload(file, status.st_size, piece, fingerprint)
        except (OSError, MemoryError):
            return None
        finally:
            os.close(file)
        if payload is None:
            self._unlink(name)
        return payload

    def remove(self, name: bytes) -> None:
        """Delete a piece, if there is one and it can be deleted."""
        self._unlink(_file_of(name))

    def delete(self, name: bytes) -> None:
        """Delete a piece, if there is one. Raises OSError."""
        self._delete(_file_of(name))

    def clear(self) -> None:
        """Delete all pieces, also those that can't be read. Raises OSError."""
        for name in self._names(unfinished=True):
            self._delete(name)

    def touch(self, name: bytes) -> None:
        """Say that a piece is of use now."""
        with suppress(OSError):  # It was deleted meanwhile, or nothing can be written there.
            os.utime(_file_of(name), ns=(time.time_ns(),) * 2, dir_fd=self._fd, follow_symlinks=False)

    def leave_memory(self, name: bytes) -> None:
        """Have the system read a piece from the disk the next time, as far as it can."""
        with suppress(OSError, AttributeError):  # Not every system has the call.
            file, _ = self._open(_file_of(name))
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)

    def remembered(self) -> bytes:
        """What `remember` was given last; nothing where that can't be read."""
        try:
            file, status = self._open(MEMORY)
        except OSError:
            return b""
        try:
            return b"" if status is None else os.pread(file, min(status.st_size, MAX_MEMORY), 0)
        except OSError:
            return b""
        finally:
            os.close(file)

    def remember(self, data: bytes) -> None:
        """Keep a few bytes beside the pieces, if that can be done."""
        unfinished = _unfinished(MEMORY)
        with suppress(OSError):
            file = os.open(unfinished, _WRITE, 0o600, dir_fd=self._fd)
            try:
                os.write(file, data)
            finally:
                os.close(file)
            os.rename(unfinished, MEMORY, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def scan(self) -> Iterator[Stored]:
        """All files that say they are pieces, in no order. What can't be read is left out."""
        return (stored for name in self.names() if (stored := self.look_at(name)) is not None)

    def names(self) -> Iterator[bytes]:
        """Those of all files that may be pieces."""
        return (bytes.fromhex(name.removesuffix(SUFFIX)) for name in self._names())

    def look_at(self, name: bytes) -> Stored | None:
        """What the file of this name says that it is; None where it can't be read."""
        try:
            file, status = self._open(_file_of(name))
        except OSError:
            return None
        try:
            found = None if status is None else read_header(file, status.st_size)
        except OSError:
            return None
        finally:
            os.close(file)
        if found is None or status is None or found[1].name != name:
            return None
        return Stored(*found, status.st_mtime, status.st_size)

    def changed_ns(self) -> int:
        """When a file has come or gone last, by the clock of whoever keeps the folder; in nanoseconds."""
        try:
            return os.fstat(self._fd).st_mtime_ns
        except OSError:
            return 0

    def trim(self, max_bytes: int) -> list[bytes]:
        """Delete what was of no use for longest, where all files take more than so many bytes; names of what is gone.

        What others have begun to write and will not finish goes, too.
        """
        files: list[tuple[int, str, int]] = []
        for name in self._names(unfinished=True):
            try:
                status = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
            except OSError:
                continue
            if name.startswith("."):
                if time.time() - status.st_mtime > OLD_S:
                    self._unlink(name)
                continue
            files.append((status.st_mtime_ns, name, status.st_size))
        used, gone = sum(size for _, _, size in files), list[bytes]()
        is_full = used > max_bytes
        for _, name, size in sorted(files):
            if not is_full or used <= TRIMMED * max_bytes:
                break
            self._unlink(name)
            used -= size
            gone.append(bytes.fromhex(name.removesuffix(SUFFIX)))
        return gone

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process is here, or after ALONE_S: then one was stopped in it, or there are no locks here."""
        file = -1
        with suppress(OSError):
            file = os.open(MARK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
            end_s = time.monotonic() + ALONE_S
            while time.monotonic() < end_s:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(ALONE_S / 500)
        try:
            yield
        finally:
            if file >= 0:
                os.close(file)

    def _names(self, *, unfinished: bool = False) -> Iterator[str]:
        try:
            names = os.listdir(self._fd)
        except OSError:
            return
        for name in names:
            if _PIECE.fullmatch(name) or (unfinished and _UNFINISHED.fullmatch(name)):
                yield name

    def _open(self, name: str) -> tuple[int, os.stat_result | None]:
        """An open file, and what it is; None where that is no ordinary file of ours. Raises OSError."""
        file = os.open(name, _READ, dir_fd=self._fd)
        try:
            status = os.fstat(file)
        except OSError:
            os.close(file)
            raise
        is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        return file, status if is_ours else None

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def _unlink(self, name: str) -> None:
        with suppress(OSError):
            self._delete(name)


def _unfinished(name: str) -> str:
    """A name that no other process takes: in a container the next one may have the number of one that was killed."""
    return f".{name}.{int.from_bytes(os.urandom(6))}"


def _file_of(name: bytes) -> str:
    return name.hex() + SUFFIX


def _make(path: Path) -> None:
    try:
        path.mkdir(0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        raise BackendError(f"{path}: the folder above it doesn't exist") from None
    except OSError as error:
        raise BackendError(f"{path}: can't be made as a folder of chats: {error.strerror}") from None
