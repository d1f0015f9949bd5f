"""Decode of a synthetic EXL2 model of Yi-34B's shape in 24 GiB, at 24,000 tokens of context.

The weights are drawn on the device tensor by tensor, as files would have them, and loaded by the server's own loader.
Where exllamav2 is installed the model runs by its kernels, too; both must give the same logits.
"""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from bench.gpu.cases import make_step, make_table, noisy_cache
from bench.gpu.model import FULL, SMALL
from bench.gpu.random_weights import exl2_entries, random_model
from bench.gpu.timing import seconds
from tightrope.backends.hf.load.model import LoadedModel
from tightrope.backends.hf.run.graphs import DecodeGraphs
from tightrope.backends.quant.find import find_quantization
from tightrope.kernels import exllama
from tightrope.kernels.forms.layout import CacheFormat, LayerCache

BAR = 0.6  # share of the roofline that decode must reach
CAP = 24 << 30  # bytes
CONTEXT, PROMPT = 24_000, 512  # tokens: cached, and of a prompt's last chunk
AGREE = 0.05  # largest difference of logits between kernels, of the largest logit: theirs are sums in float16


def measure(
    device: torch.device, bandwidth: float, is_smoke: bool, show: Callable[[str], None]
) -> list[dict[str, object]]:
    """One row for each of the kernels: times, peak memory, share of the roofline."""
    kernels: list[tuple[str, AbstractContextManager[object]]] = [
        ("Triton", patch.object(exllama, "extension", return_value=None))
    ]
    if device.type == "cuda" and exllama.extension() is not None:
        kernels.append(("exllamav2", nullcontext()))
    rows: list[dict[str, object]] = []
    first: Tensor | None = None
    for name, choice in kernels:
        with choice:
            _forget(device)
            row, logits = _measure(device, bandwidth, is_smoke, show)
        gap = 0.0 if first is None else ((logits - first).abs().max() / first.abs().max()).item()
        first = logits if first is None else first
        row |= {"kernel": name, "gap": gap, "holds": gap <= AGREE and (name != "Triton" or bool(row["holds"]))}
        rows.append(row)
        show(
            f"exl2 decode by {name}: {row['tokens_per_s']:.1f} tokens/s, {row['share']:.0%} of the roofline, peak "
            f"{row['peak_bytes'] / 2**30:.2f} GiB"  # type: ignore[operator]  # a row holds values of any kind
        )
    return rows


def _measure(
    device: torch.device, bandwidth: float, is_smoke: bool, show: Callable[[str], None]
) -> tuple[dict[str, object], Tensor]:
    sizes = SMALL if is_smoke else FULL
    context, prompt = (40, 5) if is_smoke else (CONTEXT, PROMPT)
    is_card = device.type == "cuda"
    before = torch.cuda.memory_allocated() if is_card else 0
    if is_card:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total))
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    model, weights = random_model(sizes, exl2_entries(sizes), device, show)
    load_s = time.perf_counter() - begin
    quantization = find_quantization(weights.folder, {}, weights)
    assert quantization is not None
    loaded = torch.cuda.memory_allocated() - before if is_card else quantization.memory_bytes
    format = CacheFormat("q8", model.layers[0].num_kv_heads, model.layers[0].head_dim)
    torch.manual_seed(0)
    num_pages = make_step(((1, context),), device)[1]
    caches = [noisy_cache(format, num_pages, device) for _ in model.layers]
    decode, logits = _step_seconds(model, caches, 1, context)
    chunk, _ = _step_seconds(model, caches, prompt, context)
    table = weights.tensors["model.embed_tokens.weight"].num_bytes  # of which a step reads a row
    step_bytes = quantization.memory_bytes - table + format.bytes_per_token * context * len(model.layers)
    share = step_bytes / decode / bandwidth
    row: dict[str, object] = {
        "layers": len(model.layers),
        "context": context,
        "bits_per_weight": quantization.bits_per_weight,
        "load_s": load_s,
        "planned_weight_bytes": quantization.memory_bytes,
        "weight_bytes": loaded,
        "peak_bytes": torch.cuda.max_memory_allocated() if is_card else 0,
        "cap_bytes": CAP,
        "step_bytes": step_bytes,
        "step_ms": decode * 1e3,
        "tokens_per_s": 1 / decode,
        "prompt_tokens_per_s": prompt / chunk,
        "share": share,
        "bar": BAR,
        "holds": share >= BAR,
    }
    return row, logits


def _step_seconds(
    model: LoadedModel, caches: Sequence[LayerCache], num_tokens: int, context: int
) -> tuple[float, Tensor]:
    """Time of a step whose tokens are the last of the context, and logits [1, V] of the last one, on the CPU."""
    torch.manual_seed(0)
    device = model.device
    step, _ = make_step(((num_tokens, context),), device)
    tables = {"default": make_table(model.layers[0].head_dim, context, 1, device, theta=5e6)}
    token_ids = torch.arange(num_tokens, device=device)
    rows = torch.tensor([num_tokens - 1], device=device)
    is_card = device.type == "cuda"
    over = partial(model.forward, caches)
    forward = DecodeGraphs(over, 1, context, device).forward if is_card else over
    run = partial(forward, token_ids, step, tables, rows)
    with torch.inference_mode():
        return seconds(run, device, 20 if is_card and num_tokens == 1 else 3), run().float().cpu()


def _forget(device: torch.device) -> None:
    """Give back what an earlier model took, whose modules refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
