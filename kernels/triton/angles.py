"""Rotary angles inside attention kernels: of a tile's first page, and of tokens counted from there.

A tile begins at the first place of a page, so a token's angle is that page's angle plus one that every tile shares.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from tightrope.kernels.layout import PAGE

_PAGE: constexpr = PAGE


@triton.jit
def tile_offsets(
    pages: tl.tensor, places: tl.tensor, num_pages: tl.tensor, TOKENS: constexpr, HALF: constexpr, PADDED: constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Cosines and sines [TOKENS, PADDED] float32 of tokens 0 .. TOKENS, from one set's `pages` and `places`."""
    token = tl.arange(0, TOKENS)[:, None]
    pair = tl.arange(0, PADDED)[None, :]
    mask = (pair < HALF) & (token // _PAGE < num_pages)
    page = pages + token // _PAGE * (2 * HALF) + pair
    place = places + token % _PAGE * (2 * HALF) + pair
    page_cos, page_sin = tl.load(page, mask=mask, other=0.0), tl.load(page + HALF, mask=mask, other=0.0)
    place_cos, place_sin = tl.load(place, mask=mask, other=0.0), tl.load(place + HALF, mask=mask, other=0.0)
    return page_cos * place_cos - page_sin * place_sin, page_sin * place_cos + page_cos * place_sin


@triton.jit
def page_angle(pages: tl.tensor, page: tl.tensor, HALF: constexpr, PADDED: constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Cosine and sine [1, PADDED] float32 of one page."""
    pair = tl.arange(0, PADDED)[None, :]
    at = pages + page * (2 * HALF) + pair
    return tl.load(at, mask=pair < HALF, other=0.0), tl.load(at + HALF, mask=pair < HALF, other=0.0)
