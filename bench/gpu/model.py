"""Decode of a synthetic model of Yi-34B's shape against the time in which its weights can be read.

The model is the server's own, over random weights that are made on the device; its layers are as many as fit.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.gpu.cases import make_step, make_table, noisy_cache
from bench.gpu.timing import seconds
from tightrope.backends.hf.checkpoint import Checkpoint, Shard, TensorEntry
from tightrope.backends.hf.config import read_config
from tightrope.backends.hf.graphs import DecodeGraphs, Forward
from tightrope.backends.hf.model import LoadedModel, load_model
from tightrope.kernels.layout import CacheFormat

BAR = 0.7  # share of the roofline that decode of one sequence must reach under graphs
BATCHES = (1, 8)
CONTEXT = 2048  # tokens of each sequence
FULL = {
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "vocab_size": 64000,
}
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


class RandomWeights(Checkpoint):
    """A checkpoint that is nowhere: each tensor is drawn when it is read."""

    __slots__ = ()

    def read(self, name: str) -> Tensor:
        shape = self.tensors[name].shape
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=device)
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=shape[1] ** -0.5)

    def release(self, shard: Shard) -> None:
        """Nothing is mapped."""

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """They are."""


def measure(
    device: torch.device, bandwidth: float, is_smoke: bool, show: Callable[[str], None]
) -> list[dict[str, object]]:
    """One row for each batch, with graphs and without: time of a step, the bytes it must read and its share."""
    sizes = dict(SMALL if is_smoke else FULL)
    if device.type == "cuda" and not is_smoke:
        sizes["num_hidden_layers"] = _layers_that_fit(sizes, torch.cuda.mem_get_info(device)[0])
    model, weight_bytes = _random_model(sizes, device, show)
    rows = []
    for num_seqs in (1, 2) if is_smoke else BATCHES:
        for row in _measure(model, weight_bytes, num_seqs, 40 if is_smoke else CONTEXT, bandwidth):
            rows.append(row)
            how = "with" if row["graphs"] else "without"
            show(f"decode: {num_seqs} x {how} graphs, {row['step_ms']:.2f} ms, {row['share']:.0%} of the roofline")
    return rows


def _measure(
    model: LoadedModel, weight_bytes: int, num_seqs: int, context: int, bandwidth: float
) -> Iterator[dict[str, object]]:
    layer, device = model.layers[0], model.device
    format = CacheFormat("q8", layer.num_kv_heads, layer.head_dim)
    step, num_pages = make_step(((1, context),) * num_seqs, device)
    model.attach([noisy_cache(format, num_pages, device) for _ in model.layers])
    tables = {"default": make_table(layer.head_dim, context, num_seqs, device, theta=5e6)}
    token_ids, rows = torch.zeros(num_seqs, dtype=torch.int64, device=device), torch.arange(num_seqs, device=device)
    step_bytes = weight_bytes + format.bytes_per_token * context * num_seqs * len(model.layers)
    for graphs, forward in _runners(model, context, device):
        with torch.inference_mode():
            time = seconds(partial(forward, token_ids, step, tables, rows), device, 20)
        share = step_bytes / time / bandwidth
        is_judged = graphs and num_seqs == 1
        yield {
            "layers": len(model.layers),
            "sequences": num_seqs,
            "context": context,
            "graphs": graphs,
            "step_bytes": step_bytes,
            "step_ms": time * 1e3,
            "share": share,
            "bar": BAR if is_judged else None,
            "holds": share >= BAR or not is_judged,
        }


def _runners(model: LoadedModel, context: int, device: torch.device) -> list[tuple[bool, Forward]]:
    if device.type != "cuda":
        return [(False, model.forward)]
    return [(False, model.forward), (True, DecodeGraphs(model.forward, max(BATCHES), context, device).forward)]


def _layers_that_fit(sizes: dict[str, int], free_bytes: int) -> int:
    """Layers of bf16 weights, beside embedding and head, in four fifths of what is free."""
    entries = _entries(sizes | {"num_hidden_layers": 1})
    layer_bytes = sum(entry.num_bytes for entry in entries if ".layers." in entry.name)
    rest = sum(entry.num_bytes for entry in entries) - layer_bytes
    return max(1, min(sizes["num_hidden_layers"], (free_bytes * 4 // 5 - rest) // layer_bytes))


def _random_model(sizes: dict[str, int], device: torch.device, show: Callable[[str], None]) -> tuple[LoadedModel, int]:
    """The model, and the bytes of weights that each step reads: all but the embedding's table."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "max_position_embeddings": 4096,
        "rope_theta": 5e6,
        "tie_word_embeddings": False,
        **sizes,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        entries = _entries(sizes)
        weights = RandomWeights(
            folder, {e.name: e for e in entries}, (Shard(folder / "random", tuple(e.name for e in entries)),)
        )
        show(f"random weights: {sizes['num_hidden_layers']} layers, {weights.weight_bytes / 2**30:.1f} GiB")
        model = load_model(folder, read_config(folder), weights, device=device)
    return model, sum(entry.num_bytes for entry in entries if "embed_tokens" not in entry.name)


def _entries(sizes: dict[str, int]) -> Sequence[TensorEntry]:
    """The tensors of a Llama checkpoint of these sizes."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    kv = hidden // heads * kv_heads
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes["vocab_size"], hidden)}
    for i in range(sizes["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (sizes["vocab_size"], hidden)}
    return [
        TensorEntry(name, "BF16", shape, Path("random"), 0, 2 * torch.Size(shape).numel())
        for name, shape in shapes.items()
    ]
