"""What holds for adapters of every format: where they lie, what tells them apart, what memory they take together."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from tightrope.backends.errors import BackendError
from tightrope.backends.files.opened import open_file
from tightrope.backends.files.peft import WEIGHTS
from tightrope.backends.files.peft_config import CONFIG
from tightrope.backends.memory import MIB


def find_adapter(folder: str, wanted: str) -> Path:
    """The adapter at `wanted`, which is relative to `folder` or absolute, with all links followed.

    Raises BackendError unless the path and the files of an adapter behind it lie in `folder`.
    """
    root = Path(folder).expanduser().resolve()
    if ".." in Path(wanted).parts or "\0" in wanted:
        raise BackendError(f"{wanted[:200]!r} is no path within the folder of adapters; `..` is not followed")
    try:
        path = (root / wanted).resolve(strict=True)
        files = [path, *(file.resolve() for file in path.glob("adapter_*"))]
    except (OSError, RuntimeError):  # Links in a circle raise a RuntimeError.
        raise BackendError(f"{wanted[:200]!r}: no such file or folder in the folder of adapters") from None
    if not all(file.is_relative_to(root) for file in files):
        raise BackendError(f"{wanted[:200]!r} leads out of the folder of adapters")
    return path


def fingerprint(path: Path) -> str:
    """What tells an adapter's numbers from any others': a hash of the files, or the file, that hold them.

    It is to be taken before the numbers are read: if the files are exchanged in between, tokens are cached under the
    name of numbers that have gone. Raises BackendError as open_file.
    """
    digest = sha256()
    for part in (path / CONFIG, path / WEIGHTS) if path.is_dir() else (path,):
        with open_file(part) as file:
            while piece := file.read(MIB):
                digest.update(piece)
    return digest.hexdigest()


class AdapterRoom:
    """The memory that a model's adapters share, in bytes."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._taken: dict[str, int] = {}

    @contextmanager
    def taken(self, name: str, num_bytes: int) -> Iterator[None]:
        """Take room for an adapter, given back if the block raises. Raises BackendError where there is too little."""
        free = self._num_bytes - sum(list(self._taken.values()))  # It is a copy, as another thread may give room back.
        if num_bytes > free:
            raise BackendError(
                f"the adapter takes {num_bytes / MIB:.1f} MiB, and {max(0, free) / MIB:.1f} of the "
                f"{self._num_bytes / MIB:.1f} MiB for adapters are free: unload another, or raise --lora-memory-mib"
            )
        self._taken[name] = num_bytes
        try:
            yield
        except BaseException:
            self.give_back(name)
            raise

    def settle(self, name: str, num_bytes: int) -> None:
        """Say what an adapter takes in truth, where that is less than the room it was given."""
        self._taken[name] = min(num_bytes, self._taken[name])

    def give_back(self, name: str) -> None:
        """Free what an adapter had taken."""
        self._taken.pop(name, None)
