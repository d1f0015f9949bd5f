"""What `plan` and `serve` both ask of a GGUF file before anything else: whether it is a model for chats at all."""

import re
from pathlib import Path

from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import Header, read_header
from tightrope.backends.files.gguf.vocabulary import TOKENS
from tightrope.backends.gguf.layout import EXPERTS
from tightrope.backends.gguf.shape import ModelShape
from tightrope.backends.settings import ModelSettings, written

# general.type -> what such a file is; older files are told by their architecture
_OTHER_TYPES = {
    "adapter": "a LoRA adapter, no model: name it with --lora beside its base model",
    "mmproj": "the image half of a model (mmproj); name the language model's own file",
    "imatrix": "an importance matrix, no model: only the tools that quantize use it",
}
_OTHER_ARCHITECTURES = {
    "clip": _OTHER_TYPES["mmproj"],
    "controlvector": "a control vector, no model: it changes the answers of one",
}
_POOLED = {1: "mean", 2: "cls", 3: "last", 4: "rank"}  # One vector is made of a text's in these ways.


def notes_on(settings: ModelSettings) -> tuple[str, ...]:
    """What the start says of settings that change nothing for a GGUF file."""
    idle = [f"{given} changes nothing: llama.cpp has types of its own" for given in settings.types_on_a_card]
    if settings.batch_invariant:
        idle.append("--batch-invariant changes nothing: llama.cpp has sums of its own")
    return tuple(idle)


def read_model(path: Path, settings: ModelSettings) -> Header:
    """The header of a model that could be served as `settings` want it.

    Raises BackendError, in one line with the file's name, for everything that a header shows to be wrong. What only
    llama.cpp knows, such as the tensors that an architecture needs, is asked by `try_load`.
    """
    if settings.quantize is not None:
        raise BackendError(
            f"--quantize {settings.quantize}: llama.cpp, which runs GGUF files, has types of its own; leave it out"
        )
    header = read_header(path)
    architecture = header.metadata.get("general.architecture")
    other = _OTHER_TYPES.get(str(header.metadata.get("general.type"))) or _OTHER_ARCHITECTURES.get(str(architecture))
    if other is not None:
        raise BackendError(f"{path}: {other}")
    if not header.tensors:
        raise BackendError(f"{path}: no model to chat with: it holds no tensors, perhaps a vocabulary alone")
    pooling = header.metadata.get(f"{architecture}.pooling_type", 0)
    if isinstance(pooling, int) and pooling in _POOLED:
        raise BackendError(
            f"{path}: no model to chat with: it makes vectors of texts ({architecture}.pooling_type is {pooling}, "
            f"{_POOLED[pooling]})"
        )
    if TOKENS not in header.metadata or header.metadata.get("tokenizer.ggml.model") in ("none", "no_vocab"):
        raise BackendError(f"{path}: it holds no vocabulary ({TOKENS}); convert the model anew")
    ModelShape.of(header)
    _check_cards(settings)
    if settings.n_cpu_moe and not settings.gpu_layers:
        raise BackendError(
            f"n_cpu_moe is {settings.n_cpu_moe}, but no layer is on a card; add --gpu-layers, or leave it out"
        )
    if settings.n_cpu_moe and not any(re.search(EXPERTS, tensor.name) for tensor in header.tensors):
        raise BackendError(f"{path}: n_cpu_moe is {settings.n_cpu_moe}, but the model has no experts; leave it out")
    return header


def _check_cards(settings: ModelSettings) -> None:
    """Raise BackendError for options about several cards that say nothing together with the others."""
    if settings.gpu_split is not None:
        raise BackendError(
            f"--gpu-split {written(settings.gpu_split)}: it lays out a folder's model; a GGUF file's layers go to "
            "cards by --gpu-layers -1, and are shared out among them by --tensor-split"
        )
    shares = written(settings.tensor_split)
    given = [f"--tensor-split {shares}"] if shares else []
    given += [] if settings.split_mode == "layer" else [f"--split-mode {settings.split_mode}"]
    if given and not settings.gpu_layers:
        raise BackendError(f"{given[0]}, but no layer is on a card; add --gpu-layers -1 for all, or leave it out")
    if shares and settings.split_mode == "none":
        raise BackendError(f"--tensor-split {shares} shares out among cards, and --split-mode none takes one; give one")
