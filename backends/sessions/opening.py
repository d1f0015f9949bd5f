"""The store that settings ask for."""

from collections.abc import Sequence
from pathlib import Path

from tightrope import __version__
from tightrope.backends.errors import BackendError
from tightrope.backends.protocol import Backend
from tightrope.backends.sessions.folder import Folder
from tightrope.backends.sessions.identity import files_identity
from tightrope.backends.sessions.piece import root_name
from tightrope.backends.sessions.rates import compute_seconds, read_seconds
from tightrope.backends.sessions.store import RunStore
from tightrope.backends.settings import CacheSettings

LARGEST_SHARE = 0.5  # A token is read where that takes so much of the time that computing it does, or less.
MIB = 1 << 20


def check_folder(settings: CacheSettings) -> None:
    """Raise BackendError where no chats can be kept in the folder of the settings; it takes no model to tell."""
    if settings.session_dir is not None:
        _open(settings.session_dir).close()


def open_store(
    settings: CacheSettings, run_bytes: int, backend: Backend, files: Sequence[Path], form: Sequence[str | bytes]
) -> tuple[RunStore, list[str]]:
    """A store for a loaded model, and what to say of it.

    run_bytes: of the host's memory. files: those of the model; form: what else tells how it computes and caches.
    Raises BackendError.
    """
    if settings.session_dir is None:
        return RunStore(run_bytes), []
    folder = _open(settings.session_dir)
    reading_s, computing_s = backend.card.cache_token_bytes * read_seconds(folder), compute_seconds(backend)
    times = f"a token takes {1e3 * reading_s:.3f} ms to be read, and {1e3 * computing_s:.3f} to be computed"
    if not reading_s:
        times = "how long reading takes can't be measured, as nothing can be written there"
    if reading_s > LARGEST_SHARE * computing_s:
        folder.close()
        return RunStore(run_bytes), [f"sessions: chats are not kept in {folder.path}, as {times}"]
    fingerprint = root_name(__version__, files_identity(files, folder), *form)
    store = RunStore(run_bytes, fingerprint, backend.card.model_id, folder, settings.session_disk_mib * MIB)
    store.read_share += reading_s / computing_s
    kept = f"sessions: chats are kept in {folder.path}, up to {settings.session_disk_mib} MiB"
    return store, [f"{kept}, and {run_bytes // MIB} MiB of memory; {times}"]


def _open(path: str) -> Folder:
    try:
        return Folder(Path(path).expanduser())
    except BackendError as error:
        raise BackendError(f"--session-dir: {error}") from None
