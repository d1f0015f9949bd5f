"""Decode of a synthetic model of Yi-34B's shape against the time in which its weights can be read.

The model is the server's own, over random weights that are made on the device; its layers are as many as fit.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.gpu.cases import make_step, make_table, noisy_cache
from bench.gpu.random_weights import plain_entries, random_model
from bench.gpu.timing import seconds
from tightrope.backends.hf.load.model import LoadedModel
from tightrope.backends.hf.run.graphs import DecodeGraphs, Forward
from tightrope.kernels.forms.layout import CacheFormat

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


def measure(
    device: torch.device, bandwidth: float, is_smoke: bool, show: Callable[[str], None]
) -> list[dict[str, object]]:
    """One row for each batch, with graphs and without: time of a step, the bytes it must read and its share."""
    sizes = dict(SMALL if is_smoke else FULL)
    if device.type == "cuda" and not is_smoke:
        sizes["num_hidden_layers"] = _layers_that_fit(sizes, torch.cuda.mem_get_info(device)[0])
    model, weights = random_model(sizes, plain_entries(sizes), device, show)
    weight_bytes = sum(e.num_bytes for e in weights.tensors.values() if "embed_tokens" not in e.name)  # read in a step
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
    over = partial(model.forward, [noisy_cache(format, num_pages, device) for _ in model.layers])
    tables = {"default": make_table(layer.head_dim, context, num_seqs, device, theta=5e6)}
    token_ids, rows = torch.zeros(num_seqs, dtype=torch.int64, device=device), torch.arange(num_seqs, device=device)
    step_bytes = weight_bytes + format.bytes_per_token * context * num_seqs * len(model.layers)
    for graphs, forward in _runners(over, context, device):
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


def _runners(forward: Forward, context: int, device: torch.device) -> list[tuple[bool, Forward]]:
    if device.type != "cuda":
        return [(False, forward)]
    return [(False, forward), (True, DecodeGraphs(forward, max(BATCHES), context, device).forward)]


def _layers_that_fit(sizes: dict[str, int], free_bytes: int) -> int:
    """Layers of bf16 weights, beside embedding and head, in four fifths of what is free."""
    entries = plain_entries(sizes | {"num_hidden_layers": 1})
    layer_bytes = sum(entry.num_bytes for entry in entries if ".layers." in entry.name)
    rest = sum(entry.num_bytes for entry in entries) - layer_bytes
    return max(1, min(sizes["num_hidden_layers"], (free_bytes * 4 // 5 - rest) // layer_bytes))
