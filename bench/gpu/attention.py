"""Decode attention over long contexts against the bandwidth of the device's memory."""

from collections.abc import Callable

import torch

from bench.gpu.cases import make_step, make_table, noisy_cache
from bench.gpu.timing import recorded, seconds
from tightrope.kernels.forms.layout import AttentionSpec, CacheDtype, CacheFormat
from tightrope.kernels.triton import ops

BAR = 0.6  # share of the bandwidth that decode of 24k and 128k tokens must reach
NUM_KV_HEADS, GROUP, HEAD_DIM = 8, 7, 128  # Yi-34B's


def measure(
    device: torch.device, bandwidth: float, is_smoke: bool, show: Callable[[str], None]
) -> list[dict[str, object]]:
    """One row for each context, batch and cache: time of a layer and share of `bandwidth`, recorded or not."""
    settings: list[tuple[int, int, CacheDtype]] = [(200, 1, "q8")]
    if not is_smoke:
        settings = [
            (tokens, num_seqs, dtype)
            for tokens, num_seqs in ((24_000, 1), (24_000, 8), (128_000, 1))
            for dtype in ("q8", "q4", "f16")
        ]
    rows = []
    for tokens, num_seqs, dtype in settings:
        row = _measure(device, bandwidth, tokens, num_seqs, dtype)
        rows.append(row)
        show(
            f"decode attention: {row['tokens']} x {row['sequences']} {dtype}, {row['share_graph']:.0%} of the bandwidth"
        )
    return rows


def _measure(
    device: torch.device, bandwidth: float, tokens: int, num_seqs: int, dtype: CacheDtype
) -> dict[str, object]:
    format = CacheFormat(dtype, NUM_KV_HEADS, HEAD_DIM)
    layer_bytes = format.bytes_per_token * tokens * num_seqs
    # as many layers as are several times the last cache between memory and processors, which one layer may fit
    num_layers = max(1, min(60, -(-(2 << 30) // layer_bytes))) if device.type == "cuda" else 2
    step, num_pages = make_step(((1, tokens),) * num_seqs, device)
    caches = [noisy_cache(format, num_pages, device) for _ in range(num_layers)]
    table = make_table(HEAD_DIM, tokens, num_seqs, device, theta=5e6)
    queries = torch.randn(num_seqs, NUM_KV_HEADS * GROUP, HEAD_DIM, device=device).bfloat16()
    spec = AttentionSpec(scale=HEAD_DIM**-0.5)

    def work() -> None:
        for cache in caches:
            ops.attention(queries, cache, step, table, spec)

    repeats = 20 if device.type == "cuda" else 1
    eager = seconds(work, device, repeats) / num_layers
    graph = seconds(recorded(work), device, repeats) / num_layers if device.type == "cuda" else eager
    shares = {name: layer_bytes / time / bandwidth for name, time in (("share_graph", graph), ("share_eager", eager))}
    return {
        "tokens": tokens,
        "sequences": num_seqs,
        "cache": dtype,
        "layers": num_layers,
        "layer_bytes": layer_bytes,
        "layer_us_graph": graph * 1e6,
        "layer_us_eager": eager * 1e6,
        **shares,
        "bar": BAR,
        "holds": shares["share_graph"] >= BAR,
    }
