"""GPTQ files as AutoGPTQ writes them: 4 bits, symmetric, act-order, zero points less one, biases of zeros."""

import torch
from quantizers import streams
from quantizers.calibration import HEAD, Calibrated
from quantizers.rounding import DAMPING, Grid, best, importance_order, round_corrected
from torch import Tensor

BITS, GROUP_SIZE = 4, 128
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the scale that clips nothing

CONFIG = {
    "bits": BITS,
    "group_size": GROUP_SIZE,
    "damp_percent": DAMPING,
    "desc_act": True,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": None,
    "is_marlin_format": False,
    "quant_method": "gptq",
}


def quantize(model: Calibrated) -> dict[str, Tensor]:
    """All tensors of the file; the head is not quantized."""
    tensors = model.others(torch.float16)
    tensors[f"{HEAD}.weight"] = model.weight(HEAD).t().to(torch.float16).clone()
    for names, hessian in model.families():
        order = importance_order(hessian)
        for name in names:
            parts = matrix(model.weight(name), hessian, order)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return tensors


def matrix(weight: Tensor, hessian: Tensor, order: Tensor) -> dict[str, Tensor]:
    """The tensors of weight [K, N], rounded in this order of its inputs; the last group may be short."""
    groups = [(BITS, min(GROUP_SIZE, len(order) - at)) for at in range(0, len(order), GROUP_SIZE)]
    rounded = round_corrected(weight[order], hessian[order][:, order], groups, fit)
    codes = torch.empty_like(rounded.codes)
    codes[order] = rounded.codes
    group_of = torch.empty(len(order), dtype=torch.int32)
    group_of[order] = torch.arange(len(order), dtype=torch.int32) // GROUP_SIZE
    scales = torch.stack([grid.scale for grid in rounded.grids])
    return tensors_of(codes, scales, torch.stack([grid.zero for grid in rounded.grids]), group_of)


def fit(rows: Tensor, bits: int) -> Grid:
    """Scales in half precision, with the zero point in the middle."""
    wanted = (2 * rows.abs().amax(0) / ((1 << bits) - 1)).clamp(min=1e-6)  # halves of less have few bits
    zero = torch.full_like(wanted, 1 << (bits - 1))
    return best(rows, (Grid(bits, (shrink * wanted).half().float(), zero) for shrink in SHRINKS))


def tensors_of(codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor, bits: int = BITS) -> dict[str, Tensor]:
    """What the file has of codes [K, N]; scales and zeros, from 1, are [G, N], group_of [K] is each input's group."""
    return {
        "qweight": streams.pack(codes, bits),
        "qzeros": streams.pack_along(zeros - 1, bits),
        "scales": scales.half(),
        "g_idx": group_of.int(),
        "bias": torch.zeros(codes.shape[1], dtype=torch.float16),
    }
