"""How a model is split over the ranks of a tensor-parallel engine: by the outputs of its linears, and by nothing else.

Every rank has the whole input of a linear and computes some of its outputs, which are gathered. No sum goes over ranks,
so a number is the sum of the same products in the same order, however many ranks there are, and rows of a weight may be
in any order. Attention is split by heads, a gated MLP by the columns between its two products, experts as such MLPs,
and the two tables with a row for each token by tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from tightrope.backends.errors import BackendError
from tightrope.backends.files.hf_config import ModelShape

Span = tuple[int, int]  # Outputs begin .. end.
Spans = tuple[Span, ...]  # Of one linear, ascending.

# Outputs of one rank begin at a multiple of the first where there are enough: zero points of GPTQ's three bits fill
# whole words there, and EXL2 fills up matrices so. The second is a tile of the kernels.
BORDERS = (32, 16)


@dataclass(frozen=True, slots=True)
class Share:
    """Rank `rank` of `count` ranks."""

    rank: int = 0
    count: int = 1

    def of(self, sizes: Sequence[int]) -> Span:
        """This rank's of as many things as the ranks' sizes are together."""
        begin = sum(sizes[: self.rank])
        return begin, begin + sizes[self.rank]

    def columns(self, total: int) -> Span:
        """This rank's of `total` columns."""
        sizes = columns(total, self.count)
        return (0, total) if sizes is None else self.of(sizes)


ALONE = Share()  # All of a model.


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of one rank: those of queries, and those of keys and values that they attend."""

    queries: Span
    keys: Span

    @property
    def num_queries(self) -> int:
        return self.queries[1] - self.queries[0]

    @property
    def num_keys(self) -> int:
        return self.keys[1] - self.keys[0]


def columns(total: int, count: int) -> tuple[int, ...] | None:
    """How many of `total` outputs each of `count` ranks has; None where they are too few, and each has all."""
    unit = next((unit for unit in BORDERS if total >= unit * count), None)
    if count == 1 or unit is None:
        return None
    sizes = [unit * size for size in _evenly(total // unit, count)]
    return *sizes[:-1], sizes[-1] + total % unit


def heads(num_heads: int, num_kv_heads: int, count: int) -> tuple[Heads, ...]:
    """The heads of each of `count` ranks, in order: whole groups, or shares of one group where ranks are more.

    A rank has all keys that its queries attend; ranks that share a group have the same keys. Raises BackendError
    where there are more ranks than heads of queries.
    """
    if count > num_heads:
        raise BackendError(
            f"--tensor-parallel {count}: attention is split by heads, and a layer has {num_heads}; ask for at most "
            f"{num_heads}"
        )
    group = num_heads // num_kv_heads
    if num_kv_heads >= count:
        keys = _spans(_evenly(num_kv_heads, count))
        return tuple(Heads((begin * group, end * group), (begin, end)) for begin, end in keys)
    found = []
    for key, ranks in enumerate(_evenly(count, num_kv_heads)):
        for begin, end in _spans(_evenly(group, ranks)):
            found.append(Heads((key * group + begin, key * group + end), (key, key + 1)))
    return tuple(found)


def size_of(spans: Spans) -> int:
    """How many outputs there are in them."""
    return sum(end - begin for begin, end in spans)


def joined(spans: Iterable[Span]) -> Spans:
    """The same outputs, with spans that touch as one."""
    found: list[Span] = []
    for begin, end in spans:
        if found and found[-1][1] == begin:
            begin = found.pop()[0]
        found.append((begin, end))
    return tuple(found)


def within(spans: Spans, begin: int, end: int) -> Spans:
    """What of outputs begin .. end is in the spans, counted from `begin`."""
    cut = ((max(first, begin) - begin, min(last, end) - begin) for first, last in spans)
    return tuple((first, last) for first, last in cut if first < last)


def local_shape(shape: ModelShape, share: Share, *, attends_by_heads: bool) -> ModelShape:
    """The sizes of what one rank computes. attends_by_heads: not where attention keeps transformers' own class.

    Hidden states and logits are whole on every rank.
    """
    if share == ALONE:
        return shape
    own = heads(shape.num_heads, shape.num_kv_heads, share.count)[share.rank] if attends_by_heads else None
    middle, of_expert = (size_of((share.columns(total),)) for total in (shape.intermediate_size, shape.expert_size))
    return replace(
        shape,
        num_heads=shape.num_heads if own is None else own.num_queries,
        num_kv_heads=shape.num_kv_heads if own is None else own.num_keys,
        intermediate_size=middle,
        expert_size=of_expert,
    )


def _evenly(total: int, count: int) -> list[int]:
    """`total` things for `count` ranks, the first of which have one more where they can't have as many."""
    return [total // count + (rank < total % count) for rank in range(count)]


def _spans(sizes: Sequence[int]) -> Iterator[Span]:
    return pairwise(accumulate(sizes, initial=0))
