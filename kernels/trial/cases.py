"""Each kind of kernel on small random numbers: what it makes of them, and what the reference does."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tightrope.kernels import dispatch, reference
from tightrope.kernels.forms.column_stack import stack_columns
from tightrope.kernels.forms.columns import to_columns
from tightrope.kernels.forms.layer import (
    DecoderLayer,
    GatedExperts,
    LayerStack,
    LayerStep,
    Norm,
    Projection,
    StackedExperts,
)
from tightrope.kernels.forms.layout import PAGE, AttentionSpec, CacheDtype, CacheFormat
from tightrope.kernels.forms.low_rank import AdapterRows, make_low_rank
from tightrope.kernels.forms.masks import ROOM, Masks
from tightrope.kernels.forms.quantized import TILE, Nf4Matrix, QuantizedMatrix, arrange, dequantize
from tightrope.kernels.forms.rows import DIVIDE, MAX_TRANSFORMS
from tightrope.kernels.trial.samples import Packed, Samples, angles, step_of

HEADS, KV_HEADS, DIMS = 4, 2, 64
DECODE, PREFILL = ((1, 40), (1, 17)), ((20, 50), (1, 3))  # (tokens of the step, tokens cached with them) of sequences
EXPERTS, HIDDEN, MIDDLE = 4, 64, 64

Found = tuple[Tensor, Tensor] | None  # What a kernel found and the reference; None where a device has no such kernel.
Case = Callable[[Samples], Found]


def cases(*, on_card: bool) -> Iterator[tuple[str, Case]]:
    """The kinds of kernels that a device runs, by name."""
    yield "gated activation", gated
    yield "norm", _norm
    yield "rotation", _rotation
    for dtype in ("f16", "q8", "q4"):
        for name, lengths in (("decode", DECODE), ("prefill", PREFILL)):
            yield f"attention, {name}, {dtype} cache", partial(_attention, dtype, lengths, None)
    yield "attention in a window, prefill, q8 cache", partial(_attention, "q8", PREFILL, 16)
    yield "moved tokens, q8 cache", partial(_copies, "q8")
    yield "plain product", _plain
    for format, matrix in (("EXL2", _exl2), ("GPTQ and AWQ", _gptq), ("nf4", _nf4)):
        for name, num_rows in (("one row", 1), ("8 rows", 8), ("80 rows", 80)):
            yield f"{format} product, {name}", partial(_column_product if on_card else _product, matrix, num_rows)
    if on_card:
        yield "exllamav2's EXL2 product", _exllama_product
    yield "low-rank addition", _low_rank
    yield "plain experts", partial(_experts, False, on_card)
    yield "quantized experts", partial(_experts, True, on_card)
    if not on_card:
        yield "whole layer", _layer
        yield "largest logits", _rank
        yield "sums of logits", partial(_row_sums, "row_sums")
        yield "mass of logits", partial(_row_sums, "row_mass")
        yield "draw", _draw
        yield "search for numbers that are not finite", _search
        yield "single rows of a quantized table", _rows
        yield "GGUF blocks", _blocks


def gated(samples: Samples) -> Found:
    """The smallest kernel, and one that all models have."""
    x = samples.normal(3, 2 * 96)
    return dispatch.gated(x, "silu"), reference.gated(_exact(x), "silu")


def _exact(x: Tensor) -> Tensor:
    return x.cpu().float()


def _norm(samples: Samples) -> Found:
    x, weight = samples.normal(3, 96), samples.uniform(96)
    found = dispatch.rms_norm(x, weight.to(samples.device), 1e-5)
    return found, reference.rms_norm(_exact(x), weight, 1e-5)


def _rotation(samples: Samples) -> Found:
    x, step = samples.normal(21, HEADS, DIMS), step_of(PREFILL)
    found = dispatch.rotate(x, step.to(samples.device), angles(4, DIMS // 2, 2, samples.device))
    return found, reference.rotate(_exact(x), step, angles(4, DIMS // 2, 2))


def _attention(dtype: CacheDtype, lengths: Sequence[tuple[int, int]], window: int | None, samples: Samples) -> Found:
    """Storing the whole contexts, and attention of the step's queries over them."""
    whole = step_of([(length, length) for _, length in lengths])
    step = step_of(lengths)
    mine, plain = samples.cache(CacheFormat(dtype, KV_HEADS, DIMS), whole.block_tables.numel())
    keys, values = (samples.normal(len(whole.slots), KV_HEADS, DIMS) for _ in range(2))
    dispatch.store_kv(mine, keys, values, whole.slots.to(samples.device))
    reference.store_kv(plain, _exact(keys), _exact(values), whole.slots)
    queries, spec = samples.normal(len(step.slots), HEADS, DIMS), AttentionSpec(DIMS**-0.5, window)
    half, pages, seqs = DIMS // 2, whole.block_tables.shape[1], len(lengths)
    table = angles(pages, half, seqs, samples.device)
    found = dispatch.attention(queries, mine, step.to(samples.device), table, spec)
    return found, reference.attention(_exact(queries), plain, step, angles(pages, half, seqs), spec)


def _copies(dtype: CacheDtype, samples: Samples) -> Found:
    """A page's tokens that are copied to places elsewhere, in another page."""
    mine, plain = samples.cache(CacheFormat(dtype, KV_HEADS, DIMS), 2)
    slots, sources = torch.arange(2 * PAGE), torch.arange(PAGE)
    keys, values = (samples.normal(2 * PAGE, KV_HEADS, DIMS) for _ in range(2))
    dispatch.store_kv(mine, keys, values, slots.to(samples.device))
    reference.store_kv(plain, _exact(keys), _exact(values), slots)
    targets = sources.flip(0) + PAGE
    dispatch.copy_slots(mine, sources.to(samples.device), targets.to(samples.device))
    plain.copy_slots(sources, targets)
    return mine.value_codes.float(), plain.value_codes.float()


def _plain(samples: Samples) -> Found:
    x, weight = samples.normal(5, 96), samples.normal(48, 96).half()
    return dispatch.linear(x, weight, None), reference.linear(_exact(x), weight.cpu(), None)


def _exl2(samples: Samples) -> Packed:
    return samples.exl2(80)


def _gptq(samples: Samples) -> Packed:
    return samples.gptq(256, 80)


def _nf4(samples: Samples) -> Packed:
    return samples.nf4(256, 80)


def _product(make: Callable[[Samples], Packed], num_rows: int, samples: Samples) -> Found:
    matrix = make(samples)
    x = samples.normal(num_rows, matrix.num_inputs)
    if isinstance(matrix, Nf4Matrix):
        return dispatch.nf4_linear(x, [matrix], None), x @ dequantize(matrix)
    return dispatch.quantized_linear(x, [matrix], None), x @ dequantize(matrix)


def _column_product(make: Callable[[Samples], Packed], num_rows: int, samples: Samples) -> Found:
    matrix = make(samples)
    x = samples.normal(num_rows, matrix.num_inputs)
    return dispatch.column_linear(x, [to_columns(matrix, samples.device)], None), _exact(x) @ dequantize(matrix)


def _exllama_product(samples: Samples) -> Found:
    matrix = samples.exl2(96)
    if not dispatch.is_exllama(matrix):
        return None
    x = samples.normal(1, matrix.num_inputs)
    return dispatch.exllama_linear(x, [dispatch.to_exllama(matrix, samples.device)], None), _exact(x) @ dequantize(
        matrix
    )


def _low_rank(samples: Samples) -> Found:
    down, up, x = samples.plain(4, 96) / 10, samples.plain(48, 4), samples.normal(5, 96)
    added = make_low_rank([(0, down, up, 0.5)], torch.float16)
    slots = torch.tensor([0, -1, 0, 0, -1], dtype=torch.int32)
    rows = AdapterRows(slots, samples.uniform(5) + 0.5, (0,))
    found, wanted = torch.zeros(5, 48, device=samples.device, dtype=samples.dtype), torch.zeros(5, 48)
    dispatch.add_low_rank(found, x, {0: added.to(samples.device)}, rows.to(samples.device))
    reference.add_low_rank(wanted, _exact(x), {0: added}, rows)
    return found, wanted


def _experts(is_quantized: bool, on_card: bool, samples: Samples) -> Found:
    """Each token's share of what two experts make of it."""
    x, shares = samples.normal(5, HIDDEN), samples.uniform(5, 2)
    picked = torch.stack([torch.randperm(EXPERTS, generator=samples.generator)[:2] for _ in range(5)])
    gates, ups, downs = ([samples.gptq(HIDDEN, MIDDLE) for _ in range(EXPERTS)] for _ in range(3))
    gate_up = [torch.cat((dequantize(g), dequantize(u)), 1).t().contiguous() for g, u in zip(gates, ups, strict=True)]
    down = [dequantize(matrix).t().contiguous() for matrix in downs]
    layer: GatedExperts | StackedExperts
    if on_card:
        layer = _stacked(samples, gates, ups, downs) if is_quantized else _stacked_plain(samples, gate_up, down)
    else:
        pairs = zip(gates, ups, strict=True)
        layer = GatedExperts(
            tuple(Projection(pair, None) for pair in pairs) if is_quantized else _projections(gate_up),
            tuple(Projection((matrix,), None) for matrix in downs) if is_quantized else _projections(down),
            "silu",
        )
    found = dispatch.experts(x, layer, picked.to(samples.device), shares.to(samples.device), None)
    wanted = torch.zeros(5, HIDDEN)
    for token, row in enumerate(_exact(x)):
        for expert, share in zip(picked[token].tolist(), shares[token].tolist(), strict=True):
            wanted[token] += share * (reference.gated(gate_up[expert] @ row, "silu") @ down[expert].t())
    return None if found is None else (found, wanted)


def _projections(weights: Sequence[Tensor]) -> tuple[Projection, ...]:
    return tuple(Projection(weight, None) for weight in weights)


def _stacked_plain(samples: Samples, gate_up: Sequence[Tensor], down: Sequence[Tensor]) -> StackedExperts:
    first, second = (torch.stack(list(weights)).to(samples.device, samples.dtype) for weights in (gate_up, down))
    return StackedExperts(first, second, "silu")


def _stacked(samples: Samples, *found: Sequence[QuantizedMatrix]) -> StackedExperts:
    stacks = []
    for matrices in found:
        made = stack_columns([to_columns(matrix, samples.device) for matrix in matrices])
        assert made is not None
        stacks.append(made[0])
    return StackedExperts((stacks[0], stacks[1]), (stacks[2],), "silu")


def _layer(samples: Samples) -> Found:
    """What most steps of a model on a CPU are: all of a layer in one call."""
    width, step = KV_HEADS * DIMS, step_of(DECODE)
    norm, spec = Norm(samples.uniform(HIDDEN) + 0.5, 1e-5), AttentionSpec(DIMS**-0.5)
    qkv = samples.plain(HEADS * DIMS + 2 * width, HIDDEN) / 8
    out = samples.plain(HIDDEN, HEADS * DIMS) / 16
    gate_up, down = samples.gptq(HIDDEN, 2 * MIDDLE), samples.gptq(MIDDLE, HIDDEN)
    layer = DecoderLayer(
        qkv=Projection(qkv, None),
        out=Projection(out, None),
        gate_up=Projection((gate_up,), None),
        down=Projection((down,), None),
        norms=(norm, None, norm, None),
        head_norms=(None, None),
        num_heads=HEADS,
        activation="silu",
        attention=spec,
    )
    mine, plain = samples.cache(CacheFormat("q8", KV_HEADS, DIMS), step.block_tables.numel())
    x, table = samples.plain(2, HIDDEN), angles(step.block_tables.shape[1], DIMS // 2, 2)
    stack = LayerStack((layer,), (mine,), (0,))
    found = dispatch.decoder_layers(x, stack, [LayerStep(step, table)], None)
    if found is None:
        return None
    heads = reference.linear(reference.rms_norm(x, norm.weight, norm.eps), qkv, None).view(2, -1, DIMS)
    queries, keys, values = heads.split((HEADS, KV_HEADS, KV_HEADS), 1)
    reference.store_kv(plain, keys, values, step.slots)
    attended = reference.attention(reference.rotate(queries, step, table), plain, step, table, spec)
    middle = x + reference.linear(attended.flatten(1), out, None)
    gates = reference.gated(reference.rms_norm(middle, norm.weight, norm.eps) @ dequantize(gate_up), "silu")
    return found, middle + gates @ dequantize(down)


def _rank(samples: Samples) -> Found:
    logits, rows, wanted = samples.plain(3, 5000), np.array([0, 2]), np.array([10, 10])
    found, plain = dispatch.rank(logits, rows, wanted), reference.rank(logits, rows, wanted)
    return torch.from_numpy(found.logits[:, :10]), torch.from_numpy(plain.logits[:, :10])


def _row_sums(name: Literal["row_sums", "row_mass"], samples: Samples) -> Found:
    logits, rows, transforms = samples.plain(3, 5000), np.array([0, 2]), np.zeros((2, MAX_TRANSFORMS, 4))
    transforms[:, 0] = (DIVIDE, 0.7, 0.0, 0.0)
    found, plain = (getattr(kernels, name)(logits, rows, transforms) for kernels in (dispatch, reference))
    return torch.from_numpy(found), torch.from_numpy(plain)


def _draw(samples: Samples) -> Found:
    """Of the likeliest token alone."""
    logits, params = samples.plain(3, 5000), np.zeros((3, 5 + 4 * MAX_TRANSFORMS))
    params[:, :5] = (0.5, 1, 0.0, 1.0, 1.0)
    drawn = dispatch.draw(logits, np.arange(3), params)
    return None if drawn is None else (torch.from_numpy(drawn), logits.argmax(1))


def _search(samples: Samples) -> Found:
    """Of float16 numbers, one of which is not finite."""
    numbers = samples.plain(4096).half()
    numbers[3000] = torch.inf
    with tempfile.TemporaryFile() as file:
        file.write(numbers.numpy().tobytes())
        file.flush()
        masks = Masks.of(np.array([0x7C00], np.uint16), 0x7C00)
        found = dispatch.search_file(file.fileno(), 0, numbers.nbytes, masks, np.empty(ROOM, np.uint8))
    return torch.tensor([-1 if found is None else found]), torch.tensor([3000 * numbers.element_size()])


def _rows(samples: Samples) -> Found:
    matrix, numbers = samples.exl2(80), torch.tensor([79, 0, 17])
    return dispatch.quantized_rows(matrix, numbers), dequantize(matrix).t()[numbers]


def _blocks(samples: Samples) -> Found:
    """Of GGUF's Q8_0: a float16 scale, and 32 signed bytes."""
    scales, codes = samples.uniform(80, 2).half(), samples.codes(256, 80, 2, 32)
    raw = torch.cat((scales.unsqueeze(2).view(torch.uint8), codes), 2).flatten(1)
    rows = arrange(torch.arange(64), [32, 32], [8, 8])
    matrix = QuantizedMatrix(
        64,
        80,
        None,
        rows.group_starts,
        rows.group_bits,
        torch.empty(80 // TILE, 64 * TILE, dtype=torch.uint8),
        scales=torch.empty(80 // TILE, 2, TILE, dtype=torch.float16),
    )
    if not dispatch.pack_blocks(8, raw, matrix):
        return None
    return dequantize(matrix), (scales.float().unsqueeze(2) * codes.view(torch.int8)).flatten(1).t()
