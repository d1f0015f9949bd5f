"""Ways to spoil a GGUF file of a llama: tensors that are missing or of another shape, and keys that can't be right."""

from collections.abc import Callable

import numpy as np
from gguf import GGUFValueType, GGUFWriter
from gguf.gguf_writer import GGUFValue
from gguf_files import Change

Keys = Callable[[GGUFWriter], None]


def without(name: str) -> Change:
    return lambda tensor, values: None if tensor == name else values


def reshaped(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda tensor, values: np.ascontiguousarray(change(values)) if tensor == name else values


def put(key: str, value: object, kind: GGUFValueType, element: GGUFValueType | None = None) -> Keys:
    return lambda writer: writer.kv_data[0].update({key: GGUFValue(value, kind, element)})


def drop(key: str) -> Keys:
    return lambda writer: writer.kv_data[0].pop(key) and None


def _lenses(writer: GGUFWriter) -> None:
    for number in range(6):
        writer.add_tensor(f"blk.0.lens_{number}.weight", np.ones(8, np.float32))


# What makes a file that must be refused of a good one, and a part of what llama.cpp, or the header's reader, says.
BROKEN_TENSORS: dict[str, tuple[Change, str]] = {
    "no embeddings": (without("token_embd.weight"), "tensor 'token_embd.weight' not found"),
    "no last norm": (without("output_norm.weight"), "tensor 'output_norm.weight' not found"),
    "no queries": (without("blk.0.attn_q.weight"), "tensor 'blk.0.attn_q.weight' not found"),
    "no last linear": (without("blk.1.ffn_down.weight"), "tensor 'blk.1.ffn_down.weight' not found"),
    "half a norm": (
        reshaped("blk.1.ffn_norm.weight", lambda w: w[: len(w) // 2]),
        "'blk.1.ffn_norm.weight' has wrong shape",
    ),
    "a turned linear": (reshaped("blk.0.ffn_up.weight", np.transpose), "'blk.0.ffn_up.weight' has wrong shape"),
    "keys of more heads": (
        reshaped("blk.0.attn_k.weight", lambda w: np.tile(w, (2, 1))),
        "'blk.0.attn_k.weight' has wrong shape",
    ),
    "a row too few": (reshaped("token_embd.weight", lambda w: w[:-1]), "'token_embd.weight' has wrong shape"),
}
U32, F32, STRING, ARRAY = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING, GGUFValueType.ARRAY
BROKEN_KEYS: dict[str, tuple[Keys, str]] = {
    "tensors that no llama has": (
        _lenses,
        "its architecture has no 'blk.0.lens_0.weight', 'blk.0.lens_1.weight', 'blk.0.lens_2.weight', "
        "'blk.0.lens_3.weight' and 2 more",
    ),
    "no epsilon": (drop("llama.attention.layer_norm_rms_epsilon"), "layer_norm_rms_epsilon"),
    "an epsilon below zero": (put("llama.attention.layer_norm_rms_epsilon", -1e-5, F32), "more than 0 and at most 1"),
    "an epsilon of NaN": (
        put("llama.attention.layer_norm_rms_epsilon", float("nan"), F32),
        "'llama.attention.layer_norm_rms_epsilon' is nan",
    ),
    "an infinite base": (put("llama.rope.freq_base", float("inf"), F32), "'llama.rope.freq_base' is inf"),
    "a base of zero": (put("llama.rope.freq_base", 0.0, F32), "llama.rope.freq_base is 0.0; it must be more than 1"),
    "a factor below zero": (put("llama.rope.scaling.factor", -2.0, F32), "rope.scaling.factor is -2.0"),
    "more layers than tensors": (put("llama.block_count", 3, U32), "tensor 'blk.2.attn_norm.weight' not found"),
    "layers without end": (
        put("llama.block_count", 513, U32),
        "llama.block_count is 513; it must be a number from 1 to 512",
    ),
    "experts and none of them used": (
        put("llama.expert_count", 4, U32),
        "llama.expert_used_count is 0; with 4 experts it must be a number from 1 to 4",
    ),
    "experts used that are not there": (put("llama.expert_used_count", 2, U32), "is 2; there are no experts"),
    "experts without end": (
        put("llama.expert_count", 513, U32),
        "llama.expert_count is 513; it must be a number from 0 to 512",
    ),
    "another architecture": (put("general.architecture", "abacus", STRING), "abacus"),
    "no kind of vocabulary": (drop("tokenizer.ggml.model"), "tokenizer.ggml.model"),
    "no merges": (drop("tokenizer.ggml.merges"), "cannot find tokenizer merges"),
    "no vocabulary": (drop("tokenizer.ggml.tokens"), "it holds no vocabulary"),
    "a pre-tokenizer that nobody knows": (
        put("tokenizer.ggml.pre", "abacus", STRING),
        "unknown pre-tokenizer type: 'abacus'",
    ),
    "an image half": (put("general.type", "mmproj", STRING), "the image half of a model (mmproj)"),
    "an image half by its architecture": (
        put("general.architecture", "clip", STRING),
        "the image half of a model (mmproj)",
    ),
    "an adapter": (put("general.type", "adapter", STRING), "a LoRA adapter, no model: name it with --lora"),
    "a model that makes vectors": (
        put("llama.pooling_type", 3, U32),
        "it makes vectors of texts (llama.pooling_type is 3, last)",
    ),
}
