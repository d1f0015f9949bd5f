"""GGUF files as large as people have, of random weights: loading and running takes as long whatever they know."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from tightrope.backends.files.gguf.tensor_types import TENSOR_TYPES, Floats, TensorType
from tightrope.backends.locate import bundled_model

TYPES = {kind.name.lower(): code for code, kind in TENSOR_TYPES.items() if kind.floats}
_SMALL = {"f16": b"\x66\x10", "bf16": b"\x80\x3a", "f32": b"\x00\x00\x80\x3a", "e8m0": b"\x70"}  # about 2**-10


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a llama; 0 layers: as many as are asked for."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    layers: int = 0

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Of a layer: outputs and inputs."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "attn_q": (self.hidden, self.hidden),
            "attn_k": (kv, self.hidden),
            "attn_v": (kv, self.hidden),
            "attn_output": (self.hidden, self.hidden),
            "ffn_gate": (self.inner, self.hidden),
            "ffn_up": (self.inner, self.hidden),
            "ffn_down": (self.hidden, self.inner),
        }


TINY_LLAMA = Sizes(2048, 5632, 32, 4)
MISTRAL_7B = Sizes(4096, 14336, 32, 8, layers=32)
TypeOf = Callable[[str, int, int], str]  # By a matrix's name in the file, its layer, and how many there are.


def write_large(path: Path, type_name: str, num_bytes: int) -> Path:
    """A llama of about so many bytes of weights, of TinyLlama's width; matrices are of one type of TYPES."""
    kind = TENSOR_TYPES[TYPES[type_name]]
    sizes, tables = TINY_LLAMA, 2 * _num_tokens() * TINY_LLAMA.hidden
    a_layer = sum(rows * width for rows, width in sizes.matrices.values())
    num_layers = max(1, (num_bytes * kind.values // kind.num_bytes - tables) // a_layer)
    return write_llama(path, sizes, num_layers, lambda name, layer, count: type_name)


def q4_k_m(name: str, layer: int, num_layers: int) -> str:
    """The type that llama.cpp's quantizer takes for a matrix in a file that it calls Q4_K_M."""
    has_more = layer < num_layers // 8 or layer >= 7 * num_layers // 8 or (layer - num_layers // 8) % 3 == 2
    return "q6_k" if name == "output" or (name in ("attn_v", "ffn_down") and has_more) else "q4_k"


def write_llama(path: Path, sizes: Sizes, num_layers: int, type_of: TypeOf) -> Path:
    """A llama with the bundled model's vocabulary. Codes are random, floats are small; norms are F32."""
    writer = GGUFWriter(path, "llama")
    vocab_size = _num_tokens()
    copy_keys(writer, only="tokenizer.")
    writer.add_block_count(num_layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(sizes.inner)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_rope_dimension_count(sizes.hidden // sizes.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    matrices = [(name, name, 0, (vocab_size, sizes.hidden)) for name in ("token_embd", "output")]
    norms = ["output_norm"]
    for layer in range(num_layers):
        matrices += [(f"blk.{layer}.{name}", name, layer, shape) for name, shape in sizes.matrices.items()]
        norms += [f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"]
    drawn: dict[tuple[int, tuple[int, int]], np.ndarray[tuple[int, int], np.dtype[np.uint8]]] = {}
    for name, part, layer, shape in matrices:
        code = TYPES[type_of(part, layer, num_layers)]
        if (code, shape) not in drawn:
            drawn[code, shape] = _blocks(TENSOR_TYPES[code], *shape)
        writer.add_tensor(f"{name}.weight", drawn[code, shape], raw_dtype=GGMLQuantizationType(code))
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(sizes.hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _num_tokens() -> int:
    return len(GGUFReader(bundled_model()).fields["tokenizer.ggml.tokens"].data)


def copy_keys(writer: GGUFWriter, only: str = "") -> None:
    """Give a file the bundled model's metadata, or what of it begins so."""
    for name, field in GGUFReader(bundled_model()).fields.items():
        if name.startswith(only) and not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)


def _blocks(kind: TensorType, rows: int, width: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Bytes [rows, bytes of a row]."""
    blocks = np.random.default_rng(rows).integers(0, 256, (rows * width // kind.values, kind.num_bytes), np.uint8)
    for floats in kind.floats:
        _fill(blocks, floats)
    return blocks.reshape(rows, -1)


def _fill(blocks: np.ndarray[tuple[int, int], np.dtype[np.uint8]], floats: Floats) -> None:
    small = np.frombuffer(_SMALL[floats.form] * floats.count, np.uint8)
    blocks[:, floats.start : floats.start + len(small)] = small
