"""A tiny model and adapters, written on the fly: what a server does with them does not depend on what they know."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor

from tightrope.backends.files.gguf.header import read_header

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, WINDOW = 128, 352, 2, 4, 2, 4096
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
RANK = 8


def write_model(folder: Path, others: Mapping[str, object] = MappingProxyType({})) -> Path:
    """A llama of two layers with random weights in bf16, whose tokens are single bytes.

    others: fields of config.json that differ.
    """
    num_tokens = write_tokenizer(folder)
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": WINDOW,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": num_tokens,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
        **others,
    }
    _write_json(folder / "config.json", config)
    save_file(_weights(num_tokens), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_tokenizer(folder: Path) -> int:
    """Tokens that are single bytes, and a chat's marks; returns how many there are."""
    vocab = {mark: place for place, mark in enumerate((*MARKS, *_byte_alphabet()))}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "tokenizer.json", _tokenizer(vocab))
    names = {"bos_token": MARKS[1], "eos_token": MARKS[2], "unk_token": MARKS[0], "chat_template": TEMPLATE}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    return len(vocab)


def write_adapter(model: Path, folder: Path, seed: int) -> Path:
    """A PEFT folder of noise for a model's down projections: for a GGUF file, or a folder with a config.json."""
    layers, hidden, inner = _sizes(model)
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(layers):
        stem = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, inner, generator=draw) / inner**0.5
        tensors[f"{stem}.lora_B.weight"] = 0.01 * torch.randn(hidden, RANK, generator=draw)
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["down_proj"]}
    _write_json(folder / "adapter_config.json", settings)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def _sizes(model: Path) -> tuple[int, int, int]:
    """Layers, width, and width of the MLP."""
    if model.is_dir():
        config = json.loads((model / "config.json").read_text("utf-8"))
        return config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
    metadata = read_header(model).metadata
    keys = ("block_count", "embedding_length", "feed_forward_length")
    layers, hidden, inner = (int(str(metadata[f"{metadata['general.architecture']}.{key}"])) for key in keys)
    return layers, hidden, inner


def _weights(vocab_size: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return (0.06 * torch.randn(*shape, generator=draw)).to(torch.bfloat16)

    head = HIDDEN // HEADS
    tensors = {"model.embed_tokens.weight": noise(vocab_size, HIDDEN)}
    norms = ["model.norm"]
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        norms += [f"{stem}.input_layernorm", f"{stem}.post_attention_layernorm"]
        for name, rows in (("q", HEADS * head), ("k", KV_HEADS * head), ("v", KV_HEADS * head), ("o", HIDDEN)):
            tensors[f"{stem}.self_attn.{name}_proj.weight"] = noise(rows, HIDDEN)
        for name in ("gate", "up"):
            tensors[f"{stem}.mlp.{name}_proj.weight"] = noise(INNER, HIDDEN)
        tensors[f"{stem}.mlp.down_proj.weight"] = noise(HIDDEN, INNER)
    return tensors | {f"{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for name in norms}


def _byte_alphabet() -> list[str]:
    """GPT-2's character for each byte: its own where that can be printed, else one from 256 on."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printed else chr(next(others)) for byte in range(0x100)]


def _tokenizer(vocab: dict[str, int]) -> dict[str, object]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytes_of_text = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": place, "content": mark, **plain} for place, mark in enumerate(MARKS)],
        "normalizer": None,
        "pre_tokenizer": bytes_of_text,
        "post_processor": None,
        "decoder": bytes_of_text,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")
