"""Codes packed into 32-bit words, one after the other from the lowest bit up, across the borders of words."""

from math import gcd

import torch
from torch import Tensor


def unstream(words: Tensor, bits: int) -> Tensor:
    """Codes [W * 32 / bits, N] uint8 of words [W, N] int32: a stream down each column of whole periods."""
    period = bits // gcd(bits, 32)  # After so many words a code begins at bit 0 again.
    cycles = words.view(-1, period, words.shape[1])
    codes = words.new_empty(len(cycles), 32 * period // bits, words.shape[1], dtype=torch.uint8)
    for i in range(codes.shape[1]):
        word, bit = divmod(i * bits, 32)
        value = cycles[:, word] >> bit
        if bit + bits > 32:  # The shift has filled up with the sign.
            value = (value & ((1 << (32 - bit)) - 1)) | (cycles[:, word + 1] << (32 - bit))
        codes[:, i] = value & ((1 << bits) - 1)
    return codes.flatten(0, 1)
