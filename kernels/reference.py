"""Every kernel in plain torch: the specification of the others, and what runs where no other can.

Written to be read. Arithmetic is float32 whatever is stored.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tightrope.kernels.forms.layout import GROUP, PAGE, AttentionSpec, LayerCache, RopeTable, StepLayout
from tightrope.kernels.forms.low_rank import AdapterRows, LowRank
from tightrope.kernels.forms.masks import Masks
from tightrope.kernels.forms.quantized import TILE, Nf4Matrix, QuantizedMatrix
from tightrope.kernels.forms.quantized import dequantize as dequantize_matrix
from tightrope.kernels.forms.rows import CUT, DIVIDE, MAX_TRANSFORMS, PARABOLA, SUMS, Ranked

TILE_ROWS = 4096  # So many rows of a weight are expanded to float32 at a time.
TILE_SCORES = 1 << 21  # So many scores of attention, or numbers of keys, are held at a time.


def store_kv(cache: LayerCache, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write keys and values [T, Hkv, D] into the cache's `slots` [T]; a token whose slot is negative is not stored.

    keys are not rotated yet (or already, where the layer caches them so); they are divided by the layer's factor here.
    """
    is_stored = slots >= 0
    keys, values, slots = keys[is_stored], values[is_stored], slots[is_stored]
    for tensor, codes, scales in (
        (keys.float() / cache.key_factor, cache.key_codes, cache.key_scales),
        (values.float(), cache.value_codes, cache.value_scales),
    ):
        page, place = slots // PAGE, slots % PAGE
        if cache.format.dtype == "f16":
            codes[page, :, place] = tensor.to(codes.dtype)  # A test may hold them in float32.
        else:
            new_codes, new_scales = quantize(tensor, cache.format.dtype)
            codes[page, :, place] = new_codes
            scales[page, :, place] = new_scales


def quantize(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Codes and float16 scales of x [..., D] float32, per 32 values.

    q8: scale = largest magnitude / 127. q4: scale = the value of largest magnitude / -8, so that it is code 0 and all
    sixteen codes are of use. Rounded to the nearest even with the scale as stored; a group whose scale is zero in
    float16 has codes of value zero.
    """
    groups = F.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))  # [..., G, 32]
    if dtype == "q8":
        scales = (groups.abs().amax(-1) / 127).half()
    else:
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scales = (largest / -8).half()
    inverse = torch.where(scales == 0, 0.0, 1 / scales.float()).unsqueeze(-1)
    if dtype == "q8":
        return (groups * inverse).round().clamp(-127, 127).to(torch.int8).flatten(-2), scales
    nibbles = ((groups * inverse).round() + 8).clamp(0, 15).to(torch.uint8)
    return (nibbles[..., : GROUP // 2] | nibbles[..., GROUP // 2 :] << 4).flatten(-2), scales


def dequantize(codes: Tensor, scales: Tensor, dtype: str, head_dim: int) -> Tensor:
    """Values [..., D] float32 of codes and scales."""
    if dtype == "f16":
        return codes.float()
    if dtype == "q8":
        groups = codes.unflatten(-1, (-1, GROUP)).float()
    else:
        packed = codes.unflatten(-1, (-1, GROUP // 2))
        groups = torch.cat((packed & 15, packed >> 4), -1).float() - 8
    values: Tensor = (groups * scales.float().unsqueeze(-1)).flatten(-2)
    return values[..., :head_dim]


def rotate(x: Tensor, step: StepLayout, table: RopeTable) -> Tensor:
    """Queries x [T, H, D] float32 rotated to their positions, and scaled by the table's query_scale."""
    sets = table.set_of[step.sequence_of].long()
    scale = table.query_scale[sets].view(-1, 1, 1)
    half = table.places.shape[-1]
    turned = _rotate(x, table, sets, step.positions.long())
    return torch.cat((turned[..., : 2 * half] * scale, turned[..., 2 * half :]), -1)


def _rotate(x: Tensor, table: RopeTable, sets: Tensor, positions: Tensor) -> Tensor:
    """x [n, heads, D] rotated to positions [n]."""
    half = table.places.shape[-1]
    rest = x[..., 2 * half :]
    first, second = x[..., :half], x[..., half : 2 * half]
    for angles in (table.pages[sets, positions // PAGE], table.places[sets, positions % PAGE]):
        cos, sin = angles.unsqueeze(1).unbind(2)  # [n, 1, R/2] each
        first, second = first * cos - second * sin, second * cos + first * sin
    return torch.cat((first, second, rest), -1)


def attention(
    queries: Tensor, cache: LayerCache, step: StepLayout, table: RopeTable | None, spec: AttentionSpec
) -> Tensor:
    """Causal attention of queries [T, H, D] float32 over everything cached of their sequences, this step included.

    Queries are rotated already; cached keys are rotated here when there is a table. Query heads h share the
    key head h // (H / Hkv). Returns [T, H, D] float32.
    """
    outputs = torch.empty_like(queries)
    starts, lengths = step.query_starts.tolist(), step.context_lens.tolist()
    for b, length in enumerate(lengths):
        rows = queries[starts[b] : starts[b + 1]]
        outputs[starts[b] : starts[b + 1]] = _attend(rows, cache, step.block_tables[b], length, table, b, spec)
    return outputs


def attention_bytes(num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """A bound on what `attention` of `num_tokens` takes beside its output; the context's length is no part of it.

    Keys on their way from codes to rotated float32 are up to six tensors of a tile, scores and masks four, and sums of
    values, with what is added and what they were before, four of the queries' size.
    """
    tile = max(TILE_SCORES, PAGE * max(num_tokens * num_heads, num_kv_heads * head_dim))
    return 4 * (10 * tile + 4 * num_tokens * num_heads * (head_dim + 2))


def _attend(
    queries: Tensor,
    cache: LayerCache,
    block_table: Tensor,
    length: int,
    table: RopeTable | None,
    sequence: int,
    spec: AttentionSpec,
) -> Tensor:
    """Attention of the last tokens of one sequence, a tile of keys after another.

    Weights are relative to the largest score so far, and what was summed before is corrected where a larger one comes.
    Source: Milakov and Gimelshein 2018, arXiv 1805.02867.
    """
    n, num_heads, head_dim = queries.shape
    num_kv_heads = cache.format.num_kv_heads
    queries = queries.unflatten(1, (num_kv_heads, -1))  # [n, Hkv, H / Hkv, D]
    largest = queries.new_full(queries.shape[:3], torch.finfo(torch.float32).min).permute(1, 2, 0)  # [Hkv, H / Hkv, n]
    total, mixed = torch.zeros_like(largest), torch.zeros_like(queries).permute(1, 2, 0, 3)
    size = max(1, TILE_SCORES // max(n * num_heads, num_kv_heads * head_dim, 1) // PAGE) * PAGE
    first = 0 if spec.window is None else max(0, length - n - spec.window + 1) // PAGE * PAGE
    for begin in range(first, length, size):
        positions = torch.arange(begin, min(begin + size, length), device=queries.device)
        keys, values = _gather(cache, block_table, begin, begin + len(positions))
        if table is not None:
            keys = _rotate(keys, table, table.set_of[sequence].long().expand(len(positions)), positions)
        scores = torch.einsum("nhgd,khd->hgnk", queries, keys).mul_(spec.scale)
        if spec.softcap is not None:
            scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
        distance = torch.arange(length - n, length, device=queries.device).unsqueeze(1) - positions  # [n, keys]
        is_seen = (distance >= 0) & (distance < (spec.window or length))
        scores.masked_fill_(~is_seen, float("-inf"))
        previous, largest = largest, largest.maximum(scores.amax(-1))
        weights = scores.sub_(largest.unsqueeze(-1)).exp_()
        shrunk = (previous - largest).exp_()
        total = total * shrunk + weights.sum(-1)
        mixed = mixed * shrunk.unsqueeze(-1) + torch.einsum("hgnk,khd->hgnd", weights, values)
    return (mixed / total.unsqueeze(-1)).permute(2, 0, 1, 3).flatten(1, 2)


def _gather(cache: LayerCache, block_table: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Keys (not rotated) and values [end - begin, Hkv, D] float32 of one sequence; `begin` is where a page begins."""
    pages = block_table[begin // PAGE : -(-end // PAGE)].long()
    out = []
    for codes, scales in ((cache.key_codes, cache.key_scales), (cache.value_codes, cache.value_scales)):
        values = dequantize(codes[pages], scales[pages], cache.format.dtype, cache.format.head_dim)
        out.append(values.transpose(1, 2).flatten(0, 1)[: end - begin])
    return out[0] * cache.key_factor, out[1]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K] float32 times weight [N, K] in any float dtype, transposed: [T, N] float32, accumulated in float32."""
    if weight.dtype == torch.float32:
        return F.linear(x, weight, bias)
    out = x.new_empty(len(x), len(weight))
    for row in range(0, len(weight), TILE_ROWS):
        torch.mm(x, weight[row : row + TILE_ROWS].float().t(), out=out[:, row : row + TILE_ROWS])
    return out if bias is None else out.add_(bias)


def quantized_linear(x: Tensor, matrices: Sequence[QuantizedMatrix], bias: Tensor | None) -> Tensor:
    """x [T, K] float32 times each of the matrices, side by side: [T, sum of their N] float32; bias the same width."""
    return _times(x, matrices, bias)


def nf4_linear(x: Tensor, matrices: Sequence[Nf4Matrix], bias: Tensor | None) -> Tensor:
    """As quantized_linear."""
    return _times(x, matrices, bias)


def quantized_rows(matrix: QuantizedMatrix, numbers: Tensor) -> Tensor:
    """What outputs `numbers` [M] int64 multiply each input by, [M, K] float32; each value is rounded once."""
    return dequantize_matrix(matrix.outputs(numbers)).t().contiguous()


def _times(x: Tensor, matrices: Sequence[QuantizedMatrix | Nf4Matrix], bias: Tensor | None) -> Tensor:
    out = x.new_empty(len(x), sum(matrix.num_outputs for matrix in matrices))
    end = 0
    for matrix in matrices:
        for tile in range(0, len(matrix.codes), TILE_ROWS // TILE):
            weight = dequantize_matrix(matrix.tiles(tile, tile + TILE_ROWS // TILE))
            torch.mm(x, weight, out=out[:, end : end + weight.shape[1]])
            end += weight.shape[1]
    return out if bias is None else out.add_(bias)


def add_low_rank(out: Tensor, x: Tensor, adapters: Mapping[int, LowRank], rows: AdapterRows) -> None:
    """Add to out [T, N] what each row's adapter makes of x [T, K].

    `adapters` are by slot; a slot without an entry adds nothing.
    """
    for slot in rows.present:
        if slot not in adapters:
            continue
        chosen = (rows.slots == slot).nonzero()[:, 0]
        mine, scales = x[chosen].float(), rows.scales[chosen].unsqueeze(1)
        for part in adapters[slot].parts:
            added = mine @ part.down.float().T @ part.up.float() * scales
            out[chosen, part.first : part.first + part.up.shape[1]] += added.to(out.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] float32 divided by its root mean square over D, times weight [D] float32 (Gemma's 1 + w added before).

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """gate_up [T, 2 * F] float32 to [T, F]: activation(gate) * up; activation is silu, gelu or gelu_tanh."""
    gate, up = gate_up.chunk(2, -1)
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


# ---- rows of logits ----


def rank(logits: Tensor, rows: NDArray[np.int64], wanted: NDArray[np.int64]) -> Ranked:
    """At least the `wanted` [B] largest logits of these rows [B] of logits [any, V] float32.

    Of equals at the border, here none is listed, and elsewhere the lowest ids: there are as many as wanted, then.
    """
    chosen = logits[torch.from_numpy(rows).to(logits.device)]
    num = int(min(wanted.max() + 1, logits.shape[1]))
    found, ids = (result.cpu().numpy() for result in chosen.topk(num))
    border = found[:, -1:] if num < logits.shape[1] else np.full((len(rows), 1), -np.inf, np.float32)
    values = np.where(found > border, found, np.float32(-np.inf))
    order = np.lexsort((ids, -values), axis=1)
    top = chosen.amax(-1, keepdim=True).cpu().numpy()
    return Ranked(np.take_along_axis(values, order, 1), np.take_along_axis(ids, order, 1), border, top)


def row_sums(logits: Tensor, rows: NDArray[np.int64], transforms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums over the possible tokens of these rows [B] of logits [any, V] float32: [B, 5], in the order of SUMS.

    How many there are, and their exp(y), y exp(y), y and y squared, where y is how far a logit lies below the largest
    one of its row, after the row's transforms [B, MAX_TRANSFORMS, 4], which are (kind, a, b, c): y / a; the parabola
    a y y (y (b - 1) / 2 - (3 - b) / 2) - c; or -inf where y is less than a; kind 0 is none. None lifts a y above 0.
    NaN where nothing can be drawn.
    """
    chosen = logits[torch.from_numpy(rows).to(logits.device)]
    y = chosen - chosen.amax(-1, keepdim=True)
    for place in range(MAX_TRANSFORMS):
        kinds, a, b, c = torch.from_numpy(transforms[:, place].astype(np.float32)).to(y.device).unsqueeze(-1).unbind(1)
        if not kinds.any():
            break
        parabola = torch.where(y > -torch.inf, a * y * y * (y * (b - 1) / 2 - (3 - b) / 2) - c, y)
        y = torch.where(kinds == DIVIDE, y / torch.where(kinds == DIVIDE, a, 1), y)
        y = torch.where(kinds == PARABOLA, parabola, y)
        y = torch.where((kinds == CUT) & (y < a), -torch.inf, y)
    is_possible = y > -torch.inf
    weights, finite = y.exp(), torch.where(is_possible, y, 0.0)
    sums = torch.stack(
        [column.sum(-1, dtype=torch.float64) for column in (is_possible, weights, finite * weights, finite, finite**2)]
    )
    return np.where(chosen.amax(-1, keepdim=True).isfinite().cpu().numpy(), sums.T.cpu().numpy(), np.nan)


def row_mass(logits: Tensor, rows: NDArray[np.int64], transforms: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of exp(y) alone: [B, 1]."""
    return row_sums(logits, rows, transforms)[:, [SUMS.index("mass")]]


def search_file(file: int, start: int, num_bytes: int, masks: Masks, buffer: NDArray[np.uint8]) -> int | None:
    """Where the first such word of a part of a file starts, in bytes from byte `start`, where a block begins.

    file: its descriptor. num_bytes: of whole blocks. buffer [ROOM]: overwritten. Raises OSError, and EOFError when the
    file ends within the part.
    """
    block = masks.block
    step = buffer.nbytes // block.nbytes * block.nbytes
    repeated = np.resize(block, step // block.itemsize)
    for begin in range(0, num_bytes, step):
        piece = buffer[: min(step, num_bytes - begin)]
        if os.preadv(file, [piece.data], start + begin) != len(piece):
            raise EOFError
        words = piece.view(block.dtype)
        hits = (words & repeated[: len(words)]) == masks.all_set
        if hits.any():
            return begin + int(hits.argmax()) * block.itemsize
    return None
