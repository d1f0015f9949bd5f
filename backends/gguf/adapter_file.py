"""GGUF files of LoRA adapters, checked by their headers against the model that they shall change.

llama.cpp ends the process, or computes nonsense, on some files that its own loader takes. Source of the layout:
convert_lora_to_gguf.py and src/llama-adapter.cpp of llama.cpp. With `alpha` y += alpha / rank * scale * B (A x), and
without y += scale * B (A x).
"""

from math import isfinite
from pathlib import Path

from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import Header, TensorInfo, read_header

ALPHA = "adapter.lora.alpha"

_TYPES = ("F32", "F16", "BF16", "Q8_0")  # A tensor may be one of these.


def read_adapter_file(path: Path, base: Header) -> Header:
    """The header of an adapter for `base`. Raises BackendError, naming file and tensor, for what is none."""
    if not path.is_file():
        raise BackendError(f"{path}: no such file")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise BackendError(f"{path}: pickled weights can run code when they are read, so they are not")
    header = read_header(path)
    _check_kind(header, base)
    known = {tensor.name: tensor for tensor in base.tensors}
    halves: dict[str, dict[str, TensorInfo]] = {}
    for tensor in header.tensors:
        name, _, part = tensor.name.rpartition(".")
        if part not in ("lora_a", "lora_b"):
            raise BackendError(f"{path}: tensor {tensor.name!r} can't be used; those named *.lora_a and *.lora_b can")
        if tensor.type_name not in _TYPES:
            raise BackendError(f"{path}: tensor {tensor.name!r} is {tensor.type_name}; {', '.join(_TYPES)} can be used")
        halves.setdefault(name, {})[part] = tensor
    if not halves:
        raise BackendError(f"{path}: holds no adapter")
    for name, parts in halves.items():
        if parts.keys() != {"lora_a", "lora_b"}:
            raise BackendError(f"{path}: {name!r} has {' and '.join(parts)} alone; an adapter has both halves")
        check_shapes(path, name, known.get(name), parts["lora_a"].dims, parts["lora_b"].dims)
    return header


def _check_kind(header: Header, base: Header) -> None:
    path, metadata = header.path, header.metadata
    kind = metadata.get("general.type")
    if kind != "adapter":
        raise BackendError(f"{path}: no adapter: general.type is {kind!r}")
    if metadata.get("adapter.type") != "lora":
        raise BackendError(f"{path}: adapter.type is {metadata.get('adapter.type')!r}; 'lora' can be served")
    theirs, ours = metadata.get("general.architecture"), base.metadata.get("general.architecture")
    if theirs != ours:
        raise BackendError(f"{path}: an adapter for a model of architecture {theirs!r}; this one is {ours!r}")
    alpha = metadata.get(ALPHA, 0.0)
    if not isinstance(alpha, float) or not isfinite(alpha):
        raise BackendError(f"{path}: {ALPHA} is {alpha!r}; it must be a finite number")
    if "adapter.alora.invocation_tokens" in metadata:
        raise BackendError(f"{path}: an adapter with activation by tokens (aLoRA) can't be served")


def check_shapes(path: Path, name: str, target: TensorInfo | None, down: tuple[int, ...], up: tuple[int, ...]) -> None:
    """Dimensions, fastest first: the model's [K, N, ...], A [K, r, ...], B [r, N, ...]. Raises BackendError."""
    if target is None or len(target.dims) < 2 or target.name.startswith("token_embd"):
        raise BackendError(
            f"{path}: {name!r} is no linear of this model that can be adapted: an adapter for another base"
        )
    inputs, outputs, *rest = target.dims
    rank = up[0]
    if down != (inputs, rank, *rest) or up != (rank, outputs, *rest):
        raise BackendError(
            f"{path}: {name!r} is {list(target.dims)} in the model, which A {list(down)} and B {list(up)} don't fit: "
            "an adapter for another base"
        )
