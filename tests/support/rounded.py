"""Numbers with the scale of their rounding errors, carried through the operations of a layer.

`off` of a number is the root of the summed squares of the independent errors in it, each as large as it can be. Such a
sum is beyond LAMBDA times that with a chance of 2 exp(-LAMBDA ** 2 / 2). Source: Hoeffding, "Probability Inequalities
for Sums of Bounded Random Variables", J. Amer. Statist. Assoc. 58 (1963), theorem 2.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from error_bounds import LAMBDA, UNIT, WORD_LONG, WORD_SHORTER, cached_head, half_unit, rotate_exactly, within
from torch import Tensor

from tightrope.kernels import reference
from tightrope.kernels.forms.layer import Norm, Projection
from tightrope.kernels.forms.layout import PAGE, AttentionSpec, LayerCache, RopeTable, StepLayout
from tightrope.kernels.forms.low_rank import AdapterRows, LowRank
from tightrope.kernels.forms.quantized import Nf4Matrix, QuantizedMatrix, dequantize

FIXED_SHARED, FIXED_LARGEST = 128, 32512  # as in kernels/cpu/quantized_input.h
WORDS_SHARED, FEW_ROWS = 64, 64  # as in kernels/cpu/linear_words.h: so many rows run in floats


@dataclass(frozen=True, slots=True)
class Rounded:
    """value and off, of one shape, float64."""

    value: Tensor
    off: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> "Rounded":
        return cls(value.double(), torch.zeros_like(value, dtype=torch.float64))

    def again(self, size: Tensor, count: float) -> "Rounded":
        """After `count` more roundings of numbers as large as `size`."""
        return Rounded(self.value, self.off.hypot(math.sqrt(count) * UNIT * size))

    def __add__(self, other: "Rounded") -> "Rounded":
        value = self.value + other.value
        return Rounded(value, self.off.hypot(other.off)).again(value.abs(), 1)

    def __getitem__(self, at: object) -> "Rounded":
        return Rounded(self.value[at], self.off[at])  # type: ignore[index]  # whatever tensors take

    def check(self, found: Tensor) -> None:
        """Fail where a result isn't what this may have become."""
        within(found, self.value, LAMBDA * self.off)


def norm(x: Rounded, norm: Norm | None) -> Rounded:
    """The root mean square moves with all errors of a row together."""
    if norm is None:
        return x
    weight, width = norm.weight.double(), x.value.shape[-1]
    square = x.value.square().mean(-1, keepdim=True) + norm.eps
    value = x.value * weight * square.rsqrt()
    of_root = (x.value * x.off).square().sum(-1, keepdim=True).sqrt() / (width * square)
    off = (weight.abs() * square.rsqrt() * x.off).hypot(value * of_root)
    return Rounded(value, off).again(value.abs(), width + 8)


def project(projection: Projection, x: Rounded, rows: AdapterRows | None, *, in_words: bool = False) -> Rounded:
    """in_words: many rows by bfloat16 run as whole numbers of 16 bits."""
    weight = projection.weight
    if isinstance(weight, Tensor):
        of_words = in_words and weight.dtype == torch.bfloat16 and len(x.value) > FEW_ROWS
        out = times(x, weight.double().T, _words(x.value, weight) if of_words else None)
    else:
        parts = [times(x, dequantize(m).double(), _fixed(x.value, m)) for m in weight]
        out = Rounded(torch.cat([p.value for p in parts], 1), torch.cat([p.off for p in parts], 1))
    if projection.bias is not None:
        out = out + Rounded.exact(projection.bias.expand_as(out.value))
    return out if rows is None else low_rank(out, x, projection.adapters, rows)


def times(x: Rounded, weight: Tensor, extra: Tensor | None = None) -> Rounded:
    """Times weight [K, N] float64; `extra` [T, N]: the scale of errors beside those of float32."""
    out = Rounded(x.value @ weight, (x.off.square() @ weight.square()).sqrt())
    # a dequantized weight has a rounding of its own, and each output's units and scales a few
    out = out.again(x.value.abs() @ weight.abs(), len(weight) + 6)
    return out if extra is None else Rounded(out.value, out.off.hypot(extra))


def _words(x: Tensor, weight: Tensor) -> Tensor:
    total = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for mine, theirs in zip(x.split(WORDS_SHARED, 1), weight.double().split(WORDS_SHARED, 1), strict=True):
        off_x, off_weight = half_unit(mine, WORD_LONG), 2 * half_unit(theirs, WORD_SHORTER)
        total += off_x.square() * theirs.square().sum(1) + mine.square().sum(1, keepdim=True) * off_weight.square().T
    return total.sqrt()


def _fixed(x: Tensor, matrix: QuantizedMatrix | Nf4Matrix) -> Tensor | None:
    """Of x in fixed point: half a unit, FIXED_LARGEST of which are the largest of up to 128 numbers of a group."""
    if isinstance(matrix, Nf4Matrix):
        return None
    weight, starts = dequantize(matrix).double(), matrix.group_starts.tolist()
    source = torch.arange(starts[-1]) if matrix.source is None else matrix.source.long()
    total = torch.zeros(len(x), matrix.num_outputs, dtype=torch.float64)
    for begin, end in itertools.pairwise(starts):
        for some in source[begin:end].split(FIXED_SHARED):
            columns = some[some >= 0]
            if len(columns):
                half = x[:, columns].abs().amax(1, keepdim=True) / FIXED_LARGEST * (0.5 + FIXED_LARGEST * 4 * UNIT)
                total += half.square() * weight[columns].square().sum(0)
    return total.sqrt()


def low_rank(out: Rounded, x: Rounded, adapters: "dict[int, LowRank]", rows: AdapterRows) -> Rounded:
    """What reference.add_low_rank adds."""
    value, square = out.value.clone(), out.off.square()
    for slot in rows.present:
        if slot not in adapters:
            continue
        chosen = (rows.slots == slot).nonzero()[:, 0]
        scales = rows.scales[chosen].double().unsqueeze(1)
        for part in adapters[slot].parts:
            columns = slice(part.first, part.first + part.up.shape[1])
            added = times(times(x[chosen], part.down.double().T), part.up.double())
            value[chosen, columns] += added.value * scales
            size = value[chosen, columns].abs() + (added.value * scales).abs()
            square[chosen, columns] += (added.off * scales).square() + 4 * (UNIT * size).square()
    return Rounded(value, square.sqrt())


def gated(gate_up: Rounded, activation: str) -> Rounded:
    """No activation's slope is above 1.13; its own error is a dozen roundings of its argument."""
    gate, up = (Rounded(v, o) for v, o in zip(gate_up.value.chunk(2, -1), gate_up.off.chunk(2, -1), strict=True))
    value = reference.gated(gate_up.value, activation)
    of_up = reference.gated(torch.cat((gate.value, torch.ones_like(up.value)), -1), activation) * up.off
    off = (1.13 * gate.off * up.value.abs()).hypot(of_up)
    return Rounded(value, off).again((gate.value * up.value).abs(), 12**2)


def rotate(x: Rounded, step: StepLayout, table: RopeTable) -> Rounded:
    """Queries [T, H, D]."""
    value, off, half = x.value.clone(), x.off.clone(), table.places.shape[-1]
    for t, (b, position) in enumerate(zip(step.sequence_of.tolist(), step.positions.tolist(), strict=True)):
        number, at = int(table.set_of[b]), torch.tensor([position])
        scale = table.query_scale[number].double()
        value[t] = rotate_exactly(x.value[t : t + 1], table, number, at)[0]
        pairs = (slice(half), slice(half, 2 * half))
        # whatever the angle, an error is at most as long as those of the pair together
        longest = x.off[t][:, pairs[0]].hypot(x.off[t][:, pairs[1]])
        size = value[t][:, pairs[0]].hypot(value[t][:, pairs[1]])
        for pair in pairs:
            value[t][:, pair] *= scale
            off[t][:, pair] = longest.hypot(8 * UNIT * size) * scale
    return Rounded(value, off)


def attend(
    queries: Rounded, cache: LayerCache, step: StepLayout, table: RopeTable | None, spec: AttentionSpec
) -> Rounded:
    """Over a cache of float16 as it is: [T, H, D].

    To first order, scores that are off by e move the output by the sum of p e (v - output). A query's error moves all
    its scores together, by its products with the keys; each score has roundings of its own beside.
    """
    made = Rounded.exact(torch.zeros_like(queries.value))
    per_key = queries.value.shape[1] // cache.format.num_kv_heads
    for b, length in enumerate(step.context_lens.tolist()):
        rows = slice(int(step.query_starts[b]), int(step.query_starts[b + 1]))
        distance = step.positions[rows].long().unsqueeze(1) - torch.arange(length)
        is_seen = (distance >= 0) & (distance < (spec.window or length + 1))
        for h in range(queries.value.shape[1]):
            head = cached_head(cache, step.block_tables[b], length, h // per_key, table, b)
            out = _attend(queries[rows, h], head.keys, head.values, is_seen, spec)
            made.value[rows, h], made.off[rows, h] = out.value, out.off
    return made


def _attend(queries: Rounded, keys: Tensor, values: Tensor, is_seen: Tensor, spec: AttentionSpec) -> Rounded:
    scores = queries.value @ keys.T * spec.scale  # [n, tokens]
    lengths = queries.value.norm(dim=1, keepdim=True) * keys.norm(dim=1) * spec.scale
    own = math.sqrt(keys.shape[1] + 16) * UNIT * lengths
    slope = torch.ones_like(scores)
    if spec.softcap is not None:
        capped = torch.tanh(scores / spec.softcap)
        scores, slope = spec.softcap * capped, 1 - capped.square()
        own = own.hypot(torch.tensor(8 * UNIT * spec.softcap))
    own = own.hypot(8 * UNIT * (scores.abs() + scores.abs().amax(1, keepdim=True))) + 2e-7
    p = scores.masked_fill(~is_seen, -torch.inf).softmax(1)
    output = p @ values
    moved = p.unsqueeze(-1) * (values - output.unsqueeze(1))  # [n, tokens, D]: for an error of 1 in a score
    together = torch.einsum("nk,kc,nkd->ncd", slope * spec.scale, keys, moved)
    of_queries = torch.einsum("nc,ncd->nd", queries.off.square(), together.square())
    off = (of_queries + (own.unsqueeze(-1) * moved).square().sum(1)).sqrt()
    return Rounded(output, off).again(p @ values.abs(), len(keys) + 16)


def check_stored(found: Tensor, slots: Tensor, expected: Rounded) -> None:
    """Codes of float16 [P, Hkv, PAGE, D] at these slots [T]: rounded once more, to 11 bits, or as subnormals."""
    stored = found[slots // PAGE, :, slots % PAGE]
    bound = LAMBDA * expected.off
    within(stored, expected.value, bound + 2.0**-11 * (expected.value.abs() + bound) + 2.0**-25)
