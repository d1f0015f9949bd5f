"""RunStore: what has left the cache, or is to outlive it, in the host's memory and in a folder.

The loop puts pieces in and asks for them; a thread beside it writes them to the folder, and another reads them ahead.
What is not yet written stays in memory until it is, and what memory has no room for is not kept: it can be computed
again.
"""

import errno
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from operator import itemgetter
from weakref import WeakSet

from tightrope.backends.holdings import COPY_SHARE, Holdings
from tightrope.backends.removals import num_left
from tightrope.backends.sessions.catalogue import Catalogue, Match, Usable
from tightrope.backends.sessions.folder import Folder
from tightrope.backends.sessions.piece import Bytes, Ints, Piece, has_moved_on, num_common, root_name, tokens_of
from tightrope.backends.sessions.shared_folder import SharedFolder

log = logging.getLogger("tightrope.sessions")

LOOK_S = 0.25  # So often the folder is looked at for what other servers have written.
MIN_SHARED = 16  # So many tokens at the front have two windows of one chat in common: a system message at least.
MOST_WINDOWS = 2  # Windows that a chat has moved on from; of more the disk would be full before other chats had room.


class RunStore:
    """Pieces for one model. The methods but `flush` belong to the loop's thread."""

    def __init__(
        self,
        host_bytes: int,
        fingerprint: bytes = b"",
        model: str = "",
        folder: Folder | None = None,
        disk_bytes: int = 0,
    ) -> None:
        """host_bytes, disk_bytes: bounds. fingerprint, model: see Header. Without a folder all is in memory alone."""
        self.host_bytes = host_bytes
        self.read_share = COPY_SHARE
        self._fingerprint, self._model = fingerprint, model
        self._folder, self._disk_bytes = folder, disk_bytes
        self._lock = threading.RLock()  # Of all that follows; to tell what of a piece is usable may take another look.
        self._catalogue = Catalogue()
        self._host: OrderedDict[bytes, Bytes] = OrderedDict()  # They stand least recently used first.
        self._host_used = 0
        self._written: set[bytes] = set()
        self._unwritten: set[bytes] = set()
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._has_failed = False  # The last write has.
        self._fetching: set[bytes] = set()  # These are being read, or wait for it.
        self._unfetchable: set[bytes] = set()  # Memory had no room for these, or they couldn't be read.
        self._to_read: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._reader: threading.Thread | None = None
        if folder is not None:
            self._shared = SharedFolder(folder)
            self._look()
            self._writer = threading.Thread(target=self._write_all, name="sessions", daemon=True)
            self._writer.start()
            self._reader = threading.Thread(target=self._read_all, name="sessions-read", daemon=True)
            self._reader.start()
            _stores.add(self)
            self._queue.put(lambda: self._make_disk_room(0))

    @property
    def outlives(self) -> bool:
        """Whether what is put in is there in the next process, too."""
        return self._folder is not None

    @property
    def num_pieces(self) -> int:
        return len(self._catalogue)

    @property
    def host_used(self) -> int:
        """Bytes in the host's memory."""
        return self._host_used

    def faults(self) -> Iterator[str]:
        """What contradicts itself, a line each."""
        with self._lock:
            used = sum(payload.nbytes for payload in self._host.values())
            if used != self._host_used or used > self.host_bytes:
                yield f"{used} bytes are kept beside the cache, {self._host_used} are counted, of {self.host_bytes}"
            if any(name not in self._catalogue for name in (*self._host, *self._written)):
                yield "a piece is kept beside the cache, and can't be found"

    def report_to(self, holdings: Holdings) -> None:
        """Tell from now on what is here, in memory or on disk."""
        holdings.fingerprint, holdings.read_share = self._fingerprint, self.read_share
        with self._lock:
            self._catalogue.report_to(holdings)

    def root(self, *parts: str | bytes) -> bytes:
        """The name under which texts of this model begin that may share pieces: see root_name."""
        return root_name(self._fingerprint, *parts)

    def covering(self, piece: Piece) -> Piece | None:
        """What is there and makes a piece needless."""
        with self._lock:
            return self._catalogue.covering(piece)

    def covers(self, piece: Piece) -> bool:
        """Whether there is nothing to be gained by putting a piece in."""
        return self.covering(piece) is not None

    def forget(self, piece: Piece) -> None:
        """Let one go, so that another can be put in under its name."""
        with self._lock:
            self._delete(piece.name)

    def put(self, piece: Piece, payload: Bytes, behind: Collection[Piece] = ()) -> bool:
        """Keep a piece, in place of its own beginnings; False where it has no room beside those it is behind."""
        with self._lock:
            if piece.name in self._catalogue:
                return True
            if payload.nbytes > self.host_bytes:
                return False
            self._make_room(payload.nbytes, self._unwritten.union(other.name for other in behind))
            if self._host_used + payload.nbytes > self.host_bytes:
                return False
            for needless in self._catalogue.beginnings_of(piece):
                self._drop_host(needless.name)
                if needless.name not in self._written:  # Else it goes once this one is written.
                    self._unwritten.discard(needless.name)
                    self._catalogue.remove(needless.name)
            self._catalogue.add(piece)
            self._host[piece.name] = payload
            self._host_used += payload.nbytes
            if self._folder is not None:
                self._unwritten.add(piece.name)
                self._queue.put(partial(self._write, piece))
        return True

    def longest(self, root: bytes, wanted: Ints, usable: Usable = lambda piece, length: length) -> list[Match]:
        """See Catalogue."""
        with self._lock:
            return self._catalogue.longest(root, wanted, usable)

    def texts(self, root: bytes, wanted: Ints, num_common_least: int) -> list[list[Piece]]:
        """See Catalogue."""
        with self._lock:
            return list(self._catalogue.texts(root, wanted, num_common_least))

    def source(self, root: bytes, wanted: Ints, num_least: int) -> tuple[list[Piece], int]:
        """The text of which removals leave most of `wanted`, and how many of its first tokens those are.

        No text, and 0, where that is less than `num_least`.
        """
        texts = self.texts(root, wanted, MIN_SHARED)
        lengths = ((num_left(tokens_of(text), wanted), text) for text in texts)
        length, text = max(lengths, key=itemgetter(0), default=(0, []))
        return (text, length) if length >= num_least else ([], 0)

    def retire(self, root: bytes, token_ids: Ints) -> None:
        """Forget windows that a text has moved on from, but for the latest of them."""
        texts = self.texts(root, token_ids, MIN_SHARED)
        older = [text for text in texts if has_moved_on(tokens_of(text), token_ids)]
        with self._lock:
            for piece in (piece for text in older[MOST_WINDOWS:] for piece in reversed(text)):
                if not self._catalogue.goes_on(piece):
                    self._delete(piece.name)

    def retire_beginnings(self, root: bytes, token_ids: Ints, most: int) -> None:
        """Forget states that a text has gone on from, but for so many of the latest."""
        with self._lock:
            states = [piece for piece in self._catalogue.roots(root) if piece.is_whole and piece.stop < len(token_ids)]
            mine = [piece for piece in states if num_common(piece.token_ids, token_ids) == piece.stop]
            for piece in sorted(mine, key=lambda piece: -piece.stop)[most:]:
                self._delete(piece.name)

    def read(self, piece: Piece) -> Bytes | None:
        """The bytes of a piece; None where they can't be had any more."""
        with self._lock:
            payload = self._host.get(piece.name)
        if payload is None and self._folder is not None:
            payload = self._folder.read(piece, self._fingerprint)
        with self._lock:
            self._unfetchable.discard(piece.name)
            if payload is None:
                self._written.discard(piece.name)
                self._catalogue.remove(piece.name)
                self._queue.put(partial(self._look_anew, piece.name))
        return payload

    def fetch(self, pieces: Sequence[Piece]) -> bool:
        """Have pieces read beside the loop; whether the first of them can be had at once, or not sooner by waiting."""
        if self._folder is None or not pieces:
            return True
        with self._lock:
            for piece in pieces:
                name = piece.name
                if name in self._written and not (
                    name in self._host or name in self._fetching or name in self._unfetchable
                ):
                    self._fetching.add(name)
                    self._to_read.put(piece)
            return pieces[0].name not in self._fetching

    def use(self, pieces: Sequence[Piece]) -> None:
        """Have these go last: the first of them, on which the others depend, at the very last."""
        names = [piece.name for piece in reversed(pieces)]
        with self._lock:
            for name in names:
                if name in self._host:
                    self._host.move_to_end(name)
        if self._folder is not None and names:
            self._queue.put(lambda: self._touch(names))

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was put in before is written; False if that takes longer. May be called by any thread."""
        if self._writer is None:
            return True
        done = threading.Event()
        self._queue.put(done.set)
        return done.wait(timeout_s)

    def close(self) -> None:
        """Write what rests, and end the thread."""
        if self._writer is not None and self._reader is not None:
            self._queue.put(None)
            self._to_read.put(None)
            self._writer.join()
            self._reader.join()
            self._writer = self._reader = None

    def _delete(self, name: bytes) -> None:
        self._drop_host(name)
        self._unwritten.discard(name)
        self._catalogue.remove(name)
        if name in self._written:
            self._written.discard(name)
            self._queue.put(partial(self._remove, name))

    # --- memory -------------------------------------------------------------------------------------------------------

    def _make_room(self, num_bytes: int, kept: Collection[bytes]) -> None:
        for name in [name for name in self._host if name not in kept]:
            if self._host_used + num_bytes <= self.host_bytes:
                return
            self._drop_host(name)
            if name not in self._written:
                self._catalogue.remove(name)

    def _drop_host(self, name: bytes) -> None:
        payload = self._host.pop(name, None)
        self._host_used -= 0 if payload is None else payload.nbytes

    # --- the threads ---------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        look_s = 0.0
        while True:
            wait_s = look_s - time.monotonic()
            try:
                job = self._queue.get(timeout=wait_s) if wait_s > 0 else self._look
            except queue.Empty:
                continue
            if job is None:
                return
            if wait_s <= 0:
                look_s = time.monotonic() + LOOK_S
            try:
                job()
            except Exception:  # Whatever it is, chats are served without what is stored.
                log.exception("a stored chat could not be written")

    def _read_all(self) -> None:
        assert self._folder is not None
        while (piece := self._to_read.get()) is not None:
            payload = self._folder.read(piece, self._fingerprint)
            with self._lock:
                self._fetching.discard(piece.name)
                if payload is not None and piece.name in self._catalogue and piece.name not in self._host:
                    self._make_room(payload.nbytes, self._unwritten)
                    if self._host_used + payload.nbytes <= self.host_bytes:
                        self._host[piece.name] = payload
                        self._host_used += payload.nbytes
                if piece.name not in self._host:
                    self._unfetchable.add(piece.name)

    def _write(self, piece: Piece) -> None:
        assert self._folder is not None
        with self._lock:
            payload = self._host.get(piece.name) if piece.name in self._unwritten else None
        if payload is None:
            return  # A longer piece has taken its place, or another server has written it.
        try:
            size = self._folder.write(piece, payload, self._fingerprint, self._model, self._make_disk_room)
        except OSError as error:
            if not self._has_failed:
                log.warning("chats are not kept on disk: %s: %s", self._folder.path, error.strerror or error)
            self._has_failed = True
            with self._lock:
                self._unwritten.discard(piece.name)  # It stays in memory as long as there is room.
            return
        self._shared.add(piece.name, size)
        if self._has_failed:
            log.warning("chats are kept on disk again: %s", self._folder.path)
            self._has_failed = False
            self._write_anew()
        with self._lock:
            self._unwritten.discard(piece.name)
            if piece.name in self._catalogue:
                self._written.add(piece.name)
                needless = [other.name for other in self._catalogue.beginnings_of(piece)]
            else:  # A longer one has taken its place meanwhile.
                needless = [piece.name]
        for name in needless:
            self._folder.remove(name)
        self._forget(needless)

    def _remove(self, name: bytes) -> None:
        assert self._folder is not None
        with self._lock:
            is_back = name in self._catalogue
        if not is_back:
            self._folder.remove(name)
            self._forget([name])

    def _write_anew(self) -> None:
        """Have written what the folder didn't take before."""
        with self._lock:
            for name in self._host:
                piece = self._catalogue.get(name)
                if piece is not None and name not in self._written and name not in self._unwritten:
                    self._unwritten.add(name)
                    self._queue.put(partial(self._write, piece))

    def _touch(self, names: list[bytes]) -> None:
        assert self._folder is not None
        for name in names:
            self._folder.touch(name)

    def _make_disk_room(self, num_bytes: int) -> None:
        """Trim the folder, which others write into as well, if it would hold too much with so many bytes more.

        Raises OSError where it would even then.
        """
        assert self._folder is not None
        if num_bytes > self._disk_bytes:
            raise OSError(errno.EFBIG, "a chat is larger than all of them may be")
        self._look()
        if not num_bytes or self._shared.used + num_bytes > self._disk_bytes:
            self._forget(self._folder.trim(self._disk_bytes - num_bytes))

    def _look(self) -> None:
        """Take in what other servers have written into the folder, and deleted from it."""
        new, gone = self._shared.look()
        self._forget(gone)
        with self._lock:
            for stored in new:
                name = stored.piece.name
                if stored.header.fingerprint == self._fingerprint:
                    self._unwritten.discard(name)
                    self._written.add(name)
                    if name not in self._catalogue:
                        self._catalogue.add(stored.piece)

    def _look_anew(self, name: bytes) -> None:
        self._shared.forget(name)
        self._look()

    def _forget(self, names: list[bytes]) -> None:
        """These are not in the folder any more."""
        with self._lock:
            for name in names:
                self._shared.remove(name)
                self._written.discard(name)
                if name not in self._host:
                    self._catalogue.remove(name)


_stores: "WeakSet[RunStore]" = WeakSet()  # Those with a folder.


def write_rest(timeout_s: float) -> None:
    """Have all stores of this process write what they were given, before it ends. May be called by any thread."""
    end_s = time.monotonic() + timeout_s
    for store in list(_stores):
        store.flush(max(0.0, end_s - time.monotonic()))
