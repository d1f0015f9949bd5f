"""bitsandbytes' nf4 with double quantization: sixteen quantiles of the normal distribution, scales in 8 bits.

Source: Dettmers et al. 2023, "QLoRA", arXiv 2305.14314; its appendix E has the sixteen numbers.
"""

import json

import torch
from quantizers.calibration import Calibrated
from torch import Tensor

BLOCK, NESTED_BLOCK = 64, 256
CODEBOOK = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
# of the scales; readers take it from the file, where bitsandbytes has one that is finer near zero
NESTED_CODEBOOK = torch.linspace(-1, 1, 256)

CONFIG = {
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_skip_modules": None,
    "quant_method": "bitsandbytes",
}


def quantize(model: Calibrated) -> dict[str, Tensor]:
    """All tensors of the file; the head is tied."""
    tensors = model.others(torch.bfloat16)
    for names, _ in model.families():
        for name in names:
            tensors |= tensors_of(f"{name}.weight", model.weight(name).t())
    return tensors


def tensors_of(key: str, weight: Tensor) -> dict[str, Tensor]:
    """What the file has under `key` of weight [N, K], whose size is a multiple of 64."""
    blocks = weight.reshape(-1, BLOCK)
    scales = blocks.abs().amax(1)
    offset = scales.mean()
    absmax, nested_absmax = _rounded_scales(scales - offset)
    codes = _nearest(CODEBOOK, blocks / scales.clamp(min=1e-30).unsqueeze(1)).view(-1, 2)
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": float(offset),
    }
    return {
        key: codes[:, :1] << 4 | codes[:, 1:],
        f"{key}.absmax": absmax,
        f"{key}.quant_map": CODEBOOK.clone(),
        f"{key}.nested_absmax": nested_absmax,
        f"{key}.nested_quant_map": NESTED_CODEBOOK.clone(),
        f"{key}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def _rounded_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n] and, for every 256 of them, the largest magnitude."""
    padded = torch.nn.functional.pad(scales, (0, -len(scales) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = padded.abs().amax(1).clamp(min=1e-30)
    return _nearest(NESTED_CODEBOOK, padded / largest.unsqueeze(1)).flatten()[: len(scales)].clone(), largest


def _nearest(codebook: Tensor, values: Tensor) -> Tensor:
    return torch.bucketize(values, (codebook[1:] + codebook[:-1]) / 2).to(torch.uint8)
