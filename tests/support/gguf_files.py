"""The tiny models and adapters of tests/data/adapters as GGUF files in float32, written by the gguf package.

Source of names and row order: convert_hf_to_gguf.py and convert_lora_to_gguf.py of llama.cpp.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter, TokenType
from safetensors.torch import load_file
from torch import Tensor

from tightrope.backends.hf.text.sentencepiece import parse

_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


Change = Callable[[str, np.ndarray], np.ndarray | None]


def write_model(
    folder: Path,
    path: Path,
    user_defined: TokenType = TokenType.USER_DEFINED,
    *,
    change: Change = lambda _, values: values,
    keys: Callable[[GGUFWriter], None] = lambda _: None,
) -> Path:
    """A llama, or a mixture of experts, from a Hugging Face folder.

    user_defined: what sentencepiece's user-defined pieces become; older converters wrote them as normal ones. change:
    what is written of a tensor's name and values; None leaves it out. keys: adds to the metadata or changes it.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if "num_local_experts" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if (folder / "tokenizer.json").is_file():
        _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()))
    else:
        _add_sentencepiece(writer, (folder / "tokenizer.model").read_bytes(), user_defined)
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "chat_template" in (named := json.loads(settings.read_text())):
        writer.add_chat_template(named["chat_template"])
    for name, tensor in _tensors(load_file(folder / "model.safetensors"), config):
        if (changed := change(f"{name}.weight", tensor)) is not None:
            writer.add_tensor(f"{name}.weight", changed)
    keys(writer)
    return _finish(writer, path)


Token = tuple[str, TokenType]


def write_vocabulary(path: Path, kind: str, tokens: Sequence[Token], **keys: str | bool | int) -> Path:
    """A llama of one layer of zeros over a vocabulary of `kind`, "gpt2" or another, whose later tokens are likelier.

    keys: of the tokenizer, such as eos_token_id. `merges` joins pairs of a line each, and `name` is the model's.
    """
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(kind)
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([token_type for _, token_type in tokens])
    writer.add_token_scores([float(place) for place in range(len(tokens))])
    if kind == "gpt2":
        writer.add_token_merges(str(keys.pop("merges", "")).splitlines())
    if (name := keys.pop("name", None)) is not None:
        writer.add_name(str(name))
    for key, value in keys.items():
        add = writer.add_string if isinstance(value, str) else writer.add_bool if isinstance(value, bool) else None
        (add or writer.add_uint32)(f"tokenizer.ggml.{key}", value)  # type: ignore[operator]
    for name, shape in {
        "token_embd": (len(tokens), 32),
        "output": (len(tokens), 32),
        **dict.fromkeys((f"blk.0.{part}" for part in _IN_LAYER.values() if "norm" not in part), (32, 32)),
        **dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (32,)),
    }.items():
        if name != "blk.0.ffn_gate_inp":
            writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    return _finish(writer, path)


def write_adapter(
    peft: Path, path: Path, base: Path, *, architecture: str = "llama", kind: str = "lora", dtype: type = np.float32
) -> Path:
    """A PEFT folder's lora_A and lora_B, of attention and MLP, for the model of the Hugging Face folder `base`."""
    config = json.loads((peft / "adapter_config.json").read_text())
    writer = GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", kind)
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    model = json.loads((base / "config.json").read_text())
    for name, tensor in load_file(peft / "adapter_model.safetensors").items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", name)
        assert match is not None
        module, part = match[1], match[2]
        rows = _turned(module, tensor.float(), model) if part == "B" else tensor.float()
        writer.add_tensor(f"{_renamed(module)}.weight.lora_{part.lower()}", rows.numpy().astype(dtype))
    return _finish(writer, path)


def _finish(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, tokenizer: Mapping[str, Mapping[str, object]]) -> None:
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    assert isinstance(vocab, dict)
    assert isinstance(merges, list)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_token_types([TokenType.CONTROL if i < 3 else TokenType.NORMAL for i in range(len(vocab))])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add_sentencepiece(writer: GGUFWriter, raw: bytes, user_defined: TokenType) -> None:
    model = parse(raw)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.text for piece in model.pieces])
    writer.add_token_scores([piece.score for piece in model.pieces])
    types = [TokenType(piece.type) for piece in model.pieces]  # GGUF has sentencepiece's own numbers
    writer.add_token_types([user_defined if t is TokenType.USER_DEFINED else t for t in types])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(model.prefixes_space)


def _tensors(weights: Mapping[str, Tensor], config: Mapping[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    experts: dict[str, list[Tensor]] = {}
    for name, tensor in weights.items():
        module = name.removesuffix(".weight")
        if match := re.fullmatch(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.\d+\.(w\d)", module):
            experts.setdefault(f"blk.{match[1]}.{_EXPERTS[match[2]]}", []).append(tensor.float())
        else:
            yield _renamed(module), _turned(module, tensor.float(), config).numpy()
    for name, stack in experts.items():
        yield name, torch.stack(stack).numpy()


def _renamed(module: str) -> str:
    if module in _WHOLE:
        return _WHOLE[module]
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{_IN_LAYER[rest]}"


def _turned(module: str, rows: Tensor, config: Mapping[str, int]) -> Tensor:
    """Rows of a head's queries and keys from (x0, x1 ... y0, y1 ...) to (x0, y0, x1, y1 ...), which GGUF rotates."""
    part = module.rpartition(".")[2]
    if part not in ("q_proj", "k_proj"):
        return rows
    num_heads = config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"]
    return rows.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(rows.shape).contiguous()
