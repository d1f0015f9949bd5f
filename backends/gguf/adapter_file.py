"""GGUF files of LoRA adapters, checked by their headers against the model that they shall change.

llama.cpp ends the process, or computes nonsense, on some files that its own loader takes. Source of the layout:
convert_lora_to_gguf.py and src/llama-adapter.cpp of llama.cpp. With `alpha` y += alpha / rank * scale * B (A x), and
without y += scale * B (A x).
"""

from pathlib import Path
from typing import Any

import numpy as np

from tightrope.backends.errors import BackendError
from tightrope.backends.gguf.header import Header, TensorInfo, read_header

ALPHA = "adapter.lora.alpha"

# what a tensor may hold, and the floats in it that must be finite
_HALF_BLOCK = np.dtype([("scale", "<f2"), ("codes", "i1", 32)])
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "Q8_0": _HALF_BLOCK,
}
_BF16_EXPONENT = 0x7F80  # all ones in infinities and NaN


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
        if tensor.type_name not in _DTYPES:
            raise BackendError(
                f"{path}: tensor {tensor.name!r} is {tensor.type_name}; {', '.join(_DTYPES)} can be used"
            )
        halves.setdefault(name, {})[part] = tensor
    if not halves:
        raise BackendError(f"{path}: holds no adapter")
    for name, parts in halves.items():
        if parts.keys() != {"lora_a", "lora_b"}:
            raise BackendError(f"{path}: {name!r} has {' and '.join(parts)} alone; an adapter has both halves")
        check_shapes(path, name, known.get(name), parts["lora_a"].dims, parts["lora_b"].dims)
    return header


def check_finite(header: Header) -> None:
    """Read an adapter's tensors once. Raises BackendError when one holds NaN or infinity."""
    for tensor in header.tensors:
        dtype = _DTYPES[tensor.type_name]
        count = tensor.num_bytes // dtype.itemsize
        values = np.fromfile(header.path, dtype, count, offset=header.data_start + tensor.offset)
        if tensor.type_name == "BF16":
            is_finite = (values & _BF16_EXPONENT) != _BF16_EXPONENT
        else:
            is_finite = np.isfinite(values["scale"] if dtype is _HALF_BLOCK else values)
        if len(values) < count or not is_finite.all():
            raise BackendError(f"{header.path}: tensor {tensor.name!r} holds NaN or infinity, or is cut short")


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
    if not isinstance(alpha, float) or not np.isfinite(alpha):
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
