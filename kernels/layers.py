"""What is between a decoder's matrix products in Triton: norms and the gated activation, one launch each.

Memory: rows [T, ...] of any stride, dense within a row. Bytes bound these kernels where there are many tokens, and the
launch where there are few; so a program takes a whole row (or some heads of one), asks for all of it at once, and all
kernels overlap with the ones around them. Arithmetic is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pagedattn.kernels.launcher import Launcher, specialized
from pagedattn.kernels.overlap import let_next_start, overlaps, wait_for_previous
from pagedattn.kernels.tiling import next_power_of_2


@triton.jit
def inverse_rms(values, eps, AXIS: tl.constexpr, SIZE: tl.constexpr):
    """1 / sqrt(mean of squares + eps) along an axis of SIZE elements, zero where padded."""
    return 1.0 / tl.sqrt_rn(tl.sum(values * values, axis=AXIS, keep_dims=True) / SIZE + eps)


@triton.jit
def rms_norm_kernel(
    out_ptr,
    hidden_ptr,
    residual_ptr,
    weight_ptr,
    eps,
    stride_out,
    stride_hidden,
    stride_residual,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    exists = column < SIZE
    wait_for_previous(OVERLAP)
    weight = tl.load(weight_ptr + column, mask=exists, other=0.0)
    values = tl.load(hidden_ptr + row * stride_hidden + column, mask=exists, other=0.0)
    if HAS_RESIDUAL:
        residual_ptr += row * stride_residual
        residual = tl.load(residual_ptr + column, mask=exists, other=0.0)
        values = (residual.to(tl.float32) + values.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + column, values, mask=exists)
    wide = values.to(tl.float32)
    normed = wide * inverse_rms(wide, eps, 0, SIZE) * weight.to(tl.float32)
    tl.store(out_ptr + row * stride_out + column, normed.to(values.dtype), mask=exists)


@triton.jit
def norm_heads(
    heads_ptr, weight_ptr, stride_head, first_head, eps,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """Norm HEADS heads from the one numbered first_head on, in place."""
    head = (first_head + tl.arange(0, HEADS))[:, None]
    dim = tl.arange(0, DIM_PADDED)[None, :]
    mask = (head < NUM_HEADS) & (dim < HEAD_DIM)
    heads_ptr += head * stride_head + dim
    weight = tl.load(weight_ptr + dim, mask=dim < HEAD_DIM, other=0.0)
    values = tl.load(heads_ptr, mask=mask, other=0.0)
    wide = values.to(tl.float32)
    normed = wide * inverse_rms(wide, eps, 1, HEAD_DIM) * weight.to(tl.float32)
    tl.store(heads_ptr, normed.to(values.dtype), mask=mask)


@triton.jit
def query_key_norm_kernel(
    query_ptr,
    key_ptr,
    query_weight_ptr,
    key_weight_ptr,
    eps,
    stride_query_token,
    stride_query_head,
    stride_key_token,
    stride_key_head,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    QUERY_PROGRAMS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A token's first QUERY_PROGRAMS programs take its query heads, the others its key heads, HEADS each."""
    let_next_start(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    wait_for_previous(OVERLAP)
    if part < QUERY_PROGRAMS:
        norm_heads(
            query_ptr + token * stride_query_token, query_weight_ptr, stride_query_head, part * HEADS, eps,
            NUM_HEADS, HEADS, HEAD_DIM, DIM_PADDED,
        )  # fmt: skip
    else:
        norm_heads(
            key_ptr + token * stride_key_token, key_weight_ptr, stride_key_head, (part - QUERY_PROGRAMS) * HEADS, eps,
            NUM_KV_HEADS, HEADS, HEAD_DIM, DIM_PADDED,
        )  # fmt: skip


@triton.jit
def silu(x):
    """x * sigmoid(x) in fp32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def silu_and_mul_kernel(
    out_ptr,
    gate_up_ptr,
    stride_out,
    stride_gate_up,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < SIZE
    gate_up_ptr += row * stride_gate_up + column
    wait_for_previous(OVERLAP)
    gate = tl.load(gate_up_ptr, mask=exists, other=0.0)
    up = tl.load(gate_up_ptr + SIZE, mask=exists, other=0.0)
    gated = silu(gate.to(tl.float32)) * up.to(tl.float32)
    tl.store(out_ptr + row * stride_out + column, gated.to(gate.dtype), mask=exists)


# --- launching --------------------------------------------------------------------------------------------------------


def norm_warps(size: int) -> int:
    """Warps of a program that norms a row: about 16 elements a thread."""
    return max(1, min(16, next_power_of_2(size) // 512))


def _norm(hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    rows, size = hidden.shape
    out = hidden.new_empty(hidden.shape)
    if not rows:
        return out
    overlap = overlaps(hidden.device)
    strides = (out.stride(0), hidden.stride(0), 0 if residual is None else residual.stride(0))
    constants = (size, next_power_of_2(size), residual is not None, overlap)
    launch = launch_norm.prepare(
        (hidden.dtype, specialized(strides), constants),
        (rows, 1),
        hidden.device,
        (eps, *strides, *constants),
        num_warps=norm_warps(size),
        launch_pdl=overlap,
    )
    launch((out, hidden, residual, weight))
    return out


def rms_norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each row of values [T, H] over its root mean square, times weight [H]."""
    return _norm(values, None, weight, eps)


def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add hidden [T, H] to residual in place, and norm what that gives, as it is stored."""
    return _norm(hidden, residual, weight, eps)


HEAD_ELEMENTS = 1024  # of a program; 8 for each of its threads


def query_key_norm(query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float) -> None:
    """Norm every head of query [T, Hq, D] and of key [T, Hkv, D] in place."""
    tokens, num_heads, head_size = query.shape
    if not tokens:
        return
    num_kv_heads, padded = key.shape[1], next_power_of_2(head_size)
    heads = max(1, min(HEAD_ELEMENTS // padded, next_power_of_2(num_heads)))
    query_programs = -(-num_heads // heads)
    overlap = overlaps(query.device)
    strides = (*query.stride()[:2], *key.stride()[:2])
    constants = (num_heads, num_kv_heads, heads, query_programs, head_size, padded, overlap)
    launch = launch_query_key_norm.prepare(
        (query.dtype, specialized(strides), constants),
        (tokens, query_programs + -(-num_kv_heads // heads)),
        query.device,
        (eps, *strides, *constants),
        num_warps=4,
        launch_pdl=overlap,
    )
    launch((query, key, query_weight, key_weight))


GATED_ELEMENTS = 1024  # of a program; 8 for each of its threads


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 I], gates before what they let through, as [T, I]: silu(gate) * up."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, size))
    if not out.numel():
        return out
    block = min(GATED_ELEMENTS, next_power_of_2(size))
    overlap = overlaps(gate_up.device)
    strides, constants = (out.stride(0), gate_up.stride(0)), (size, block, overlap)
    launch = launch_silu_and_mul.prepare(
        (gate_up.dtype, specialized(strides), constants),
        (rows, -(-size // block)),
        gate_up.device,
        (*strides, *constants),
        num_warps=4,
        launch_pdl=overlap,
    )
    launch((out, gate_up))
    return out


launch_norm = Launcher(rms_norm_kernel)
launch_query_key_norm = Launcher(query_key_norm_kernel)
launch_silu_and_mul = Launcher(silu_and_mul_kernel)
