"""How far float32 arithmetic may be from exact: tolerances of property tests, derived from how a result is made.

A bound holds for every example that a test may draw, however long its sums and whatever their order. Sources: Higham,
Accuracy and Stability of Numerical Algorithms, 2nd edition, sections 3.1 and 4.2; Higham and Mary, "A New Approach to
Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41 (2019): roundings are as good as independent, so n of
them add up to LAMBDA sqrt(n) of one, and not to n, but with a chance of 2 exp(-LAMBDA ** 2 / 2).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tightrope.kernels.forms.layout import GROUP, PAGE, AttentionSpec, LayerCache, RopeTable, StepLayout
from tightrope.kernels.reference import dequantize

Store = Callable[..., None]  # It takes a cache, keys, values and slots.

UNIT = 2.0**-24  # of float32: a rounded number is off by at most this share of itself
LAMBDA = 9.0  # a chance of 5e-18 for each sum; ten thousand examples make some 1e9 sums

# as in kernels/cpu: lengths that two sides of a product have as whole numbers, and the largest of those numbers
WORD_LONG, WORD_SHORTER, WORD_MOST = 65500, 32760, 32767
# Of keys: the words that the largest code counts, and more than any word; what is left of 1 when it is turned twice.
KEY_WORDS, KEY_MOST, KEY_TURNED = {"q8": 127 * 64, "q4": 8 * 1024}, 8200, (32752 / 32768) ** 2
# Words that a turned key's number is off by at most: before it is turned 1.25 (its share of the largest scale and of
# the larger factor, and two products), which the turn makes 1.25 sqrt(2); two products more are off by 1, and the
# cosine and sine by 2.5 / 2^15 of KEY_MOST each.
KEY_OFF = 1.25 * math.sqrt(2) + 1 + 2 * 2.5 / 2**15 * KEY_MOST


def check_stored_alike(one: Store, other: Store, like: LayerCache, *step: Tensor) -> None:
    """Fail unless both store the same bits of a step (keys, values, slots) into caches like this one."""
    caches = [LayerCache.allocate(like.format, len(like.key_codes)) for _ in range(2)]
    for store, empty in zip((one, other), caches, strict=True):
        empty.key_factor.copy_(like.key_factor)
        store(empty, *step)
    for name in ("key_codes", "key_scales", "value_codes", "value_scales"):
        assert torch.equal(getattr(caches[0], name), getattr(caches[1], name)), name


def roundings(count: float) -> float:
    """The relative error of a number, or of a sum's terms together, after `count` roundings of float32."""
    return LAMBDA * math.sqrt(count) * UNIT


def within(found: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Fail where a result is further from the exact one than its bound: tells by how much, and where."""
    off = (found.double() - exact).abs() - bound
    assert bool((off <= 0).all()), f"{off.max():.3g} beyond its bound of {bound.flatten()[off.argmax()]:.3g}"


def half_unit(x: Tensor, length: float) -> Tensor:
    """Of rows x [n, K], with `length` for their own length: [n, 1]. The scaled number's own rounding comes on top."""
    unit = torch.maximum(x.norm(dim=1, keepdim=True) / length, x.abs().amax(1, keepdim=True) / WORD_MOST)
    return unit * (0.5 + WORD_MOST * 4 * UNIT)


@dataclass(frozen=True, slots=True)
class Attended:
    """Attention in float64, and how far float32 may be from it: [T, H, D] each."""

    output: Tensor
    bound: Tensor


@dataclass(frozen=True, slots=True)
class CachedHead:
    """What one sequence has cached of one head, in float64: keys rotated, all [tokens, D]; value_steps: one code's.

    Of codes: `of_query` [D] are the factors that a query takes, `key_unit` [tokens] is what a word of a key counts.
    """

    keys: Tensor
    values: Tensor
    value_steps: Tensor
    of_query: Tensor
    key_unit: Tensor


def attend_exactly(
    queries: Tensor, cache: LayerCache, step: StepLayout, table: RopeTable | None, spec: AttentionSpec, *,
    in_words: bool = False,
) -> Attended:  # fmt: skip
    """As kernels.reference.attention, one sequence and head after the other.

    Scores that are off by d at most move the output by at most (exp(2 d) - 1) sum of p |v - output|, where p are the
    softmax's weights and v the values; float32 sums of p v come on top. in_words: of the C++ kernels that multiply
    whole numbers of 16 bits.
    """
    output, bound = torch.zeros(2, *queries.shape, dtype=torch.float64)
    per_key = queries.shape[1] // cache.format.num_kv_heads
    for b, length in enumerate(step.context_lens.tolist()):
        rows = slice(int(step.query_starts[b]), int(step.query_starts[b + 1]))
        if rows.start == rows.stop:
            continue
        distance = step.positions[rows].long().unsqueeze(1) - torch.arange(length)
        is_seen = (distance >= 0) & (distance < (spec.window or length + 1))
        is_seen = is_seen.repeat_interleave(per_key, 0)
        for h in range(cache.format.num_kv_heads):
            head, heads = (
                cached_head(cache, step.block_tables[b], length, h, table, b),
                slice(h * per_key, (h + 1) * per_key),
            )
            flat = queries[rows, heads].double().flatten(0, 1)
            for to, made in zip((output, bound), _softmax(flat, head, is_seen, spec, in_words=in_words), strict=True):
                to[rows, heads] = made.unflatten(0, (-1, per_key))
    return Attended(output, bound)


def _softmax(
    queries: Tensor, head: CachedHead, is_seen: Tensor, spec: AttentionSpec, *, in_words: bool
) -> tuple[Tensor, Tensor]:
    """Output and bound [n, D] of queries [n, D] float64, which see [n, tokens]."""
    keys, values = head.keys, head.values
    # the products of a score, and up to 16 roundings of its numbers: factors, angles of page and place, scales
    lengths = queries.norm(dim=1, keepdim=True) * keys.norm(dim=1) * spec.scale  # [n, tokens]
    off = lengths * roundings(keys.shape[1] + 16)
    if in_words:
        off = off + spec.scale * _off_in_words(queries * head.of_query, keys / head.of_query, head.key_unit)
    scores = queries @ keys.T * spec.scale
    if spec.softcap is not None:  # of a slope of at most 1; the tangent, 1 - 2 / (exp + 1), is off by some roundings
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
        off = off + spec.softcap * 8 * UNIT
    # an exponent is a score less the largest; the exponential is off by 2e-7
    off = off + 8 * UNIT * (scores.abs() + scores.abs().amax(1, keepdim=True)) + 2e-7
    off = off.masked_fill(~is_seen, 0).amax(1, keepdim=True)  # [n, 1]
    p = scores.masked_fill(~is_seen, -torch.inf).softmax(1)
    output = p @ values
    bound = torch.expm1(2 * off) * _most_aside(p, values, output)
    bound = bound + roundings(len(keys) + 16) * (p @ values.abs())
    # of a tile of 128 tokens the largest weight counts 2^23 in the softmax's total
    largest = _largest_near(p.unsqueeze(-1), 128)[..., 0]
    bound = bound + _most_aside(largest, values, output) * 2.0**-24
    if not in_words:
        return output, bound
    # weights times scales count 32767 in the largest of both in the tile, and then multiply codes
    steps = _largest_near(head.value_steps, 128) * largest.unsqueeze(-1)  # [n, tokens, D]
    codes = torch.where(head.value_steps == 0, 0.0, values / head.value_steps).abs()
    return output, bound + (steps * codes).sum(1) / 2 / (WORD_MOST - 1)


def _most_aside(weights: Tensor, values: Tensor, output: Tensor) -> Tensor:
    """No less than sum of w |v - output| [n, D], of weights [n, tokens]: by Jensen's inequality the root of squares."""
    total = weights.sum(1, keepdim=True)
    squares = weights @ values.square() - 2 * output * (weights @ values) + total * output.square()
    return (total * squares.clamp(min=0)).sqrt()


def _off_in_words(queries: Tensor, keys: Tensor, key_unit: Tensor) -> Tensor:
    """Of products [n, tokens] of rows that are whole numbers with one unit each."""
    root = math.sqrt(queries.shape[1])
    off_query = half_unit(queries / KEY_TURNED, 2**31 / (KEY_MOST * root) - root)
    off_key = key_unit / KEY_TURNED * KEY_OFF * (1 + 8 * UNIT)  # [tokens]
    mixed = off_query * keys.abs().sum(1) + queries.abs().sum(1, keepdim=True) * off_key
    return mixed + off_query * off_key * keys.shape[1]


def _largest_near(x: Tensor, size: int) -> Tensor:
    """The largest of x [..., tokens, D] in any stretch of `size` tokens that a token is in."""
    flat = x.transpose(-1, -2).reshape(1, -1, x.shape[-2])
    largest = F.max_pool1d(flat, 2 * size - 1, stride=1, padding=size - 1)
    return largest.view(x.transpose(-1, -2).shape).transpose(-1, -2)


def cached_head(
    cache: LayerCache, pages: Tensor, length: int, head: int, table: RopeTable | None, sequence: int
) -> CachedHead:
    at, dims = pages[: -(-length // PAGE)].long(), cache.format.head_dim
    keys, values = (
        # a code times its scale has at most 19 bits, so float32 holds it exactly
        dequantize(codes[at, head], scales[at, head], cache.format.dtype, dims).flatten(0, 1)[:length].double()
        for codes, scales in ((cache.key_codes, cache.key_scales), (cache.value_codes, cache.value_scales))
    )
    factor, half = cache.key_factor[head].double(), 0 if table is None else table.places.shape[-1]
    keys = keys * factor
    if table is not None:
        keys = rotate_exactly(keys.unsqueeze(1), table, int(table.set_of[sequence]), torch.arange(length))[:, 0]
    if cache.format.dtype == "f16":
        return CachedHead(keys, values, torch.zeros_like(values), torch.ones(dims), torch.zeros(length))
    pairs = torch.cat((factor[half : 2 * half], factor[:half], factor[2 * half :]))
    of_query = torch.maximum(factor, pairs)
    key_steps, value_steps = (
        scales[at, head].double().abs().flatten(0, 1)[:length].repeat_interleave(GROUP, -1)[:, :dims]
        for scales in (cache.key_scales, cache.value_scales)
    )
    most_code = 127 if cache.format.dtype == "q8" else 8
    key_unit = key_steps.amax(1) * most_code / KEY_WORDS[cache.format.dtype]
    return CachedHead(keys, values, value_steps, of_query, key_unit)


def rotate_exactly(x: Tensor, table: RopeTable, number: int, positions: Tensor) -> Tensor:
    """x [n, heads, D] float64 rotated by one set of a table, without its query_scale."""
    half = table.places.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    for angles in (table.pages[number, positions // PAGE], table.places[number, positions % PAGE]):
        cos, sin = angles.double().unsqueeze(1).unbind(2)  # [n, 1, R/2]
        first, second = first * cos - second * sin, second * cos + first * sin
    return torch.cat((first, second, rest), -1)
