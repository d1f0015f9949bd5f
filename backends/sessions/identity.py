"""What tells a model's numbers from all others': a hash of its files, taken once as long as these stay as they are."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import msgspec

from tightrope.backends.files.opened import open_file
from tightrope.backends.sessions.folder import Folder

MIB = 1 << 20
MOST_HASHES = 256  # Files of some dozen models.
_Hashes = dict[str, str]


def files_identity(files: Sequence[Path], folder: Folder) -> bytes:
    """A hash of the files' contents in this order. Raises BackendError as open_file.

    The folder remembers the hash of a file by what the system changes with every write to it, so that a large model is
    read for it once.
    """
    known = _known(folder)
    keys = [_key(file) for file in files]
    missing = [(key, file) for key, file in zip(keys, files, strict=True) if key not in known]
    with ThreadPoolExecutor(max_workers=4) as pool:  # Hashing lets other threads run.
        found = dict(zip((key for key, _ in missing), pool.map(_hash, (file for _, file in missing)), strict=True))
    if found:
        kept = list({**known, **found}.items())[-MOST_HASHES:]
        folder.remember(msgspec.json.encode(dict(kept)))
    hashes = {**known, **found}
    return sha256("".join(hashes[key] for key in keys).encode()).digest()


def _known(folder: Folder) -> _Hashes:
    try:
        return msgspec.json.decode(folder.remembered(), type=_Hashes)
    except msgspec.MsgspecError:
        return {}


def _key(file: Path) -> str:
    """A write changes the time of the last change of status, which nobody can set."""
    status = os.stat(file)
    return f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"


def _hash(path: Path) -> str:
    digest = sha256()
    with open_file(path) as file:
        while part := file.read(MIB):
            digest.update(part)
    return digest.hexdigest()
