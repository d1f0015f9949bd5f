"""Which of several joined matrices a program multiplies by: see ColumnMatrix.members."""

import triton
import triton.language as tl
from triton.language import constexpr

from tightrope.kernels.forms.columns import BLOCK, MEMBER_FIELDS
from tightrope.kernels.forms.quantized import TILE

_BLOCK = constexpr(BLOCK)
_FIELDS = constexpr(MEMBER_FIELDS)
_TILE = constexpr(TILE)


@triton.jit
def find_member(members: tl.tensor, num_members: tl.tensor, OUTPUTS: constexpr) -> tuple[tl.tensor, tl.tensor]:
    """This program's matrix, and the first of its outputs that the program has: each has OUTPUTS of one matrix."""
    member, program = 0, tl.program_id(0)
    for _ in range(num_members - 1):
        programs = tl.cdiv(tl.load(members + member * _FIELDS + 5) * _TILE, OUTPUTS)
        is_later = program >= programs
        program -= tl.where(is_later, programs, 0)
        member += tl.where(is_later, 1, 0)
    return member, program * OUTPUTS


@triton.jit
def enter_member(
    words: tl.tensor,
    source: tl.tensor,
    group_of: tl.tensor,
    scales: tl.tensor,
    group_max: tl.tensor,
    zeros: tl.tensor,
    mins: tl.tensor,
    members: tl.tensor,
    member: tl.tensor,
) -> tl.tuple:
    """A matrix's own part of what it has among all, and its outputs, filled up to tiles."""
    at = members + member * _FIELDS
    word, scale = tl.load(at + 1).to(tl.int64) * _TILE, tl.load(at + 2).to(tl.int64) * _TILE
    block, group, num_outputs = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5) * _TILE
    words += word
    group_of += block
    if source is not None:
        source += block * _BLOCK
    scales += scale
    if group_max is not None:
        group_max += group
    if zeros is not None:
        zeros += scale
    if mins is not None:
        mins += scale
    return words, source, group_of, scales, group_max, zeros, mins, num_outputs


@triton.jit
def first_output(members: tl.tensor, member: tl.tensor) -> tl.tensor:
    """Of a matrix among all."""
    return tl.load(members + member * _FIELDS) * _TILE
