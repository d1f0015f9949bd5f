"""Checkpoints of Llama's and Mixtral's layout that are nowhere: each tensor is drawn when it is read.

The same name gives the same numbers. Sizes that have `num_local_experts` are a Mixtral's.
"""

import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.gpu.matrices import GROUP_ROWS, exl2_bits
from tightrope.backends.files.hf_config import read_config
from tightrope.backends.files.safetensors import Checkpoint, Shard, TensorEntry
from tightrope.backends.hf.load.blueprint import draw
from tightrope.backends.hf.load.model import LoadedModel, build

HEAD_BITS = 6
DTYPE_BYTES = {"BF16": 2, "F16": 2, "I16": 2, "I32": 4}
FILE = Path("random")

Sizes = Mapping[str, int]  # fields of config.json
YI_34B: Sizes = {
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "vocab_size": 64000,
}
SMALL: Sizes = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}


class RandomWeights(Checkpoint):
    """Tensors are made on the card, if there is one."""

    __slots__ = ()

    def whole(self, name: str) -> Tensor:
        entry = self.tensors[name]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        module, _, part = name.rpartition(".")
        if part in ("q_groups", "q_scale_max", "q_invperm"):
            num_inputs = self.tensors[f"{module}.q_invperm"].shape[0]
            return _exl2_rows(part, num_inputs, _bits(module, num_inputs), generator).to(device)
        if part == "scales":  # of GPTQ: uniform codes of 4 bits give products of about the size of their input
            inputs = GROUP_ROWS * entry.shape[0]
            return torch.full(entry.shape, math.sqrt(12 / inputs) / 16, dtype=torch.float16, device=device)
        if part == "qzeros":  # of 8, stored less one
            return torch.full(entry.shape, 0x77777777, dtype=torch.int32, device=device)
        if entry.dtype == "I32":  # words of codes of any kind
            full = torch.iinfo(torch.int32)
            return torch.randint(full.min, full.max, entry.shape, dtype=torch.int32, device=device, generator=generator)
        dtype = torch.bfloat16 if entry.dtype == "BF16" else torch.float16
        if len(entry.shape) == 1:
            return torch.ones(entry.shape, dtype=dtype, device=device)
        weight = torch.empty(entry.shape, dtype=dtype, device=device)
        return weight.normal_(std=entry.shape[1] ** -0.5, generator=generator)

    def release(self, shard: Shard) -> None:
        """Nothing is mapped."""

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """They are."""


def random_model(
    sizes: Sizes, entries: Sequence[TensorEntry], device: torch.device, show: Callable[[str], None]
) -> tuple[LoadedModel, RandomWeights]:
    """The server's own model of these sizes and tensors, and its weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = _weights(folder, sizes, entries)
        show(f"random weights: {sizes['num_hidden_layers']} layers, {weights.weight_bytes / 2**30:.1f} GiB")
        return build(draw(folder, read_config(folder), weights, device=device)), weights


def write_sparse(folder: Path, sizes: Sizes, entries: Sequence[TensorEntry]) -> None:
    """A folder as long as such a checkpoint, and next to nothing on disk: all codes and embeddings are zero.

    What says how codes are stored is there, and so are scales and norms.
    """
    weights = _weights(folder, sizes, entries)
    header: dict[str, object] = {}
    end = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [end, end := end + entry.num_bytes],
        }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            if len(entry.shape) == 1:
                file.write(weights.read(entry.name).cpu().numpy().tobytes())
            else:
                file.seek(entry.num_bytes, os.SEEK_CUR)
        file.truncate()


def _weights(folder: Path, sizes: Sizes, entries: Sequence[TensorEntry]) -> RandomWeights:
    """The tensors of a folder, into which config.json is written."""
    kind = "Mixtral" if "num_local_experts" in sizes else "Llama"
    config = {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "dtype": "bfloat16" if entries[0].dtype == "BF16" else "float16",
        "max_position_embeddings": 4096,
        "rope_theta": 5e6,
        "tie_word_embeddings": False,
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    names = tuple(entry.name for entry in entries)
    return RandomWeights(folder, {entry.name: entry for entry in entries}, (Shard(FILE, names),))


def plain_entries(sizes: Sizes) -> list[TensorEntry]:
    """The tensors of a checkpoint in bf16."""
    return _entries(sizes, "BF16", lambda name, shape: [_entry(f"{name}.weight", "BF16", shape)])


def exl2_entries(sizes: Sizes) -> list[TensorEntry]:
    """Those of one in EXL2, of 4.65 bits and a head of HEAD_BITS."""

    def linear(name: str, shape: tuple[int, ...]) -> list[TensorEntry]:
        outputs, inputs = shape
        groups = inputs // GROUP_ROWS
        return [
            _entry(f"{name}.q_weight", "I32", (sum(_bits(name, inputs)) * GROUP_ROWS // 32, outputs)),
            _entry(f"{name}.q_scale", "I32", (groups, outputs // 8)),
            _entry(f"{name}.q_scale_max", "F16", (groups,)),
            _entry(f"{name}.q_groups", "I16", (2 * groups,)),
            _entry(f"{name}.q_invperm", "I32", (inputs,)),
        ]

    return _entries(sizes, "F16", linear)


def gptq_entries(sizes: Sizes) -> list[TensorEntry]:
    """Those of one in GPTQ of 4 bits, whose head and routers are plain."""

    def linear(name: str, shape: tuple[int, ...]) -> list[TensorEntry]:
        if name.endswith(("lm_head", ".gate")):
            return [_entry(f"{name}.weight", "F16", shape)]
        outputs, inputs = shape
        groups = inputs // GROUP_ROWS
        return [
            _entry(f"{name}.qweight", "I32", (inputs // 8, outputs)),
            _entry(f"{name}.qzeros", "I32", (groups, outputs // 8)),
            _entry(f"{name}.scales", "F16", (groups, outputs)),
        ]

    return _entries(sizes, "F16", linear)


def _entries(
    sizes: Sizes, dtype: str, linear: Callable[[str, tuple[int, ...]], list[TensorEntry]]
) -> list[TensorEntry]:
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    kv = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
    }
    experts = range(sizes.get("num_local_experts", 0))
    mlps = [(f"block_sparse_moe.experts.{e}", ("w1", "w3", "w2")) for e in experts]
    for mlp, names in mlps or [("mlp", ("gate_proj", "up_proj", "down_proj"))]:
        shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        linears |= {f"{mlp}.{name}": shape for name, shape in zip(names, shapes, strict=True)}
    if mlps:
        linears["block_sparse_moe.gate"] = (len(mlps), hidden)
    entries = [_entry("model.embed_tokens.weight", dtype, (sizes["vocab_size"], hidden))]
    for i in range(sizes["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        entries += [entry for name, shape in linears.items() for entry in linear(f"{layer}.{name}", shape)]
        entries += [_entry(f"{layer}.{n}_layernorm.weight", dtype, (hidden,)) for n in ("input", "post_attention")]
    entries.append(_entry("model.norm.weight", dtype, (hidden,)))
    return entries + linear("lm_head", (sizes["vocab_size"], hidden))


def _entry(name: str, dtype: str, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(name, dtype, shape, FILE, 0, DTYPE_BYTES[dtype] * torch.Size(shape).numel())


def _bits(module: str, num_inputs: int) -> list[int]:
    """The width of each group of a linear."""
    return [HEAD_BITS] * (num_inputs // GROUP_ROWS) if module == "lm_head" else exl2_bits(num_inputs)


def _exl2_rows(part: str, num_inputs: int, bits: list[int], generator: torch.Generator) -> Tensor:
    """How the rows of an EXL2 matrix are stored, and scales that give products of about the size of their input."""
    widths = torch.tensor(bits)
    if part == "q_groups":
        words = widths * (GROUP_ROWS // 32)
        return torch.stack((widths, words.cumsum(0) - words), 1).flatten().short()
    if part == "q_scale_max":
        return (2 * torch.exp2(-widths.float()) * math.sqrt(12 / num_inputs)).half()
    return torch.randperm(num_inputs, generator=generator, dtype=torch.int32, device=generator.device)
