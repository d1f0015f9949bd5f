"""Model folders that hold headers only: sizes of real models without a byte of their weights."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

Tensor = tuple[str, str, list[int]]  # name, safetensors dtype, shape
WIDTHS = {"BF16": 2, "F16": 2, "I32": 4}

YI_34B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 60,
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "vocab_size": 64000,
    "max_position_embeddings": 4096,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


def write_folder(folder: Path, config: dict[str, object], tensors: list[Tensor]) -> Path:
    """A folder with config.json and one sparse safetensors file: as long as it claims, and nearly nothing on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, object] = {}
    end = 0
    for name, dtype, shape in tensors:
        size = WIDTHS[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


def yi_34b(folder: Path, bits_per_weight: float = 4.65) -> Path:
    """Yi-34B with all linear weights packed into 32-bit words at that many bits a weight; the embedding has 16."""
    return write_folder(folder, YI_34B, list(_yi_tensors(bits_per_weight)))


def _yi_tensors(bits_per_weight: float) -> Iterator[Tensor]:
    yield "model.embed_tokens.weight", "F16", [64000, 7168]
    linears = {"q": (7168, 7168), "k": (1024, 7168), "v": (1024, 7168), "o": (7168, 7168)}
    linears |= {"gate": (20480, 7168), "up": (20480, 7168), "down": (7168, 20480)}
    for layer in range(60):
        for name, (rows, columns) in linears.items():
            words = int(rows * columns * bits_per_weight / 32)
            yield f"model.layers.{layer}.{name}_proj.qweight", "I32", [words]
    yield "lm_head.qweight", "I32", [int(64000 * 7168 * bits_per_weight / 32)]
