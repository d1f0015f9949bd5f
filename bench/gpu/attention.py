"""Decode attention over long contexts against the bandwidth of the device's memory."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu.cases import make_step, make_table, noisy_cache
from bench.gpu.run import Row, Run, tried
from bench.gpu.timing import recorded, seconds
from tightrope.kernels.forms.layout import AttentionSpec, CacheDtype, CacheFormat
from tightrope.kernels.triton import ops

BAR = 0.6  # share of the bandwidth that decode of 24k and 128k tokens must reach
NUM_KV_HEADS, GROUP, HEAD_DIM = 8, 7, 128  # Yi-34B's
WORKING_SET = 2 << 30  # bytes: as many layers take turns as no cache between memory and processors holds


def rows(run: Run) -> Iterator[Row]:
    """One for each context, batch and cache."""
    sizes = ((40, 1),) if run.is_smoke else ((24_000, 1), (24_000, 8), (128_000, 1))
    dtypes: tuple[CacheDtype, ...] = ("q8",) if run.is_smoke else ("q8", "q4", "f16")
    for tokens, num_seqs in sizes:
        for dtype in dtypes:
            title: Row = {"tokens": tokens, "sequences": num_seqs, "cache": dtype}
            yield tried(title, partial(_measure, run, tokens, num_seqs, dtype))


def _measure(run: Run, tokens: int, num_seqs: int, dtype: CacheDtype) -> Row:
    format = CacheFormat(dtype, NUM_KV_HEADS, HEAD_DIM)
    layer_bytes = format.bytes_per_token * tokens * num_seqs
    is_card = run.device.type == "cuda"
    num_layers = max(1, min(60, -(-WORKING_SET // layer_bytes))) if is_card else 2
    step, num_pages = make_step(((1, tokens),) * num_seqs, run.device)
    caches = [noisy_cache(format, num_pages, run.device) for _ in range(num_layers)]
    table = make_table(HEAD_DIM, tokens, num_seqs, run.device, theta=5e6)
    queries = torch.randn(num_seqs, NUM_KV_HEADS * GROUP, HEAD_DIM, device=run.device).bfloat16()
    spec = AttentionSpec(scale=HEAD_DIM**-0.5)

    def work() -> None:
        for cache in caches:
            ops.attention(queries, cache, step, table, spec)

    time = seconds(recorded(work) if is_card else work, run.device, run.repeats) / num_layers
    return {"layer_bytes": layer_bytes, "layer_us": time * 1e6, **run.judged(layer_bytes, time, BAR)}
