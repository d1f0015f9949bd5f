"""Random quantized matrices to run kernels on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tightrope.kernels.forms.quantized import TILE, Nf4Matrix, QuantizedMatrix, arrange, pack, pack_nf4, tiled

EXL2_MIX = ((6, 0.1), (5, 0.45), (4, 0.45))  # bits and share of the groups: 4.65 bits per weight
GROUP_ROWS = 128


def random_matrix(
    sizes: Sequence[int],
    bits: Sequence[int],
    num_outputs: int,
    *,
    is_coded: bool = False,
    has_zeros: bool = False,
    is_permuted: bool = False,
    seed: int = 0,
) -> QuantizedMatrix:
    """Codes in groups of these sizes and widths; coded scales are EXL2's, zero points are 0 to 2^bits."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    inputs = torch.randperm(sum(sizes), generator=generator) if is_permuted else torch.arange(sum(sizes))
    rows = arrange(inputs.int(), sizes, bits)
    counts = rows.group_starts.diff().long()
    limits = (1 << rows.group_bits.int()).unsqueeze(1)  # [G, 1]
    shape = (len(sizes), num_outputs)
    codes = (rand(int(counts.sum()), num_outputs) * limits.repeat_interleave(counts, 0)).to(torch.uint8)
    scales = rand(*shape) / limits
    zeros = (rand(*shape) * (limits + 1)).to(torch.int16)
    scale_codes = 1 + (rand(*shape) * 16).to(torch.uint8)
    return QuantizedMatrix(
        sum(sizes),
        num_outputs,
        rows.source,
        rows.group_starts,
        rows.group_bits,
        pack(codes, rows),
        scales=None if is_coded else tiled(scales.half()),
        scale_codes=tiled(scale_codes) if is_coded else None,
        group_max=rand(len(sizes)) / 50 if is_coded else None,
        zeros=tiled(zeros) if has_zeros else None,
    )


def random_nf4(num_inputs: int, num_outputs: int, blocksize: int) -> Nf4Matrix:
    """Codes of a book of cubes."""
    codes = torch.randint(0, 16, (num_outputs, num_inputs), dtype=torch.uint8)
    scales = torch.rand(num_outputs, num_inputs // blocksize)
    return pack_nf4(codes, scales, torch.linspace(-1, 1, 16).pow(3), blocksize)


def large_matrix(
    num_inputs: int, num_outputs: int, bits: Sequence[int], device: torch.device, *, is_exl2: bool, is_permuted: bool
) -> QuantizedMatrix:
    """Random bytes, made on the device, in groups of GROUP_ROWS; weights of about the size that keeps a product's."""
    order = torch.randperm(num_inputs) if is_permuted else torch.arange(num_inputs)
    rows = arrange(order.int(), [GROUP_ROWS] * len(bits), bits)
    tiles, groups = -(-num_outputs // TILE), len(bits)
    shape = (tiles, groups, TILE)
    num_bytes = sum(bits) * GROUP_ROWS * TILE // 8
    spread = torch.exp2(-rows.group_bits.float()) * (12 / num_inputs) ** 0.5  # [G]: the scale of uniform codes
    scales = torch.rand(shape, device=device) * spread.to(device).unsqueeze(1)
    return QuantizedMatrix(
        num_inputs,
        num_outputs,
        rows.source,
        rows.group_starts,
        rows.group_bits,
        torch.randint(0, 256, (tiles, num_bytes), dtype=torch.uint8, device=device),
        scales=None if is_exl2 else scales.half(),
        scale_codes=torch.randint(1, 17, shape, dtype=torch.uint8, device=device) if is_exl2 else None,
        group_max=2 * spread if is_exl2 else None,
    )


def exl2_bits(num_inputs: int) -> list[int]:
    """The widths of the groups of a matrix of EXL2_MIX."""
    groups = num_inputs // GROUP_ROWS
    wide = [bits for bits, share in EXL2_MIX[:-1] for _ in range(round(share * groups))]
    return wide + [EXL2_MIX[-1][0]] * (groups - len(wide))
