"""Codes of 2 to 8 bits in 32-bit words: value after value from the lowest bits up, across the borders of words."""

import torch
from torch import Tensor

RUN = 32  # values: they fill whole words at any width


def pack(codes: Tensor, bits: int) -> Tensor:
    """Words [R * bits / 32, M] int32 of codes [R, M], a stream down each column; R is a multiple of 32, or the codes
    fill whole words."""
    num_rows = len(codes)
    codes = torch.nn.functional.pad(codes.long(), (0, 0, 0, -num_rows % RUN)).unflatten(0, (-1, RUN))
    words = torch.zeros(len(codes), bits + 1, codes.shape[2], dtype=torch.int64)
    for i in range(RUN):
        word, shift = divmod(i * bits, 32)
        spread = codes[:, i] << shift
        words[:, word] |= spread & 0xFFFFFFFF
        words[:, word + 1] |= spread >> 32
    return words[:, :bits].flatten(0, 1)[: num_rows * bits // 32].to(torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes [R, M] uint8 of words [R * bits / 32, M] int32."""
    num_rows = len(words) * 32 // bits
    below = words.long() & 0xFFFFFFFF
    above = torch.cat((below[1:], below.new_zeros(1, words.shape[1])))
    first = torch.arange(num_rows) * bits
    pairs = below | above << 32  # of which int64 keeps all that is asked for: 31 + 8 bits
    values = pairs[first // 32] >> (first % 32).unsqueeze(1)
    return (values & ((1 << bits) - 1)).to(torch.uint8)


def pack_along(codes: Tensor, bits: int) -> Tensor:
    """Words [R, M * bits / 32] of codes [R, M], a stream along each row."""
    return pack(codes.t(), bits).t().contiguous()


def unpack_along(words: Tensor, bits: int) -> Tensor:
    """Codes [R, M] uint8 of words [R, M * bits / 32]."""
    return unpack(words.t(), bits).t().contiguous()
