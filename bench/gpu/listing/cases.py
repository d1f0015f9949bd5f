"""The launches of a model of Yi-34B's shape, and of a Mixtral's experts, with what each reads and computes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from bench.gpu.listing.matrices import matrix_of, meta
from bench.gpu.listing.recorded import Launch, recorded
from bench.gpu.matrices import exl2_bits
from tightrope.kernels.forms.column_stack import ColumnStack
from tightrope.kernels.forms.columns import ColumnMatrix
from tightrope.kernels.forms.layer import StackedExperts
from tightrope.kernels.forms.layout import (
    PAGE,
    AttentionSpec,
    CacheDtype,
    CacheFormat,
    LayerCache,
    RopeTable,
    StepLayout,
)
from tightrope.kernels.forms.low_rank import AdapterRows, LowRankSlots, make_low_rank
from tightrope.kernels.triton import attention, expanded, experts, ops, quantized

HIDDEN, MIDDLE, NUM_KV_HEADS, GROUP, HEAD_DIM = 7168, 20480, 8, 7, 128
CONTEXT, CHUNK, WINDOW = 24_000, 512, 4096
EXPERTS, EXPERT_HIDDEN, EXPERT_MIDDLE = 8, 4096, 14336
FEW = ((1, torch.float16), (8, torch.float16))
BARRED = (*FEW, (8, torch.bfloat16))
WHOLE = (*BARRED, (32, torch.float16))


@dataclass(frozen=True)
class Case:
    """A launch by name. `num_bytes` that must be read from memory for `num_weights` weights or cached numbers.

    `turns` of its loop that a program makes, on average. Without bytes only its registers and memory are of interest.
    """

    name: str
    launch: Launch
    num_bytes: int = 0
    num_weights: int = 0
    turns: float = 1


def cases(num_processors: int) -> Iterator[Case]:
    """On a card of so many multiprocessors."""
    yield from _products()
    yield from _attention(num_processors)
    yield from _experts()
    yield from _small()


def _products() -> Iterator[Case]:
    kinds: list[tuple[str, str, Sequence[int], bool]] = [
        ("gptq 4 bits", "gptq", [4], False),
        ("gptq 4 bits act-order", "gptq", [4], True),
        ("awq 4 bits", "awq", [4], False),
        *((f"exl2 {bits} bits", "exl2", [bits], True) for bits in (8, 6, 5, 4, 3, 2)),
        ("exl2 4.65 bits", "exl2", exl2_bits(HIDDEN), True),
        ("nf4", "nf4", [4], False),
    ]
    for name, kind, bits, is_permuted in kinds:
        matrix = matrix_of(kind, bits, HIDDEN, MIDDLE, is_permuted=is_permuted)
        is_whole = name in ("gptq 4 bits act-order", "exl2 4.65 bits", "nf4")
        for rows, dtype in WHOLE if is_whole else FEW if bits[0] in (2, 3, 8) else BARRED:
            title = f"{name}, {rows} row{'s' * (rows > 1)}" + (" of bf16" if dtype == torch.bfloat16 else "")
            yield from _product(title, matrix, meta(rows, HIDDEN, dtype=dtype))
        if is_whole:
            for launch in _of(partial(quantized.expand, _away(matrix), torch.float16)):
                yield Case(f"{name}, expanded", launch)
    for launch in _of(partial(quantized.add_parts, meta(12, 8, MIDDLE, dtype=torch.float32), None, meta(8, MIDDLE))):
        yield Case("products of 12 shares and 8 rows, added up", launch)


def _product(title: str, matrix: ColumnMatrix, x: Tensor) -> Iterator[Case]:
    for launch in _of(partial(quantized.quantized_linear, x, [_away(matrix)], None)):
        if launch.name == "sum_parts":
            continue
        if matrix.widths.bit_count() > 1:  # a loop for each width: what each does is in a listing of its own
            yield Case(title, launch)
        else:
            blocks = matrix.shares[:, 2] - matrix.shares[:, 1]
            turns = -(-blocks // launch.args.get("BLOCKS", 1))
            num_weights = matrix.num_inputs * matrix.num_outputs
            yield Case(title, launch, matrix.num_bytes, num_weights, turns.double().mean().item())


def _away(matrix: ColumnMatrix) -> ColumnMatrix:
    return replace(matrix, shares=matrix.shares.to("meta"))


def _attention(num_processors: int) -> Iterator[Case]:
    formats: tuple[CacheDtype, ...] = ("q8", "q4", "f16")
    for dtype, group in (*((dtype, GROUP) for dtype in formats), ("q8", 1)):
        cache, heads = _cache(dtype), f"{dtype}, {group} x {NUM_KV_HEADS} heads"
        for tokens in (1, CHUNK):
            # prompts have a kernel of their own where there is a window
            spec = AttentionSpec(HEAD_DIM**-0.5, window=None if tokens == 1 else WINDOW)
            queries = meta(tokens, NUM_KV_HEADS * group, HEAD_DIM, dtype=torch.bfloat16)
            step, table = _step(tokens)
            with mock.patch.object(attention, "num_processors", return_value=num_processors):
                launches = _of(partial(ops.attention, queries, cache, step, table, spec))
            for launch in launches:
                title = f"{heads}, {tokens} of {CONTEXT} tokens, {launch.name}"
                if launch.name == "decode":
                    stretch = -(-CONTEXT // launch.args["num_splits"])
                    turns = -(-stretch // launch.args["BLOCK_TOKENS"])
                    numbers = 2 * CONTEXT * NUM_KV_HEADS * HEAD_DIM
                    yield Case(title, launch, cache.format.bytes_per_token * CONTEXT, numbers, turns)
                else:
                    yield Case(title, launch)
        if group == GROUP:
            keys = meta(CHUNK, NUM_KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
            for launch in _of(partial(ops.store_kv, cache, keys, keys, step.slots)):
                yield Case(f"{dtype}, {CHUNK} tokens stored", launch)
            for launch in _of(partial(expanded.expand, cache, 0, CONTEXT, step, table, torch.float16)):
                yield Case(f"{dtype}, {CONTEXT} tokens expanded", launch)


def _cache(dtype: CacheDtype) -> LayerCache:
    format = CacheFormat(dtype, NUM_KV_HEADS, HEAD_DIM)
    shape = (-(-CONTEXT // PAGE), NUM_KV_HEADS, PAGE)
    code_dtype = {"q8": torch.int8, "q4": torch.uint8, "f16": torch.float16}[dtype]
    codes = meta(*shape, HEAD_DIM if dtype == "f16" else format.code_bytes, dtype=code_dtype)
    scales = meta(*shape, 0 if dtype == "f16" else format.num_groups)
    return LayerCache(format, codes, scales, codes, scales, meta(NUM_KV_HEADS, HEAD_DIM, dtype=torch.float32))


def _step(num_tokens: int) -> tuple[StepLayout, RopeTable]:
    """One sequence of CONTEXT tokens, the last `num_tokens` of them new."""
    pages = -(-CONTEXT // PAGE)
    int32 = torch.int32
    step = StepLayout(
        query_starts=meta(2, dtype=int32),
        context_lens=meta(1, dtype=int32),
        block_tables=meta(1, pages, dtype=int32),
        slots=meta(num_tokens, dtype=torch.int64),
        positions=meta(num_tokens, dtype=int32),
        sequence_of=meta(num_tokens, dtype=int32),
        max_query_len=num_tokens,
        max_context_len=CONTEXT,
        lengths=((num_tokens, CONTEXT),),
    )
    half, float32 = HEAD_DIM // 2, torch.float32
    angles = (meta(1, pages, 2, half, dtype=float32), meta(1, PAGE, 2, half, dtype=float32))
    return step, RopeTable(*angles, meta(1, dtype=int32), meta(1, dtype=float32))


def _experts() -> Iterator[Case]:
    picked, shares = meta(2, 2, dtype=torch.int64), meta(2, 2, dtype=torch.float32)
    x = meta(2, EXPERT_HIDDEN)
    plain = (meta(EXPERTS, 2 * EXPERT_MIDDLE, EXPERT_HIDDEN), meta(EXPERTS, EXPERT_HIDDEN, EXPERT_MIDDLE))
    gptq = ((_stack(EXPERT_HIDDEN, 2 * EXPERT_MIDDLE),), (_stack(EXPERT_MIDDLE, EXPERT_HIDDEN),))
    for title, (gate_up, down) in (("plain experts", plain), ("gptq experts", gptq)):
        layer = StackedExperts(gate_up, down, "silu")
        first = {launch.name: launch for launch in reversed(_of(partial(experts.experts, x, layer, picked, shares)))}
        for name in ("share_out", "grouped_plain", "grouped_parts"):
            if name in first:
                yield Case(f"{title}, {name}", first[name])


def _stack(num_inputs: int, num_outputs: int) -> ColumnStack:
    one = matrix_of("gptq", [4], num_inputs, num_outputs, is_permuted=True)
    assert one.source is not None
    assert one.scales is not None
    whole = replace(
        one,
        words=_below(one.words),
        source=_below(one.source),
        group_of=_below(one.group_of),
        shares=_below(one.shares.to("meta")),
        scales=_below(one.scales),
    )
    return ColumnStack(whole, EXPERTS)


def _below(tensor: Tensor) -> Tensor:
    return torch.cat([tensor] * EXPERTS)


def _small() -> Iterator[Case]:
    step, table = _step(1)
    x, gates = meta(1, HIDDEN, dtype=torch.bfloat16), meta(1, 2 * MIDDLE, dtype=torch.bfloat16)
    queries = x.view(1, NUM_KV_HEADS * GROUP, HEAD_DIM)
    low_rank = LowRankSlots({0: make_low_rank([(0, torch.zeros(16, HIDDEN), torch.zeros(MIDDLE, 16), 1.0)], x.dtype)})
    rows = AdapterRows(meta(1, dtype=torch.int32), meta(1, dtype=torch.float32), (0,))
    works: tuple[tuple[str, Callable[[], object]], ...] = (
        ("rotated", lambda: ops.rotate(queries, step, table)),
        ("normed", lambda: ops.rms_norm(x, meta(HIDDEN, dtype=torch.float32), 1e-6)),
        ("gated", lambda: ops.gated(gates, "silu")),
        ("low rank", lambda: ops.add_low_rank(meta(1, MIDDLE, dtype=torch.bfloat16), x, low_rank, rows)),
    )
    for title, work in works:
        for launch in _of(work):
            yield Case(f"{title}, {launch.name}", launch)


def _of(work: Callable[[], object]) -> list[Launch]:
    with recorded() as launches:
        work()
    return launches
