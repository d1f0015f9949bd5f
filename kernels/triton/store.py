"""Storing keys and values on CUDA: divided by their factor, quantized and scattered to the pages, in one launch."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from tightrope.kernels.forms.layout import GROUP, PAGE, LayerCache
from tightrope.kernels.triton.jit import kernel

_GROUP = constexpr(GROUP)
_PAGE = constexpr(PAGE)
_TO_EVEN = constexpr(1.5 * 2**23)  # Added and taken away, it rounds to the nearest integer, ties to the even one.


@kernel
def _store(
    keys: tl.tensor,
    values: tl.tensor,
    key_factor: tl.tensor,
    slots: tl.tensor,
    key_codes: tl.tensor,
    key_scales: tl.tensor,
    value_codes: tl.tensor,
    value_scales: tl.tensor,
    key_heads: int,
    value_heads: int,
    NUM_KV_HEADS: constexpr,
    HEAD_DIM: constexpr,
    GROUPS: constexpr,
    GROUPS_PADDED: constexpr,
    BITS: constexpr,
) -> None:
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    row = (slot // _PAGE * NUM_KV_HEADS + head) * _PAGE + slot % _PAGE
    groups = tl.arange(0, GROUPS_PADDED)[:, None]
    dims = groups * _GROUP + tl.arange(0, _GROUP)[None, :]
    mask = dims < HEAD_DIM
    key = tl.load(keys + (token * key_heads + head) * HEAD_DIM + dims, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(key_factor + head * HEAD_DIM + dims, mask=mask, other=1.0)
    _write(tl.div_rn(key, factor), key_codes, key_scales, row, dims, HEAD_DIM, GROUPS, GROUPS_PADDED, BITS)
    value = tl.load(values + (token * value_heads + head) * HEAD_DIM + dims, mask=mask, other=0.0).to(tl.float32)
    _write(value, value_codes, value_scales, row, dims, HEAD_DIM, GROUPS, GROUPS_PADDED, BITS)


@triton.jit
def _write(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    dims: tl.tensor,
    HEAD_DIM: constexpr,
    GROUPS: constexpr,
    GROUPS_PADDED: constexpr,
    BITS: constexpr,
) -> None:
    """One head of one token, x [GROUPS_PADDED, 32] float32; to the bit what kernels.reference.quantize yields."""
    if BITS == 16:
        tl.store(codes + row * HEAD_DIM + dims, x.to(tl.float16), mask=dims < HEAD_DIM)
    else:
        groups = tl.arange(0, GROUPS_PADDED)
        if BITS == 8:
            wide = tl.div_rn(tl.max(tl.abs(x), 1), 127.0)
        else:
            place = tl.argmax(tl.abs(x), 1)
            is_largest = tl.arange(0, _GROUP)[None, :] == place[:, None]
            wide = tl.sum(tl.where(is_largest, x, 0.0), 1) * -0.125
        scale = wide.to(tl.float16)
        tl.store(scales + row * GROUPS + groups, scale, mask=groups < GROUPS)
        stored = scale.to(tl.float32)
        is_zero = stored == 0
        inverse = tl.where(is_zero, 0.0, tl.div_rn(1.0, tl.where(is_zero, 1.0, stored)))
        number = (x * inverse[:, None] + _TO_EVEN) - _TO_EVEN
        if BITS == 8:
            number = tl.minimum(tl.maximum(number, -127.0), 127.0)
            at = codes + row * (GROUPS * _GROUP) + dims
            tl.store(at, number.to(tl.int8), mask=dims < GROUPS * _GROUP)
        else:
            half: constexpr = _GROUP // 2
            nibble = tl.minimum(tl.maximum(number + 8, 0.0), 15.0).to(tl.int32)
            halves = tl.reshape(nibble, (GROUPS_PADDED, 2, half))
            is_high = tl.arange(0, 2)[None, :, None] == 1
            byte = tl.sum(tl.where(is_high, halves * 16, halves), 1).to(tl.uint8)
            at = codes + row * (GROUPS * half) + groups[:, None] * half + tl.arange(0, half)[None, :]
            tl.store(at, byte, mask=groups[:, None] < GROUPS)


def store_kv(cache: LayerCache, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """kernels.reference.store_kv for keys and values [T, Hkv, D] of any float dtype.

    A token that fills up a captured graph has a negative slot.
    """
    num_tokens, num_kv_heads, head_dim = keys.shape
    if not num_tokens:
        return
    keys, values = _rows(keys), _rows(values)
    num_groups = cache.format.num_groups
    _store[num_tokens, num_kv_heads](
        keys,
        values,
        cache.key_factor,
        slots,
        cache.key_codes,
        cache.key_scales,
        cache.value_codes,
        cache.value_scales,
        keys.stride(0) // head_dim,
        values.stride(0) // head_dim,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        GROUPS=num_groups,
        GROUPS_PADDED=triton.next_power_of_2(num_groups),
        BITS={"f16": 16, "q8": 8, "q4": 4}[cache.format.dtype],
        num_warps=1,
        enable_fp_fusion=False,  # A fused multiply and add would round ties another way than the reference.
    )


def _rows(x: Tensor) -> Tensor:
    """x [T, Hkv, D] with tokens whole heads apart; slices of a fused projection pass as they are."""
    head_dim = x.shape[2]
    is_ready = x.stride(2) == 1 and x.stride(1) == head_dim and x.stride(0) % head_dim == 0
    return x if is_ready else x.contiguous()
