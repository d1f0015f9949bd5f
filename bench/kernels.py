"""How near the CPU kernels come to this machine's limits, with torch's own operations in the same run.

    python -m bench.kernels [--threads N]

The limit is the bandwidth with which all threads together read memory. Weights and caches are taken in turn
from a set larger than the processor's caches, as a model's layers are. Writes bench/results/kernels.json.
"""

import argparse
import time
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import report
from tightrope.backends.threads import compute_threads
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layout import (
    PAGE,
    AttentionSpec,
    CacheDtype,
    CacheFormat,
    LayerCache,
    RopeTable,
    StepLayout,
)

BEYOND_CACHES = 300e6  # bytes
SIZES = ((576, 576), (1536, 576), (576, 1536), (4096, 4096), (4096, 11008))  # outputs, inputs
HEADS = ((9, 3, 64), (32, 8, 128))  # H, Hkv, D: of SmolLM2-135M, of Llama 3 8B
Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=0, help="0 is one per physical core")
    threads = compute_threads(parser.parse_args().threads)
    torch.set_num_threads(threads)
    dispatch.set_threads(threads)
    results: dict[str, object] = {
        "kernels": dispatch.describe(),
        "threads": threads,
        "linear": [linear(n, k, rows) for n, k in SIZES for rows in (1, 4, 8, 64, 512)],
        "decode_attention": [
            decode(heads, dtype, tokens)
            for heads in HEADS
            for dtype in ("q8", "q4", "f16")
            for tokens in (1024, 8192, 24576)
        ],
        "prefill_attention": [prefill(heads, tokens) for heads in HEADS for tokens in (512, 4096)],
    }
    print(report.write("kernels", results))


def seconds(work: Callable[[], object], least: int = 5) -> float:
    """The shortest of some runs, after one that isn't counted: what the machine can do when nobody disturbs it."""
    work()
    times: list[float] = []
    while len(times) < least or sum(times) < 0.5:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def stream_bandwidth() -> float:
    """GB/s at which all threads together read memory, by torch's sum of whole numbers."""
    numbers = _numbers()
    return numbers.nbytes / seconds(numbers.sum) / 1e9


@lru_cache(maxsize=1)
def _numbers() -> Tensor:
    return torch.ones(1 << 26, dtype=torch.int64)


def share_of_stream(work: Callable[[], object], num_bytes: float) -> tuple[float, Row]:
    """Shortest time of `work` in seconds, and what it reads beside what the machine reads just before and after.

    Neighbours on a shared machine take from its bandwidth, which may double or halve within minutes.
    """
    before = stream_bandwidth()
    took = seconds(work, 3)
    stream = (before + stream_bandwidth()) / 2
    gb_per_s = num_bytes / took / 1e9
    row: Row = {"gb_per_s": round(gb_per_s, 1), "stream_gb_per_s": round(stream, 1)}
    return took, row | {"share_of_stream": round(gb_per_s / stream, 3)}


def shown(kind: str, row: Row) -> Row:
    print(kind, *(f"{name}={value}" for name, value in row.items()), flush=True)
    return row


def linear(n: int, k: int, rows: int) -> Row:
    """bf16 weights [n, k] against torch's linear with the same weights in float32, its fastest type here."""
    count = max(1, int(BEYOND_CACHES / (2 * n * k)))
    weights = [torch.randn(n, k).bfloat16() for _ in range(count)]
    floats = [weight.float() for weight in weights[: max(1, count // 2)]]
    x = torch.randn(rows, k)
    took, limit = share_of_stream(lambda: [dispatch.linear(x, weight, None) for weight in weights], 2 * n * k * count)
    ours = took / count
    peer = seconds(lambda: [F.linear(x, weight) for weight in floats], 3) / len(floats)
    return shown(
        "linear",
        {
            "outputs": n,
            "inputs": k,
            "rows": rows,
            "us": round(ours * 1e6, 1),
            **limit,
            "gflop_per_s": round(2 * n * k * rows / ours / 1e9, 1),
            "torch_float32_us": round(peer * 1e6, 1),
        },
    )


def layers(count: int, heads: tuple[int, int, int], dtype: CacheDtype, tokens: int) -> list[LayerCache]:
    """Layers' caches with `tokens` tokens of noise in their pages."""
    _, num_kv_heads, dims = heads
    caches = [LayerCache.allocate(CacheFormat(dtype, num_kv_heads, dims), tokens // PAGE) for _ in range(count)]
    for cache in caches:
        for start in range(0, tokens, 512):
            keys, values = torch.randn(2, 512, num_kv_heads, dims)
            dispatch.store_kv(cache, keys, values, torch.arange(start, start + 512))
    return caches


def step_of(rows: int, tokens: int) -> StepLayout:
    """One sequence of `tokens` tokens, the last `rows` of which are this step's, in pages as they come."""
    positions = torch.arange(tokens - rows, tokens, dtype=torch.int32)
    pages = torch.arange(-(-tokens // PAGE), dtype=torch.int32)
    return StepLayout(
        torch.tensor([0, rows], dtype=torch.int32),
        torch.tensor([tokens], dtype=torch.int32),
        pages.unsqueeze(0),
        positions.long(),
        positions,
        torch.zeros(rows, dtype=torch.int32),
        rows,
        tokens,
    )


def angles(dims: int, tokens: int) -> RopeTable:
    inv_freq = 10000.0 ** -(torch.arange(dims // 2) / (dims // 2))

    def turned(positions: Tensor) -> Tensor:
        angle = positions.unsqueeze(1) * inv_freq
        return torch.stack((angle.cos(), angle.sin()), 1).unsqueeze(0)  # [1, positions, 2, dims / 2]

    pages, places = turned(torch.arange(0, tokens, PAGE)), turned(torch.arange(PAGE))
    return RopeTable(pages, places, torch.zeros(1, dtype=torch.int32), torch.ones(1))


def decode(heads: tuple[int, int, int], dtype: CacheDtype, tokens: int) -> Row:
    """One query over `tokens` cached ones, layer after layer; torch's reads float32, rotated before."""
    num_heads, num_kv_heads, dims = heads
    bytes_per_layer = CacheFormat(dtype, num_kv_heads, dims).bytes_per_token * tokens
    caches = layers(max(1, int(BEYOND_CACHES / bytes_per_layer)), heads, dtype, tokens)
    queries, spec = torch.randn(1, num_heads, dims), AttentionSpec(dims**-0.5)
    step, table = step_of(1, tokens), angles(dims, tokens)
    took, limit = share_of_stream(
        lambda: [dispatch.attention(queries, cache, step, table, spec) for cache in caches],
        bytes_per_layer * len(caches),
    )
    ours = took / len(caches)
    count = max(1, int(BEYOND_CACHES / (8 * num_kv_heads * dims * tokens)))
    pairs = [torch.randn(2, 1, num_kv_heads, tokens, dims) for _ in range(count)]
    q = queries.view(1, num_heads, 1, dims)
    peer = seconds(lambda: [F.scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in pairs], 3) / count
    return shown(
        "decode",
        {
            "heads": num_heads,
            "kv_heads": num_kv_heads,
            "head_dim": dims,
            "cache": dtype,
            "tokens": tokens,
            "us": round(ours * 1e6, 1),
            **limit,
            "torch_float32_us": round(peer * 1e6, 1),
        },
    )


def prefill(heads: tuple[int, int, int], tokens: int) -> Row:
    """The last 512 of `tokens` tokens over all of them; torch's has float32 keys and values, rotated before."""
    num_heads, num_kv_heads, dims = heads
    rows = 512
    [cache], step, table = layers(1, heads, "q8", tokens), step_of(rows, tokens), angles(dims, tokens)
    queries, spec = torch.randn(rows, num_heads, dims), AttentionSpec(dims**-0.5)
    ours = seconds(lambda: dispatch.attention(queries, cache, step, table, spec))
    q = torch.randn(1, num_heads, rows, dims)
    k, v = torch.randn(2, 1, num_kv_heads, tokens, dims)
    seen = torch.ones(rows, tokens, dtype=torch.bool).tril(tokens - rows)
    peer = seconds(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True))
    flop = 4 * dims * num_heads * int(seen.sum())
    return shown(
        "prefill",
        {
            "heads": num_heads,
            "kv_heads": num_kv_heads,
            "head_dim": dims,
            "rows": rows,
            "tokens": tokens,
            "ms": round(ours * 1e3, 2),
            "gflop_per_s": round(flop / ours / 1e9, 1),
            "torch_float32_ms": round(peer * 1e3, 2),
        },
    )


if __name__ == "__main__":
    main()
