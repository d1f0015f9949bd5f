"""Prompts of Yi-34B's shape: our attention beside torch's flash attention, products with float32 and float16 sums."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from bench.gpu.cases import make_step, make_table, noisy_cache
from bench.gpu.matrices import exl2_bits, large_matrix
from bench.gpu.run import Row, Run, compared, tried
from bench.gpu.timing import seconds
from tightrope.kernels import dispatch
from tightrope.kernels.forms.columns import to_columns
from tightrope.kernels.forms.layout import AttentionSpec, CacheDtype, CacheFormat
from tightrope.kernels.triton import ops

NUM_KV_HEADS, GROUP, HEAD_DIM = 8, 7, 128
CONTEXT, CHUNKS = 24_000, (512, 2048)
INPUTS, OUTPUTS = 7168, 20480
HALF_SUMS_BOUND = 0.05  # of the largest result; a sum of INPUTS float16 numbers that is rounded at each step


def rows(run: Run) -> Iterator[Row]:
    context, chunks = (40, (5, 20)) if run.is_smoke else (CONTEXT, CHUNKS)
    for chunk in chunks:
        for dtype in ("q8", "f16"):
            yield tried(_attention_title(f"ours, {dtype}", chunk), partial(_ours, run, chunk, context, dtype))
        yield tried(_attention_title("torch's flash", chunk), partial(_flash, run, chunk, context))
    for chunk in chunks:
        for are_half in (False, True):
            title: Row = {"product": f"float16, sums in {'float16' if are_half else 'float32'}", "tokens": chunk}
            yield tried(title, partial(_plain, run, chunk, are_half))
        yield tried({"product": "exl2, expanded", "tokens": chunk}, partial(_exl2, run, chunk))


def _attention_title(name: str, chunk: int) -> Row:
    return {"attention": name, "tokens": chunk}


def _timed(run: Run, work: Callable[[], object], operations: int) -> Row:
    with torch.inference_mode():
        time = seconds(work, run.device, 5 if run.device.type == "cuda" else 1)
    return {"ms": time * 1e3, "tflops": operations / time / 1e12}


def _attention_operations(chunk: int, context: int) -> int:
    """Of both products, for the keys that each query sees."""
    pairs = chunk * (context - chunk) + chunk * (chunk + 1) // 2
    return 4 * pairs * NUM_KV_HEADS * GROUP * HEAD_DIM


def _ours(run: Run, chunk: int, context: int, dtype: CacheDtype) -> Row:
    step, num_pages = make_step(((chunk, context),), run.device)
    cache = noisy_cache(CacheFormat(dtype, NUM_KV_HEADS, HEAD_DIM), num_pages, run.device)
    table = make_table(HEAD_DIM, context, 1, run.device, theta=5e6)
    queries = torch.randn(chunk, NUM_KV_HEADS * GROUP, HEAD_DIM, device=run.device).half()
    spec = AttentionSpec(HEAD_DIM**-0.5)
    work = partial(ops.attention, queries, cache, step, table, spec)
    return _timed(run, work, _attention_operations(chunk, context))


def _flash(run: Run, chunk: int, context: int) -> Row:
    """Keys and values lie there as it wants them; its time is what ours can come down to."""

    def randn(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, HEAD_DIM, device=run.device).half()

    queries, keys, values = (
        randn(NUM_KV_HEADS * GROUP, chunk),
        randn(NUM_KV_HEADS, context),
        randn(NUM_KV_HEADS, context),
    )

    def work() -> Tensor:
        mask = causal_lower_right(chunk, context)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)

    if run.device.type != "cuda":
        return _timed(run, work, _attention_operations(chunk, context))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # it fails rather than take another way
        return _timed(run, work, _attention_operations(chunk, context))


def _plain(run: Run, chunk: int, are_half: bool) -> Row:
    """A product, beside the same with float32 sums of the same numbers."""
    inputs, outputs = (64, 48) if run.is_smoke else (INPUTS, OUTPUTS)
    x = torch.randn(chunk, inputs, device=run.device).half()
    weight = (torch.randn(inputs, outputs, device=run.device) / inputs**0.5).half()
    wanted = x.float() @ weight.float()
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_fp16_accumulation = matmul.allow_fp16_accumulation, are_half
    try:
        error = compared(x @ weight, wanted, HALF_SUMS_BOUND)
        return _timed(run, lambda: x @ weight, 2 * chunk * inputs * outputs) | error
    finally:
        matmul.allow_fp16_accumulation = before


def _exl2(run: Run, chunk: int) -> Row:
    """The product as a model has it: the matrix is expanded first."""
    inputs, outputs = (128, 32) if run.is_smoke else (INPUTS, OUTPUTS)
    bits = exl2_bits(inputs)
    matrix = to_columns(large_matrix(inputs, outputs, bits, run.device, is_exl2=True, is_permuted=True), run.device)
    x = torch.randn(chunk, inputs, device=run.device).half()
    work = partial(dispatch.column_linear, x, [matrix], None)
    return _timed(run, work, 2 * chunk * inputs * outputs) | {"matrix_bytes": matrix.num_bytes}
