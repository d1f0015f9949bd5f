"""Tiny random models with recurrent layers as GGUF files, written by the gguf package.

Source of names and sizes: llama.cpp's architectures mamba and lfm2.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

VOCAB = 257
WIDTH = 64
TURN_END = 2  # This token ends a turn.
_MAMBA_LAYER = {
    "attn_norm.weight": (WIDTH,),
    "ssm_in.weight": (256, WIDTH),
    "ssm_conv1d.weight": (128, 4),
    "ssm_conv1d.bias": (128,),
    "ssm_x.weight": (36, 128),
    "ssm_dt.weight": (128, 4),
    "ssm_dt.bias": (128,),
    "ssm_a": (128, 16),
    "ssm_d": (128,),
    "ssm_out.weight": (WIDTH, 128),
}
_LFM2_LAYER = {
    "attn_norm.weight": (WIDTH,),
    "ffn_norm.weight": (WIDTH,),
    "ffn_gate.weight": (96, WIDTH),
    "ffn_up.weight": (96, WIDTH),
    "ffn_down.weight": (WIDTH, 96),
}
_LFM2_CONV = {
    "shortconv.conv.weight": (WIDTH, 3),
    "shortconv.in_proj.weight": (3 * WIDTH, WIDTH),
    "shortconv.out_proj.weight": (WIDTH, WIDTH),
}
_LFM2_ATTENTION = {
    "attn_q.weight": (WIDTH, WIDTH),
    "attn_k.weight": (32, WIDTH),
    "attn_v.weight": (32, WIDTH),
    "attn_output.weight": (WIDTH, WIDTH),
    "attn_q_norm.weight": (32,),
    "attn_k_norm.weight": (32,),
}


def write_mamba(path: Path) -> Path:
    """Two recurrent layers and no attention."""
    writer = GGUFWriter(path, "mamba")
    numbers = {"block_count": 2, "feed_forward_length": 0, "attention.head_count": 0, "ssm.time_step_rank": 4}
    _add_numbers(writer, {**numbers, "ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16})
    sizes = {f"blk.{layer}.{name}": size for layer in range(2) for name, size in _MAMBA_LAYER.items()}
    return _finish(writer, path, {**sizes, "output_norm.weight": (WIDTH,)})


def write_lfm2(path: Path) -> Path:
    """A layer of short convolutions, one of attention, and one of convolutions again."""
    writer = GGUFWriter(path, "lfm2")
    numbers = {"block_count": 3, "feed_forward_length": 96, "attention.head_count": 2, "shortconv.l_cache": 3}
    _add_numbers(writer, numbers)
    writer.add_head_count_kv([0, 1, 0])
    writer.add_rope_freq_base(10000.0)
    sizes = {f"blk.{layer}.{name}": size for layer in range(3) for name, size in _LFM2_LAYER.items()}
    sizes |= {f"blk.{layer}.{name}": size for layer in (0, 2) for name, size in _LFM2_CONV.items()}
    sizes |= {f"blk.1.{name}": size for name, size in _LFM2_ATTENTION.items()}
    return _finish(writer, path, {**sizes, "token_embd_norm.weight": (WIDTH,)})


def _add_numbers(writer: GGUFWriter, numbers: Mapping[str, int]) -> None:
    sizes = {"context_length": 4096, "embedding_length": WIDTH, "vocab_size": VOCAB}
    for key, number in {**sizes, **numbers}.items():
        writer.add_uint32(f"{writer.arch}.{key}", number)
    writer.add_layer_norm_rms_eps(1e-5)


def _finish(writer: GGUFWriter, path: Path, sizes: Mapping[str, tuple[int, ...]]) -> Path:
    """Add a vocabulary of bytes and random weights of these sizes."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([TokenType.UNKNOWN, *[TokenType.BYTE] * 256])
    writer.add_eos_token_id(TURN_END)
    rng = np.random.default_rng(20261129)
    for name, size in {"token_embd.weight": (VOCAB, WIDTH), **sizes}.items():
        if name.endswith("ssm_a"):
            values = -np.tile(np.arange(1, size[1] + 1, dtype=np.float32) / 64, (size[0], 1))  # It forgets slowly.
        elif len(size) == 1 and "bias" not in name:
            values = 1 + 0.1 * rng.standard_normal(size)
        else:
            values = rng.standard_normal(size) / size[-1] ** 0.5
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
