"""EXL2 files: widths mixed within a matrix, important inputs first; scales of four bits; a quantized head."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from quantizers import streams
from quantizers.calibration import HEAD, Calibrated
from quantizers.rounding import Grid, best, importance_order, round_corrected
from torch import Tensor

TRIED = 4  # codes of a scale, from the one that clips nothing down

Groups = list[tuple[int, int]]  # (bits, rows), widths descending
Mix = Callable[[str, int], Groups]  # of a matrix, by its name and inputs


def plain(bits: int, size: int = 128) -> Mix:
    """The same width everywhere."""
    return lambda name, inputs: _cut([(bits, inputs)], size)


def mixed(name: str, inputs: int) -> Groups:
    """More bits for what suffers most from few: down_proj and v_proj, and everywhere the inputs that matter most.

    Shares are in thirty-seconds of the inputs; all six widths occur.
    """
    shares = {
        "v_proj": ((6, 4), (5, 12), (4, 16)),
        "down_proj": ((8, 2), (6, 3), (5, 5), (4, 22)),
        "o_proj": ((5, 6), (4, 26)),
    }.get(name.rpartition(".")[2], ((6, 3), (5, 6), (4, 17), (3, 4), (2, 2)))
    rows = {bits: share * inputs // 1024 * 32 for bits, share in shares}
    rows[4] += inputs - sum(rows.values())
    # small groups where bits are many, as the converter has them
    return [group for bits, count in rows.items() for group in _cut([(bits, count)], 32 if bits > 4 else 128)]


def head(inputs: int) -> Groups:
    """A head of 6 bits: the first 15 % of the groups of 128 inputs, rounded up, have 8."""
    wide = min(inputs, -(-inputs * 15 // (100 * 128)) * 128)
    return _cut([(8, wide), (6, inputs - wide)], 128)


def _cut(runs: Sequence[tuple[int, int]], size: int) -> Groups:
    return [(bits, min(size, count - at)) for bits, count in runs for at in range(0, count, size)]


def quantize(model: Calibrated, mix: Mix) -> tuple[dict[str, Tensor], float]:
    """All tensors of the file, and the average bits of a weight of its layers, scales and permutations included."""
    tensors = model.others(torch.float16)
    bits = weights = 0
    for names, hessian in model.families():
        order = importance_order(hessian)
        for name in names:
            weight = model.weight(name)
            parts = matrix(weight, hessian, order, mix(name, len(hessian)))
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            bits += 8 * sum(tensor.nbytes for tensor in parts.values())
            weights += weight.numel()
    hessian = model.hessians[HEAD]
    parts = matrix(model.weight(HEAD), hessian, importance_order(hessian), head(len(hessian)))
    return tensors | {f"{HEAD}.{part}": tensor for part, tensor in parts.items()}, bits / weights


def matrix(weight: Tensor, hessian: Tensor, order: Tensor, groups: Groups) -> dict[str, Tensor]:
    """The tensors of weight [K, N], N a multiple of 32, whose stored row r is input order[r]."""
    rounded = round_corrected(weight[order], hessian[order][:, order], groups, fit)
    return tensors_of(rounded.codes, rounded.grids, groups, order)


def fit(rows: Tensor, bits: int) -> Grid:
    """Scales (code / 16)^2 * the largest, which is a half and that of some output; the zero point is the middle."""
    middle = 1 << (bits - 1)
    wanted = torch.maximum(rows.amax(0) / (middle - 1), rows.amin(0) / -middle)
    largest = wanted.max().clamp(min=2e-7).half().float()  # the smallest halves are of few bits
    top = wanted.argmax()
    widest = (16 * (wanted / largest).clamp(min=0).sqrt()).ceil().clamp(1, 16)

    def grid(step: int) -> Grid:
        codes = (widest - step).clamp(min=1)
        codes[top] = 16
        return Grid(bits, (codes / 16).square() * largest, torch.full_like(codes, middle))

    return best(rows, map(grid, range(TRIED)))


def tensors_of(codes: Tensor, grids: Sequence[Grid], groups: Groups, order: Tensor) -> dict[str, Tensor]:
    """What the file has of codes [K, N] in stored order, with grids as `fit` makes them."""
    parts = codes.split([rows for _, rows in groups])
    packed = [streams.pack(part, bits) for part, (bits, _) in zip(parts, groups, strict=True)]
    starts = [0, *accumulate(len(words) for words in packed[:-1])]
    largest = [grid.scale.max() for grid in grids]
    scale_codes = [(16 * (grid.scale / top).sqrt()).round() - 1 for grid, top in zip(grids, largest, strict=True)]
    pairs = [(bits, start) for (bits, _), start in zip(groups, starts, strict=True)]
    return {
        "q_weight": torch.cat(packed),
        "q_scale": streams.pack_along(torch.stack(scale_codes), 4),
        "q_scale_max": torch.stack(largest).half(),
        "q_groups": torch.tensor(pairs).flatten().short(),
        "q_invperm": order.argsort().int(),
    }
