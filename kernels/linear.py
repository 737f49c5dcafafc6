"""Matrix products with what is around them. For a few rows: one launch of a kernel of ours. For more: the vendor's.

A product with few rows reads its weights and does little else. Weights depend on nothing, so a program asks for its
own, whole rows [BLOCK_N, SIZE] of the matrix, before it waits for the kernel ahead: that one's end, this one's start
and the memory's latency overlap. And the norm before the product, the gate behind it, or the residual that it is added
to cost no launch of their own. Norms are a factor of the sum, so nothing is rounded before the product.

Memory: values [T, K], weight [N, K], dense; a gated product has the gates' rows first, then as many others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pagedattn.kernels import layers
from pagedattn.kernels.launcher import Launcher, specialized
from pagedattn.kernels.layers import silu
from pagedattn.kernels.overlap import let_next_start, overlaps, wait_for_previous
from pagedattn.kernels.tiling import next_power_of_2

FEW_ROWS = 4


@triton.jit
def load_rows(weight_ptr, row, num_rows, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows [N] of a matrix, whole: [N, BLOCK_K], zero where there is nothing. They are not read twice."""
    column = tl.arange(0, BLOCK_K)[None, :]
    mask = (row < num_rows)[:, None] & (column < SIZE)
    pointers = weight_ptr + row.to(tl.int64)[:, None] * SIZE + column
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def few_rows_linear_kernel(
    out_ptr,
    values_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    eps,
    num_outputs,
    stride_out,
    stride_values,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = output < num_outputs
    column = tl.arange(0, BLOCK_K)
    inside = column < SIZE
    weight = load_rows(weight_ptr, output, num_outputs, SIZE, BLOCK_K)
    if GATED:
        others = load_rows(weight_ptr + num_outputs.to(tl.int64) * SIZE, output, num_outputs, SIZE, BLOCK_K)
    if HAS_NORM:
        norm_weight = tl.load(norm_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + output, mask=exists, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    for row in tl.static_range(ROWS):
        values = tl.load(values_ptr + row * stride_values + column, mask=inside, other=0.0).to(tl.float32)
        factor = 1.0
        if HAS_NORM:
            factor = 1.0 / tl.sqrt_rn(tl.sum(values * values, axis=0) / SIZE + eps)
            values *= norm_weight
        result = tl.sum(weight.to(tl.float32) * values[None, :], axis=1) * factor
        if HAS_BIAS:
            result += bias
        if GATED:
            result = silu(result) * (tl.sum(others.to(tl.float32) * values[None, :], axis=1) * factor)
        row_ptr = out_ptr + row * stride_out + output
        if ADDS:
            result += tl.load(row_ptr, mask=exists, other=0.0).to(tl.float32)
        tl.store(row_ptr, result.to(out_ptr.dtype.element_ty), mask=exists)


# --- launching --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearLaunch:
    """How many outputs a program computes, and with how many warps."""

    block_n: int
    num_warps: int


def choose_linear_launch(num_outputs: int, size: int, gated: bool) -> LinearLaunch:
    """Few outputs are spread over many programs; a thread asks for about 64 weights, which fill its registers."""
    block_k = next_power_of_2(size)
    block_n = 4
    if num_outputs >= 1 << 15 and block_k <= 1024:
        block_n = 16
    elements = block_n * block_k * (2 if gated else 1)
    return LinearLaunch(block_n, max(4, min(16, elements // (32 * 64))))


def _few_rows_linear(
    out: Tensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    gated: bool,
    adds: bool,
) -> None:
    """Rows [T, K], T at most FEW_ROWS, times weight [N, K] into out."""
    rows, size = values.shape
    num_outputs = out.shape[1]
    cut = choose_linear_launch(num_outputs, size, gated)
    overlap = overlaps(values.device)
    sizes = (num_outputs, out.stride(0), values.stride(0))
    constants = (
        rows, size, cut.block_n, next_power_of_2(size), bias is not None, norm_weight is not None, gated, adds, overlap,
    )  # fmt: skip
    launch = launch_linear.prepare(
        (values.dtype, specialized(sizes), constants, cut),
        (-(-num_outputs // cut.block_n), 1),
        values.device,
        (eps, *sizes, *constants),
        num_warps=cut.num_warps,
        launch_pdl=overlap,
    )
    launch((out, values, weight, bias, norm_weight))


def norm_linear(
    values: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None, gated: bool
) -> Tensor:
    """rms_norm(values) [T, K] times weight [N, K]; gated: [T, N / 2], silu of the first half times the second."""
    if 0 < values.shape[0] <= FEW_ROWS:
        out = values.new_empty((values.shape[0], weight.shape[0] // (2 if gated else 1)))
        _few_rows_linear(out, values, weight, bias, norm_weight, eps, gated, adds=False)
        return out
    product = F.linear(layers.rms_norm(values, norm_weight, eps), weight, bias)
    return layers.silu_and_mul(product) if gated else product


def add_linear(residual: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Add values [T, K] times weight [N, K] to residual [T, N] in place."""
    if 0 < values.shape[0] <= FEW_ROWS:
        _few_rows_linear(residual, values, weight, bias, None, 0.0, gated=False, adds=True)
        return
    residual.addmm_(values, weight.t())
    if bias is not None:
        residual += bias


launch_linear = Launcher(few_rows_linear_kernel)
