"""How a quantized cache stores numbers: stored * scale = value.

| dtype of the cache | stored | largest |
|---|---|---|
| fp16, bf16, fp32 | the value itself | - |
| float8_e4m3fn | e4m3 | 448 |
| float8_e5m2 | e5m2 | 57344 |
| int8 | symmetric integer | 127 |
| uint8 | int4 pairs, low nibble the even element, symmetric | 7 |
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_SCALE, TENSOR_SCALE, HEAD_SCALE, TOKEN_SCALE = range(4)  # what the kernels compile for

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0, torch.uint8: 7.0}


def dequantize(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Stored values [..., H, D] (uint8: [..., H, D / 2]) times scale (0-d, [H] or [..., H]) as fp32 [..., H, D]."""
    if stored.dtype == torch.uint8:
        nibbles = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2).to(torch.int8)
        stored = torch.where(nibbles > 7, nibbles - 16, nibbles)
    values = stored.float()
    if scale is None:
        return values
    scale = scale.float()
    return values * (scale if scale.dim() == 0 else scale[..., None])


def quantize(values: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """Values [..., H, D] over scale (0-d, [H] or [..., H]), rounded to even, saturated, as ``dtype`` stores them."""
    if dtype not in LARGEST:
        return values.to(dtype)
    values = values.float()
    if scale is not None:
        values = values / (scale if scale.dim() == 0 else scale[..., None])
    largest = LARGEST[dtype]
    values = values.clamp(-largest, largest)
    if dtype.is_floating_point:
        return values.to(dtype)
    integers = values.round().to(torch.int8)
    if dtype == torch.int8:
        return integers
    even, odd = integers[..., 0::2] & 15, integers[..., 1::2] & 15
    return (even | (odd << 4)).view(torch.uint8)


def token_scale(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale per (token, head) that maps each vector's largest magnitude to the dtype's largest: fp32 [..., H]."""
    scale = values.float().abs().amax(-1) / LARGEST[dtype]
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def scale_mode(scale: Tensor | None) -> int:
    """NO_SCALE, TENSOR_SCALE, HEAD_SCALE or TOKEN_SCALE."""
    return NO_SCALE if scale is None else {0: TENSOR_SCALE, 1: HEAD_SCALE, 3: TOKEN_SCALE}[scale.dim()]


def token_strides(scale: Tensor | None) -> tuple[int, ...]:
    """Strides of block, slot and head of a scale per (token, head), zeros for any other."""
    return tuple(scale.stride()) if scale is not None and scale.dim() == 3 else (0, 0, 0)
