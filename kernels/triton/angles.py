"""Rotary angles inside attention kernels: of a tile's first page, and of tokens counted from there.

A tile begins at the first place of a page, so a token's angle is that page's angle plus one that every tile shares.
`pairs` [1, N] int32 say which of a set's HALF angles; those past the last have cosine and sine zero.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from tightrope.kernels.forms.layout import PAGE

_PAGE = constexpr(PAGE)


@triton.jit
def page_angle(pages: tl.tensor, page: tl.tensor, pairs: tl.tensor, HALF: constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Cosine and sine [1, N] float32 of one page."""
    at = pages + page * (2 * HALF) + pairs
    return tl.load(at, mask=pairs < HALF, other=0.0), tl.load(at + HALF, mask=pairs < HALF, other=0.0)


@triton.jit
def tile_angles(
    pages: tl.tensor, places: tl.tensor, num_pages: tl.tensor, pairs: tl.tensor, TOKENS: constexpr, HALF: constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Cosines and sines [TOKENS, N] float32 of tokens 0 .. TOKENS, from one set's `pages` and `places`."""
    token = tl.arange(0, TOKENS)[:, None]
    mask = (pairs < HALF) & (token // _PAGE < num_pages)
    page = pages + token // _PAGE * (2 * HALF) + pairs
    place = places + token % _PAGE * (2 * HALF) + pairs
    page_cos, page_sin = tl.load(page, mask=mask, other=0.0), tl.load(page + HALF, mask=mask, other=0.0)
    place_cos, place_sin = tl.load(place, mask=mask, other=0.0), tl.load(place + HALF, mask=mask, other=0.0)
    cos, sin = turn(page_cos, page_sin, place_cos, place_sin)
    return cos, sin


@triton.jit
def turn(first: tl.tensor, second: tl.tensor, cos: tl.tensor, sin: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(first, second) turned by an angle; an angle's own cosine and sine are turned to the sum of two angles."""
    return first * cos - second * sin, second * cos + first * sin
