"""GGUF files as large as people have, of one tensor type: how long a load takes does not depend on what it knows."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from tightrope.backends.files.gguf.tensor_types import TENSOR_TYPES, Floats, TensorType
from tightrope.backends.locate import bundled_model

HIDDEN, INNER, HEADS, KV_HEADS = 2048, 5632, 32, 4  # TinyLlama's
TYPES = {kind.name.lower(): code for code, kind in TENSOR_TYPES.items() if kind.floats}
_SMALL = {"f16": b"\x66\x10", "bf16": b"\x80\x3a", "f32": b"\x00\x00\x80\x3a", "e8m0": b"\x70"}  # about 2**-10


def write_large(path: Path, type_name: str, num_bytes: int) -> Path:
    """A llama of about so many bytes of weights, with the bundled model's vocabulary; norms are F32.

    type_name: of TYPES, in lower case. Codes are random, floats are small.
    """
    code = TYPES[type_name]
    kind = TENSOR_TYPES[code]
    writer = GGUFWriter(path, "llama")
    vocab_size = _copy_vocabulary(writer)
    kv = HIDDEN // HEADS * KV_HEADS
    layer = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (kv, HIDDEN),
        "attn_v": (kv, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    weight_bytes = num_bytes * kind.values // kind.num_bytes
    num_layers = max(1, (weight_bytes - 2 * vocab_size * HIDDEN) // sum(rows * width for rows, width in layer.values()))
    writer.add_block_count(num_layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {"token_embd": (vocab_size, HIDDEN), "output": (vocab_size, HIDDEN)}
    norms = ["output_norm"]
    for number in range(num_layers):
        shapes |= {f"blk.{number}.{name}": shape for name, shape in layer.items()}
        norms += [f"blk.{number}.attn_norm", f"blk.{number}.ffn_norm"]
    drawn = {shape: _blocks(kind, *shape) for shape in set(shapes.values())}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", drawn[shape], raw_dtype=GGMLQuantizationType(code))
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _copy_vocabulary(writer: GGUFWriter) -> int:
    """Returns how many tokens there are."""
    fields = GGUFReader(bundled_model()).fields
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    return len(fields["tokenizer.ggml.tokens"].data)


def _blocks(kind: TensorType, rows: int, width: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Bytes [rows, bytes of a row]."""
    blocks = np.random.default_rng(rows).integers(0, 256, (rows * width // kind.values, kind.num_bytes), np.uint8)
    for floats in kind.floats:
        _fill(blocks, floats)
    return blocks.reshape(rows, -1)


def _fill(blocks: np.ndarray[tuple[int, int], np.dtype[np.uint8]], floats: Floats) -> None:
    small = np.frombuffer(_SMALL[floats.form] * floats.count, np.uint8)
    blocks[:, floats.start : floats.start + len(small)] = small
