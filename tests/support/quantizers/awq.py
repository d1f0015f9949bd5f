"""AWQ files in the packing GEMM: 4 bits with zero points, inputs that matter enlarged before they are rounded.

The factors are undone where the input comes from: in the norm before it, or in up_proj's outputs before down_proj.
Source: Lin et al. 2023, "AWQ", arXiv 2306.00978.
"""

import torch
from quantizers import streams
from quantizers.calibration import Calibrated
from quantizers.rounding import Grid
from torch import Tensor

BITS, GROUP_SIZE = 4, 64
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word has column ORDER[i] of its eight
EXPONENTS = (0.0, 0.25, 0.5, 0.75)  # of an input's magnitude, to make its factor

CONFIG = {
    "bits": BITS,
    "group_size": GROUP_SIZE,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}


def quantize(model: Calibrated) -> dict[str, Tensor]:
    """All tensors of the file; the head is tied."""
    tensors = model.others(torch.float16)
    factors = {
        name: best_factors(torch.cat([model.weight(name) for name in names], 1), hessian)
        for names, hessian in model.families()
        for name in names
        if not name.endswith("o_proj")  # its inputs are v_proj's outputs, each of which several heads share
    }
    for names, _ in model.families():
        for name in names:
            weight = model.weight(name)
            if name in factors:
                weight = weight * factors[name].unsqueeze(1)
            if name.endswith("up_proj"):
                weight = weight / factors[name.replace("up_proj", "down_proj")]
            tensors |= {f"{name}.{part}": tensor for part, tensor in tensors_of(*rounded(weight)).items()}
    for i in range(model.num_layers):
        layer = f"model.layers.{i}"
        for norm, name in (("input_layernorm", "self_attn.q_proj"), ("post_attention_layernorm", "mlp.up_proj")):
            tensors[f"{layer}.{norm}.weight"] /= factors[f"{layer}.{name}"]
    return tensors


def best_factors(weight: Tensor, hessian: Tensor) -> Tensor:
    """Factors [K] of the inputs of weight [K, N] that leave the outputs nearest to what they were."""
    magnitude = hessian.diag().sqrt()
    magnitude = magnitude.clamp(min=1e-3 * float(magnitude.mean()))
    tried = []
    for exponent in EXPONENTS:
        factors = magnitude**exponent
        factors /= (factors.amax() * factors.amin()).sqrt()
        grid_error = _dequantized(weight * factors.unsqueeze(1)) / factors.unsqueeze(1) - weight
        tried.append((float(((hessian @ grid_error) * grid_error).sum()), factors))
    return min(tried, key=lambda pair: pair[0])[1]


def rounded(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [K, N], scales [G, N] in half precision and zeros [G, N] of weight [K, N]: each group from its extremes."""
    groups = weight.unflatten(0, (-1, GROUP_SIZE))  # [G, 64, N]
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / ((1 << BITS) - 1)).clamp(min=2e-7).half().float()
    zeros = (-low / scales).round().clamp(0, (1 << BITS) - 1)
    grid = Grid(BITS, scales.unsqueeze(1), zeros.unsqueeze(1))
    return grid.encode(groups).flatten(0, 1), scales, zeros


def _dequantized(weight: Tensor) -> Tensor:
    codes, scales, zeros = rounded(weight)
    grid = Grid(BITS, scales.unsqueeze(1), zeros.unsqueeze(1))
    return grid.decode(codes.unflatten(0, (-1, GROUP_SIZE))).flatten(0, 1)


def tensors_of(codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    """What the file has of codes [K, N] and scales and zeros [G, N]."""
    return {"qweight": _pack(codes), "qzeros": _pack(zeros), "scales": scales.half()}


def _pack(codes: Tensor) -> Tensor:
    columns = torch.arange(codes.shape[1]).view(-1, 8)[:, ORDER].flatten()
    return streams.pack_along(codes[:, columns], BITS)
