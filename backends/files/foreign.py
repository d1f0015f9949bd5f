"""What a person has in hand when it is no model that is served: told by the names of files, and by how one begins."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from tightrope.backends.errors import BackendError
from tightrope.backends.files.opened import open_file

CONSOLIDATED = "consolidated"  # The weight files of Mistral's and Meta's own layouts begin so.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# how files begin that llama.cpp wrote before GGUF, as little-endian words; the last one is an adapter
_GGML = {b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt", b"algg": "ggla"}

_HUGGING_FACE = "the same model in Hugging Face's layout (config.json, model*.safetensors) or as GGUF is served"
_OLD_GGML = (
    "convert it with convert_llama_ggml_to_gguf.py of an older llama.cpp, or download the model as GGUF or safetensors"
)

_STARTS = {
    b"PK\x03\x04": "it is a zip archive or pickled PyTorch weights, which are never loaded, as they can run code",
    b"\x80\x02": "it is pickled weights, which are never loaded, as they can run code",
    b"\x1f\x8b": "it is a gzip archive; unpack it first",
    b"\xfd7zXZ": "it is an xz archive; unpack it first",
    b"7z\xbc\xaf": "it is a 7z archive; unpack it first",
    b"Rar!": "it is a rar archive; unpack it first",
}
SNIFFED = 256  # `told_by_start` wants to see so many bytes from the start.
_SHOWN = 40  # A line shows so many of them.

# what quantizers measured; a name that tells a number of bits is a model's, made with its help
_STATISTICS = re.compile(r"imatrix.*\.gguf|(?!.*(q\d|f16|f32)).*[-_.]imatrix\.gguf")

# (pattern of a file's name, what it is): other engines' formats, which stand alone in a folder
_OTHERS: tuple[tuple[str, str], ...] = (
    (r"weights(\.\d+)?\.npz", f"a model for MLX (weights.npz); {_HUGGING_FACE}"),
    (r"mlc-chat-config\.json|params_shard_\d+\.bin", f"a model compiled for MLC-LLM; {_HUGGING_FACE}"),
    (r"(.*\.)?onnx", f"an ONNX model; {_HUGGING_FACE}"),
    (r"openvino_model\.xml", f"an OpenVINO model; {_HUGGING_FACE}"),
    (r".*\.engine", f"an engine of TensorRT-LLM; {_HUGGING_FACE}"),
    (r"tf_model\.h5", f"TensorFlow weights; {_HUGGING_FACE}"),
    (r"flax_model.*\.msgpack", f"Flax weights; {_HUGGING_FACE}"),
    (r"shared_vocabulary\.(json|txt)", f"a model converted for CTranslate2; {_HUGGING_FACE}"),
    (r"model_index\.json", "a pipeline of diffusers, which makes images; language models are served"),
)


def names_in(folder: Path) -> list[str]:
    """The names of what a folder holds, sorted. Raises BackendError for one that can't be read."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise BackendError(f"{folder}: can't be read: {error.strerror or error}") from None


def is_image_half(name: str) -> bool:
    """Whether a GGUF file's name says that it holds the image half of a model: uploaders put the word anywhere."""
    return "mmproj" in name.lower()


def model_files(names: Iterable[str]) -> list[str]:
    """Of the paths of a folder or a repository the GGUF models, sorted, each split one by its first part.

    Image halves are none, and neither are the statistics that quantizers write (imatrix).
    """
    found = []
    for path in names:
        name = path.rpartition("/")[2]
        is_later_part = "-of-" in name and "-00001-of-" not in name
        is_other = is_later_part or is_image_half(name) or _STATISTICS.fullmatch(name.lower()) is not None
        if name.lower().endswith(".gguf") and not is_other:
            found.append(path)
    return sorted(found)


def what_it_is(names: Collection[str]) -> str | None:
    """What files of these names are, and what would be right: the end of a line. None for nothing that is known.

    To be asked when neither a GGUF file nor safetensors in Hugging Face's layout are among them.
    """
    if "adapter_config.json" in names:
        return "a LoRA adapter, no model: serve the model that it was made for, and name this one with --lora NAME=PATH"
    if "adapter_model.safetensors" in names or "adapter_model.bin" in names:
        return "a LoRA adapter, no model, and its adapter_config.json is missing: download or copy it again"
    own = [name for name in sorted(names) if name.startswith(CONSOLIDATED)]
    if any(name.endswith(".safetensors") for name in own):
        return (
            f"a model in Mistral's own layout (params.json, {own[0]}): download the files in Hugging Face's layout "
            "(config.json, model*.safetensors), or convert it with transformers' convert_mistral_weights_to_hf.py"
        )
    if own and "params.json" in names:
        return (
            f"a model in Meta's own layout (params.json, {own[0]}), with weights that are pickled: download the files "
            "in Hugging Face's layout, or convert it with transformers' convert_llama_weights_to_hf.py"
        )
    cut = [name for name in sorted(names) if re.search(r"\.gguf[-.](split|part)", name.lower())]
    if cut:
        return f"a GGUF file that was cut up to be uploaded ({cut[0]}): join its parts with cat, in order"
    for name in sorted(names):
        if name.lower().endswith(".gguf") and is_image_half(name):
            return f"the image half of a model alone ({name}): add the language model's .gguf file"
        if name.lower().endswith(".gguf") and "-of-" in name:
            return f"a part of a GGUF model ({name}) without the first one; download or copy the model again"
    for name in sorted(names):
        if "ggml" in name.lower() and name.endswith(".bin"):
            return f"a model in llama.cpp's format from before GGUF ({name}): {_OLD_GGML}"
    for name in sorted(names):
        if _STATISTICS.fullmatch(name.lower()):
            return f"an importance matrix alone ({name}), which only quantizers read: add the model's .gguf file"
    for pattern, what in _OTHERS:
        if any(re.fullmatch(pattern, name.lower()) for name in names):
            return what
    if any(name.endswith(".safetensors.index.json") for name in names):
        return "an index without any of the .safetensors files that it names; download or copy the model again"
    return None


def told_by_start(start: bytes, num_bytes: int, *, is_json: bool = False) -> str | None:
    """What a file of `num_bytes` bytes that can't be read is, and what to do, as the end of a line; None if unknown.

    is_json: it should be JSON, so that of one that begins as such nothing is told.
    """
    if num_bytes == 0:
        return "it is empty; copy or download it again"
    for head, words in _STARTS.items():
        if start.startswith(head):
            return words
    if not start.strip(b"\0"):
        return "it begins with zeros, as downloads that were broken off do; download it again"
    if re.match(rb"\s*(<!doctype|<html|<\?xml)", start, re.IGNORECASE):
        return "it is a web page, perhaps of a failed download; download the file itself"
    if is_json and start.lstrip()[:1] in (b"{", b"["):
        return None
    if all(0x20 <= byte < 0x7F or byte in b"\t\r\n" for byte in start[:_SHOWN]):
        return f"it is a text, perhaps of a failed download: {start[:_SHOWN]!r}; download the file itself"
    return None


def check_is_no_ggml(path: Path) -> None:
    """Raise BackendError for a file in one of llama.cpp's formats from before GGUF."""
    with open_file(path) as file:
        kind = _GGML.get(file.read(4))
    if kind == "ggla":
        raise BackendError(f"{path}: a LoRA adapter in llama.cpp's format from before GGUF; make it anew as GGUF")
    if kind is not None:
        raise BackendError(f"{path}: a model in llama.cpp's format from before GGUF ({kind}): {_OLD_GGML}")


def no_weights(folder: Path, names: Collection[str]) -> BackendError | None:
    """Why a folder of these files has no weights that are served; None where nothing among them says.

    To be asked like what_it_is.
    """
    if (what := what_it_is(names)) is not None:
        return BackendError(f"{folder}: {what}")
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        return BackendError(
            f"{folder / pickles[0]}: pickled weights can run code when they are read, so they are not; "
            "convert the model to safetensors"
        )
    if "config.json" in names:
        return BackendError(f"{folder}: holds no .safetensors file; download or copy the model's weights too")
    return None
