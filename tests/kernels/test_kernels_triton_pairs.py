"""The instructions that turn words of codes into pairs of numbers, by what PTX says that they do."""

import numpy as np
import ptx
import pytest
import torch

from tightrope.kernels.forms.columns import BLOCK, pack_columns
from tightrope.kernels.forms.quantized import PLANES
from tightrope.kernels.triton.cached import BYTES_ASM, NIBBLES_ASM
from tightrope.kernels.triton.quantized_pairs import book_asm, pair_asm

pytestmark = pytest.mark.quick

DTYPES = (torch.float16, torch.bfloat16)
LANES = 320


def registers(words: torch.Tensor) -> ptx.Registers:
    return words.to(torch.int32).contiguous().numpy().view(np.uint32)


def numbers(pair: ptx.Registers, dtype: torch.dtype) -> torch.Tensor:
    """[lanes, 2] float32"""
    return torch.from_numpy(pair.view(np.int16).copy()).view(dtype).float().view(-1, 2)


def twice(values: torch.Tensor, dtype: torch.dtype) -> ptx.Registers:
    bits = values.to(dtype).view(torch.int16).int() & 0xFFFF
    return registers(bits << 16 | bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", sorted(PLANES))
def test_pairs_of_a_word_are_its_rows_that_are_half_a_word_apart(bits: int, dtype: torch.dtype):
    codes = torch.randint(0, 1 << bits, (BLOCK, LANES), dtype=torch.uint8)
    zeros = torch.randint(0, (1 << bits) + 1, (LANES,)).float()
    words = pack_columns(codes, [bits], [1])  # [bits, LANES]
    low, high = PLANES[bits][0], bits - PLANES[bits][0]
    half = 16 // low
    added = 1024 if dtype == torch.float16 else 0 if bits == 8 else 128
    asm = pair_asm(bits, dtype == torch.bfloat16)

    for word in range(low):
        moved = torch.zeros(LANES, dtype=torch.int32)
        if high:
            top, shift = divmod(word, low // high)
            moved = words[low + top] >> shift * high * half
        inputs = [registers(words[word]), registers(moved), twice(-(zeros + added), dtype)]
        found = ptx.run(asm, inputs, half)

        for pair in range(half):
            rows = codes[[2 * half * word + pair, 2 * half * word + pair + half]].float()  # [2, LANES]
            assert torch.equal(numbers(found[pair], dtype), (rows - zeros).T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_of_a_book_are_the_numbers_of_neighbouring_rows(dtype: torch.dtype):
    codes = torch.randint(0, 16, (BLOCK, LANES), dtype=torch.uint8)
    book = torch.randn(16).to(dtype)
    lanes = book.view(torch.int16).int()[torch.arange(LANES) % 16]
    words = pack_columns(codes, [4], [1])

    for word in range(4):
        found = ptx.run(book_asm(), [registers(words[word]), registers(lanes)], 4)

        for pair in range(4):
            rows = codes[[8 * word + 2 * pair, 8 * word + 2 * pair + 1]].long()
            assert torch.equal(numbers(found[pair], dtype), book.float()[rows].T)


def test_both_planes_of_bytes_are_their_signed_numbers():
    codes = torch.randint(-128, 128, (LANES, 4), dtype=torch.int8)

    found = ptx.run(BYTES_ASM.value, [registers(codes.view(torch.int32).flatten())], 2)

    assert torch.equal(numbers(found[0], torch.float16), codes[:, ::2].float())
    assert torch.equal(numbers(found[1], torch.float16), codes[:, 1::2].float())


def test_both_planes_of_nibbles_are_their_numbers():
    codes = torch.randint(0, 256, (LANES, 4), dtype=torch.uint8)

    found = ptx.run(NIBBLES_ASM.value, [registers(codes.view(torch.int32).flatten())], 4)

    for plane, shift in ((found[:2], 0), (found[2:], 4)):
        pairs = torch.cat([numbers(pair, torch.float16) for pair in plane], 1)
        assert torch.equal(pairs, (codes >> shift & 15).float() - 8)
