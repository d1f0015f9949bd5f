"""A PEFT folder as a GGUF adapter: other names, experts in stacks, and rows in the order that llama.cpp rotates.

Source: convert_lora_to_gguf.py, convert_hf_to_gguf.py and ggml/docs/gguf.md of llama.cpp.
"""

import re
import struct
import tempfile
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import MAGIC, Header, TensorInfo
from tightrope.backends.files.peft import Delta, PeftAdapter, check_float
from tightrope.backends.files.safetensors import TensorEntry
from tightrope.backends.gguf.adapter_file import check_shapes
from tightrope.kernels.forms.low_rank import balanced

ALIGNMENT = 32  # Tensors in the file begin at multiples of so many bytes.
_STRING, _F16 = 8, 1  # These are type ids of a value and of a tensor.

# architectures with the names below, and whether a head's rows of queries and keys are (x0, y0, x1, y1 ...) in their
# files; in those of Hugging Face they are (x0, x1 ... y0, y1 ...)
_ARE_PAIRED = {"llama": True} | dict.fromkeys(
    ("gemma", "gemma2", "gemma3", "qwen2", "qwen2moe", "qwen3", "qwen3moe"), False
)
_LAYER = re.compile(r"(?:(?:model\.)?language_model\.)?(?:model\.)?layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)")
_IN_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_IN_EXPERT = {
    "w1": "ffn_gate_exps",
    "w2": "ffn_down_exps",
    "w3": "ffn_up_exps",
    "gate_proj": "ffn_gate_exps",
    "down_proj": "ffn_down_exps",
    "up_proj": "ffn_up_exps",
}
_HEADS = {"attn_q": "head_count", "attn_k": "head_count_kv"}


def path_of(file: IO[bytes]) -> Path:
    """Where this process can open a file that has no name."""
    return Path(f"/dev/fd/{file.fileno()}")


class Conversion:
    """What an adapter becomes for a model, known from headers; `num_bytes` is what its numbers will take."""

    def __init__(self, adapter: PeftAdapter, base: Header) -> None:
        """Raises BackendError, naming file and module, where the adapter can't be brought to this model."""
        self._adapter, self._base = adapter, base
        self._architecture = base.metadata.get("general.architecture")
        if self._architecture not in _ARE_PAIRED:
            raise BackendError(
                f"{adapter.folder}: a folder in PEFT's format can't be used with a GGUF model of architecture "
                f"{self._architecture!r}: make a file of it by convert_lora_to_gguf.py of llama.cpp"
            )
        for part, what in (
            (tuple(module for module, _ in adapter.own), "is saved whole"),
            (tuple(adapter.table_deltas), "is an embedding with rows changed"),
            (tuple(adapter.tokens), "has single trained tokens"),
            (tuple(adapter.base), "is saved whole"),
        ):
            if part:
                raise BackendError(f"{adapter.folder}: {part[0]!r} {what}, which a GGUF model can't use")
        self._known = {tensor.name: tensor for tensor in base.tensors}
        self._stacks: dict[str, dict[int, Delta]] = {}  # Experts stand by their numbers, and what has none under 0.
        for module, delta in adapter.deltas.items():
            name, expert = _place(module)
            self._check(module, self._known.get(name), expert, delta)
            self._stacks.setdefault(name, {})[expert or 0] = delta

    @property
    def num_bytes(self) -> int:
        return sum(2 * prod(dims) for _, dims in self._tensors())

    def write(self) -> IO[bytes]:
        """A temporary file without a name, so that a process that is killed leaves none. Raises BackendError.

        It is at its start, and gone when it is closed; until then `path_of` opens it.
        """
        try:
            file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
            try:
                self._write(file)
                file.seek(0)
            except BaseException:
                file.close()
                raise
        except OSError as error:
            raise BackendError(f"{self._adapter.folder}: no room to convert it: {error.strerror or error}") from None
        return file

    def _check(self, module: str, target: TensorInfo | None, expert: int | None, delta: Delta) -> None:
        path = self._adapter.folder
        for entry in (delta.down, delta.up):
            check_float(entry)
        down, up = delta.down.shape[::-1], delta.up.shape[::-1]
        if expert is not None and target is not None:
            if len(target.dims) != 3 or expert >= target.dims[2]:
                raise BackendError(f"{path}: {module!r} is no expert of this model: an adapter for another base")
            down, up = (*down, target.dims[2]), (*up, target.dims[2])
        check_shapes(path, module, target, tuple(down), tuple(up))

    def _tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and dimensions, fastest first."""
        for name in self._stacks:
            for part, dims in zip(("lora_a", "lora_b"), self._dims(name), strict=True):
                yield f"{name}.{part}", dims

    def _dims(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B, fastest first. Experts without an adapter, and smaller ranks, are filled with zeros."""
        inputs, outputs, *stack = self._known[name].dims
        rank = max(delta.down.shape[0] for delta in self._stacks[name].values())
        return (inputs, rank, *stack), (rank, outputs, *stack)

    def _write(self, file: IO[bytes]) -> None:
        tensors = list(self._tensors())
        assert isinstance(self._architecture, str)
        metadata = {"general.architecture": self._architecture, "general.type": "adapter", "adapter.type": "lora"}
        file.write(_header(metadata, tensors))
        for name, deltas in self._stacks.items():
            for part in self._halves(name, deltas):
                _pad(file)
                file.write(part.to(torch.float16).numpy().tobytes())
        _pad(file)

    def _halves(self, name: str, deltas: Mapping[int, Delta]) -> tuple[Tensor, Tensor]:
        """A [(E,) r, K] and B [(E,) N, r] float32, with the adapter's own scaling in B."""
        a, b = (torch.zeros(dims[::-1]) for dims in self._dims(name))
        for expert, delta in deltas.items():
            down, up = balanced(self._read(delta.down), self._read(delta.up), delta.scaling)
            place_a, place_b = (a[expert], b[expert]) if a.ndim == 3 else (a, b)
            place_a[: len(down)] = down
            place_b[:, : len(down)] = self._turned(name, up * delta.scaling)
        return a, b

    def _read(self, entry: TensorEntry) -> Tensor:
        tensor = self._adapter.checkpoint.read(entry.name)
        self._adapter.checkpoint.check_finite(entry.name, tensor)
        return tensor.float()

    def _turned(self, name: str, rows: Tensor) -> Tensor:
        """Rows [N, r] in the order of the model's file."""
        part = name.split(".")[-2]
        if part not in _HEADS or not _ARE_PAIRED[str(self._architecture)]:
            return rows
        num_heads = self._base.metadata[f"{self._architecture}.attention.{_HEADS[part]}"]
        if isinstance(num_heads, tuple):  # There is one a layer.
            num_heads = num_heads[int(name.split(".")[1])]
        assert isinstance(num_heads, int)
        paired: Tensor = rows.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(rows.shape)
        return paired


def _place(module: str) -> tuple[str, int | None]:
    """The GGUF name of a PEFT module's weight, and the expert in it; a name that no model has for one not known."""
    if module == "lm_head":
        return "output.weight", None
    match = _LAYER.fullmatch(module)
    if match is None:
        return "", None
    if expert := _EXPERT.fullmatch(match[2]):
        return f"blk.{match[1]}.{_IN_EXPERT.get(expert[2], '')}.weight", int(expert[1])
    return f"blk.{match[1]}.{_IN_LAYER.get(match[2], '')}.weight", None


def _header(metadata: Mapping[str, str], tensors: list[tuple[str, tuple[int, ...]]]) -> bytes:
    """Everything before the tensors' bytes, not padded yet. All of them are F16."""
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), struct.pack("<I", _STRING), _string(value)]
    offset = 0
    for name, dims in tensors:
        parts += [_string(name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, _F16, offset)]
        offset += -(-2 * prod(dims) // ALIGNMENT) * ALIGNMENT
    return b"".join(parts)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pad(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))
