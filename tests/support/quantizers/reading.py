"""The weights that a quantized folder stands for, by the formats' plain formulas: what a loader is held to."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from quantizers import awq, streams
from safetensors.torch import load_file
from torch import Tensor


def dequantized(folder: Path) -> dict[str, Tensor]:
    """All of a model's tensors in float32, matrices as [N, K] under `NAME.weight`, from the folder's only file."""
    [path] = folder.glob("*.safetensors")
    tensors = load_file(path)
    weights: dict[str, Tensor] = {}
    for mark, formula in FORMULAS.items():
        for stem in [name.removesuffix(mark) for name in tensors if name.endswith(mark)]:
            if f"{stem}.weight" not in weights:
                weights[f"{stem}.weight"] = formula(parts_of(tensors, stem)).t().contiguous()
    stems = tuple(f"{name.removesuffix('weight')}" for name in weights)
    return weights | {name: t.float() for name, t in tensors.items() if not name.startswith(stems)}


def exl2(parts: Mapping[str, Tensor]) -> Tensor:
    """(code - 2^(bits - 1)) * ((scale code + 1) / 16)^2 * q_scale_max; input i is in stored row q_invperm[i]."""
    pairs = parts["q_groups"].view(-1, 2).tolist()
    ends = [start for _, start in pairs[1:]] + [len(parts["q_weight"])]
    scales = ((streams.unpack_along(parts["q_scale"], 4).float() + 1) / 16).square() * parts["q_scale_max"].unsqueeze(1)
    stored = [
        (streams.unpack(parts["q_weight"][start:end], bits).float() - (1 << (bits - 1))) * scale
        for (bits, start), end, scale in zip(pairs, ends, scales, strict=True)
    ]
    return torch.cat(stored)[parts["q_invperm"].long()]


def gptq(parts: Mapping[str, Tensor]) -> Tensor:
    """(code - stored zero - 1) * scale, of the group that g_idx gives."""
    group, bits = parts["g_idx"].long(), 32 * len(parts["qweight"]) // len(parts["g_idx"])
    zeros = streams.unpack_along(parts["qzeros"], bits).float() + 1
    weight = (streams.unpack(parts["qweight"], bits).float() - zeros[group]) * parts["scales"].float()[group]
    assert not parts["bias"].any()
    return weight


def awq_gemm(parts: Mapping[str, Tensor]) -> Tensor:
    """(code - zero) * scale, with the columns of a word brought back in order."""
    codes, zeros = (_in_order(streams.unpack_along(parts[name], 4)).float() for name in ("qweight", "qzeros"))
    group = torch.arange(len(codes)) // (len(codes) // len(zeros))
    return (codes - zeros[group]) * parts["scales"].float()[group]


def _in_order(nibbles: Tensor) -> Tensor:
    eights = nibbles.unflatten(1, (-1, 8))
    return torch.stack([eights[..., awq.ORDER.index(j)] for j in range(8)], -1).flatten(1)


def nf4(parts: Mapping[str, Tensor]) -> Tensor:
    """quant_map[code] * (nested_quant_map[absmax] * nested_absmax + nested_offset), block after block of [N, K]."""
    state = json.loads(bytes(parts["quant_state.bitsandbytes__nf4"].tolist()))
    nested = parts["nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(parts["absmax"])]
    scales = parts["nested_quant_map"][parts["absmax"].long()] * nested + state["nested_offset"]
    codes = torch.cat((parts["weight"] >> 4, parts["weight"] & 15), 1).flatten().long()
    values = parts["quant_map"][codes].view(-1, state["blocksize"]) * scales.unsqueeze(1)
    return values.view(state["shape"]).t()


def parts_of(tensors: Mapping[str, Tensor], stem: str) -> dict[str, Tensor]:
    """A matrix's tensors by the last part of their names; nf4's are named after its weight."""
    found = {name.removeprefix(f"{stem}."): t for name, t in tensors.items() if name.startswith(f"{stem}.")}
    return {name.removeprefix("weight."): tensor for name, tensor in found.items()}


# The weight [K, N] float32 of a matrix, by a tensor that it has; of two that fit, the first counts.
FORMULAS: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    ".q_weight": exl2,
    ".g_idx": gptq,
    ".qzeros": awq_gemm,
    ".weight.quant_state.bitsandbytes__nf4": nf4,
}
