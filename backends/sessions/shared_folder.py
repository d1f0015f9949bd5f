"""What is in a folder into which several processes write, as it was when last looked at."""

import time

from tightrope.backends.sessions.folder import Folder, Stored

SETTLED_S = 1.0  # Two changes within a tick of a file system's clock have the same time; all tick faster than this.


class SharedFolder:
    """Names and sizes of the files of a folder. One thread uses it."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._sizes: dict[bytes, int] = {}
        self._changed_ns = -1  # By the clock of whoever keeps the folder, which may be another machine's.
        self._settled_s = 0.0  # What has changed before will have been seen by then.

    @property
    def used(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes.values())

    def __contains__(self, name: bytes) -> bool:
        return name in self._sizes

    def look(self) -> tuple[list[Stored], list[bytes]]:
        """The pieces that have come since the last look, those of use last at the end, and names of those that went.

        It costs one call where nothing has.
        """
        changed_ns, now_s = self._folder.changed_ns(), time.monotonic()
        if changed_ns != self._changed_ns:
            self._changed_ns, self._settled_s = changed_ns, now_s + SETTLED_S
        elif now_s > self._settled_s:
            return [], []
        names = {*self._folder.names()}
        gone = [name for name in self._sizes if name not in names]
        for name in gone:
            del self._sizes[name]
        new = [stored for name in names - self._sizes.keys() if (stored := self._folder.look_at(name)) is not None]
        self._sizes |= {stored.piece.name: stored.size for stored in new}
        return sorted(new, key=lambda stored: stored.used_s), gone

    def add(self, name: bytes, size: int) -> None:
        """This process has written a file."""
        self._sizes[name] = size

    def remove(self, name: bytes) -> None:
        """This process has deleted a file, which another may write again."""
        self._sizes.pop(name, None)

    def forget(self, name: bytes) -> None:
        """A file isn't what it was when looked at: it is to be looked at again."""
        self.remove(name)
        self._changed_ns = -1
