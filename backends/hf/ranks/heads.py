"""What all ranks keep of a page, as one rank would: the KV heads of each, in the order of the model's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Span = tuple[int, int]  # The first head, and how many.


@dataclass(frozen=True, slots=True)
class LayerHeads:
    """A layer's KV heads, and which of them each rank keeps; several may keep the same ones.

    head_bytes: of one head in a page, for each tensor that stores something of it.
    """

    total: int
    kept: tuple[Span, ...]
    head_bytes: tuple[int, ...]


def joined(layers: Sequence[LayerHeads], counts: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
    """What ranks have read of `counts` pages in each layer, uint8 each, as one rank would have read it."""
    whole = torch.empty(sum(_sizes(layers, counts)), dtype=torch.uint8)
    for block, pieces in _blocks(layers, counts, whole, parts):
        for (first, count), piece in pieces:
            block[:, first : first + count] = piece
    return whole


def split(layers: Sequence[LayerHeads], counts: Sequence[int], whole: Tensor) -> list[Tensor]:
    """The reverse: what each rank is to write, uint8."""
    num_ranks = len(layers[0].kept)
    parts = [torch.empty(sum(_sizes(layers, counts, rank)), dtype=torch.uint8) for rank in range(num_ranks)]
    for block, pieces in _blocks(layers, counts, whole, parts):
        for (first, count), piece in pieces:
            piece[:] = block[:, first : first + count]
    return parts


def _sizes(layers: Sequence[LayerHeads], counts: Sequence[int], rank: int | None = None) -> list[int]:
    """Bytes of each stored tensor, in order: a rank's, or those of all heads."""
    heads = [layer.total if rank is None else layer.kept[rank][1] for layer in layers]
    return [
        count * num_heads * size
        for layer, count, num_heads in zip(layers, counts, heads, strict=True)
        for size in layer.head_bytes
    ]


def _blocks(
    layers: Sequence[LayerHeads], counts: Sequence[int], whole: Tensor, parts: Sequence[Tensor]
) -> Iterator[tuple[Tensor, list[tuple[Span, Tensor]]]]:
    """Each stored tensor [pages, heads, bytes]: that of all heads, and each rank's with the heads that it has."""
    places = _places(_sizes(layers, counts), whole)
    of_ranks = [_places(_sizes(layers, counts, rank), part) for rank, part in enumerate(parts)]
    for layer, count in zip(layers, counts, strict=True):
        for size in layer.head_bytes:
            block, pieces = next(places), [next(part) for part in of_ranks]
            if len(block):
                yield (
                    block.view(count, layer.total, size),
                    [(kept, piece.view(count, kept[1], size)) for kept, piece in zip(layer.kept, pieces, strict=True)],
                )


def _places(sizes: Sequence[int], memory: Tensor) -> Iterator[Tensor]:
    ends = accumulate(sizes, initial=0)
    assert sum(sizes) == len(memory), "pages of another cache"
    return (memory[begin:end] for begin, end in pairwise(ends))
