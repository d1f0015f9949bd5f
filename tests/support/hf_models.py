"""The bundled GGUF models as Hugging Face folders in bf16, written once and kept under build/test-models.

Tensors are dequantized, renamed, and brought back to what a Hugging Face file holds: rows of a llama's queries and keys
in half-split order, Gemma's norm weights without the one that the GGUF file adds. Tokenizers are written piece by piece
from the same vocabulary. Source of names and row order: convert_hf_to_gguf.py of llama.cpp.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkout import ROOT
from gguf import GGUFReader, dequantize
from gguf_models import gemma
from safetensors.torch import save_file
from torch import Tensor

from tightrope.backends.locate import bundled_model

FOLDER = ROOT / "build" / "test-models"
VERSION = 1  # part of a folder's name: raise it when what is written changes

Json = dict[str, Any]
_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF

_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
}
_LLAMA_NAMES = _NAMES | {"ffn_norm": "post_attention_layernorm"}
_GEMMA_NAMES = _NAMES | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class _PlainReader(GGUFReader):
    """Reads from a plain array: numpy's mapped one takes twice as long for each of Gemma's half a million fields."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = np.asarray(mapped)


@cache
def smollm2_bf16() -> Path:
    """SmolLM2-135M-Instruct: a llama in three shards, with tied embeddings and a byte-level vocabulary."""
    return once("smollm2-135m-bf16", lambda folder: _write_smollm2(folder, _PlainReader(bundled_model())))


@cache
def gemma3_bf16() -> Path:
    """Gemma 3 270M: windows of 512 tokens in five layers of six, norms of queries and keys, a sentencepiece BPE."""
    return once("gemma3-270m-bf16", lambda folder: _write_gemma3(folder, _PlainReader(gemma())))


def once(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of that name, written now if it isn't there; an interrupted run leaves nothing in its place."""
    path = FOLDER / f"{name}-{VERSION}"
    if path.is_dir():
        return path
    FOLDER.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=FOLDER, prefix=f".{name}-"))
    try:
        write(unfinished)
        unfinished.chmod(0o755)
        os.rename(unfinished, path)
    except OSError:
        if not path.is_dir():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def _write_smollm2(folder: Path, gguf: GGUFReader) -> None:
    num_heads, num_kv_heads = _field(gguf, "llama.attention.head_count"), _field(gguf, "llama.attention.head_count_kv")

    def mend(name: str, weight: Tensor) -> Tensor:
        if name.endswith("q_proj.weight"):
            return _half_split(weight, num_heads)
        return _half_split(weight, num_kv_heads) if name.endswith("k_proj.weight") else weight

    _write_tensors(folder, _tensors(gguf, _LLAMA_NAMES, mend), shard_bytes=100 << 20)
    config = _config(gguf, "llama") | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "head_dim": 64,
        "rope_theta": _field(gguf, "llama.rope.freq_base"),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2})
    _write_json(folder / "tokenizer.json", _byte_level_tokenizer(gguf))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    _write_tokenizer_config(folder, names | {"model_max_length": 8192})
    (folder / "chat_template.jinja").write_text(_field(gguf, "tokenizer.chat_template"), "utf-8")


def _write_gemma3(folder: Path, gguf: GGUFReader) -> None:
    def mend(name: str, weight: Tensor) -> Tensor:
        return weight - 1 if name.endswith("norm.weight") else weight

    _write_tensors(folder, _tensors(gguf, _GEMMA_NAMES, mend), shard_bytes=1 << 30)
    config = _config(gguf, "gemma3") | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": _field(gguf, "gemma3.attention.key_length"),
        "query_pre_attn_scalar": 256,
        "sliding_window": _field(gguf, "gemma3.attention.sliding_window"),
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(18)],
        "rope_theta": _field(gguf, "gemma3.rope.freq_base"),
        "rope_local_base_freq": 10_000.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0})
    _write_json(folder / "tokenizer.json", _sentencepiece_tokenizer(gguf))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    _write_tokenizer_config(folder, names | {"add_bos_token": True})


def _config(gguf: GGUFReader, arch: str) -> Json:
    epsilon = np.float32(_field(gguf, f"{arch}.attention.layer_norm_rms_epsilon"))
    return {
        "vocab_size": len(_field(gguf, "tokenizer.ggml.tokens")),
        "hidden_size": _field(gguf, f"{arch}.embedding_length"),
        "intermediate_size": _field(gguf, f"{arch}.feed_forward_length"),
        "num_hidden_layers": _field(gguf, f"{arch}.block_count"),
        "num_attention_heads": _field(gguf, f"{arch}.attention.head_count"),
        "num_key_value_heads": _field(gguf, f"{arch}.attention.head_count_kv"),
        "max_position_embeddings": _field(gguf, f"{arch}.context_length"),
        "rms_norm_eps": float(str(epsilon)),  # 1e-05, which the file has as float32
        "attention_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def _tensors(
    gguf: GGUFReader, names: Mapping[str, str], mend: Callable[[str, Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for tensor in gguf.tensors:
        parts = tensor.name.removesuffix(".weight").split(".")
        stem = whole[parts[0]] if len(parts) == 1 else f"model.layers.{parts[1]}.{names[parts[2]]}"
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
        yield f"{stem}.weight", mend(f"{stem}.weight", weight).to(torch.bfloat16).contiguous()


def _half_split(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a head from (x0, y0, x1, y1 ...), which GGUF's llama rotates, to (x0, x1 ... y0, y1 ...)."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def _write_tensors(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _byte_level_tokenizer(gguf: GGUFReader) -> Json:
    """tokenizer.json of GGUF's pre-tokenizer "smollm": single digits, then GPT-2's words and byte alphabet."""
    vocab = {piece: i for i, piece in enumerate(_field(gguf, "tokenizer.ggml.tokens"))}
    merges = [merge.split(" ") for merge in _field(gguf, "tokenizer.ggml.merges")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    words = [{"type": "Digits", "individual_digits": True}, byte_level]
    return {
        "version": "1.0",
        "added_tokens": _added_tokens(gguf),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def _sentencepiece_tokenizer(gguf: GGUFReader) -> Json:
    """tokenizer.json of a sentencepiece BPE vocabulary without a space in front, with bytes to fall back on."""
    pieces = _field(gguf, "tokenizer.ggml.tokens")
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    post_processor = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, bos, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
    }
    spaces_back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "version": "1.0",
        "added_tokens": _added_tokens(gguf),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": post_processor,
        "decoder": {"type": "Sequence", "decoders": [spaces_back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges(gguf),
        },
    }


def _merges(gguf: GGUFReader) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the joins that sentencepiece prefers (of higher score) first."""
    pieces, scores = _field(gguf, "tokenizer.ggml.tokens"), _field(gguf, "tokenizer.ggml.scores")
    types = _field(gguf, "tokenizer.ggml.token_type")
    normal = {piece: i for i, piece in enumerate(pieces) if types[i] == 1}
    ranked = sorted(normal, key=lambda piece: (-scores[normal[piece]], normal[piece]))
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]


def _added_tokens(gguf: GGUFReader) -> list[Json]:
    types = _field(gguf, "tokenizer.ggml.token_type")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": piece, **plain, "special": types[i] == _CONTROL}
        for i, piece in enumerate(_field(gguf, "tokenizer.ggml.tokens"))
        if types[i] in (_CONTROL, _USER_DEFINED)
    ]


def _write_tokenizer_config(folder: Path, values: Json) -> None:
    # the general class takes tokenizer.json as it is; those of a family build their own from its vocabulary
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", fixed | values)


def _field(gguf: GGUFReader, key: str) -> Any:  # noqa: ANN401 - whatever the key holds
    return gguf.fields[key].contents()


def _write_json(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")  # Indented, Gemma's merges take ten seconds.
