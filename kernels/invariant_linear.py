"""Matrix products that sum every row in one order, however many rows there are: those of batch-invariant steps.

In ``linear.py``, and in the vendor's library, the number of rows chooses the kernel, its tile and how often the sum
over K is cut, and so a row's last bits. Here one kernel takes any number of them: tiles of BLOCK_M rows, the last one
perhaps mostly empty, a shape that follows from the weight alone, and one loop over K. A row of a tensor core's product
is summed by itself, so neither its place in the tile nor what lies beside it shows. (The few-rows kernel of
``linear.py`` sums so too, but it would read all weights again for every few rows.)

Sums are fp32, of fp32 operands in IEEE precision. Bias, gate and residual join before the only rounding.

Memory: values [T, K] of any stride, weight [N, K], dense; a gated product has the gates' rows first, then as many
others.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from pagedattn.kernels import layers
from pagedattn.kernels.launcher import Launcher, specialized
from pagedattn.kernels.layers import silu
from pagedattn.kernels.overlap import let_next_start, overlaps, wait_for_previous
from pagedattn.kernels.tiling import ceil_div


@triton.jit
def load_weights(weight_ptr, output, exists, start, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_K, BLOCK_N] of a transposed matrix, zero where there is nothing."""
    column = start + tl.arange(0, BLOCK_K)
    mask = exists[None, :] & (column < SIZE)[:, None]
    return tl.load(weight_ptr + output.to(tl.int64)[None, :] * SIZE + column[:, None], mask=mask, other=0.0)


@triton.jit
def add_product(values, weights, total, error):
    """total + values x weights, and the error of that sum, given the one of total.

    An fp32 dot adds its products up one after the other. So each block of columns is summed up by itself, and what is
    lost where that joins the total is kept and given back (Kahan, 1965). Tensor cores sum in a wider format.
    """
    if values.dtype == tl.float32:
        addend = tl.dot(values, weights, input_precision="ieee") - error
        new_total = total + addend
        error = (new_total - total) - addend
        total = new_total
    else:
        total = tl.dot(values, weights, total)
    return total, error


@triton.jit(do_not_specialize=["num_rows"])
def invariant_linear_kernel(
    out_ptr,
    values_ptr,
    weight_ptr,
    bias_ptr,
    num_rows,
    num_outputs,
    stride_out,
    stride_values,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ADDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Programs that follow each other have the same outputs, so that what is large, the weights, is read once."""
    let_next_start(OVERLAP)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, exists = row < num_rows, output < num_outputs
    row_ptrs = values_ptr + row.to(tl.int64)[:, None] * stride_values
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    result_error, through, through_error = result, result, result
    wait_for_previous(OVERLAP)
    for start in tl.range(0, SIZE, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        values = tl.load(row_ptrs + column[None, :], mask=is_row[:, None] & (column < SIZE)[None, :], other=0.0)
        weights = load_weights(weight_ptr, output, exists, start, SIZE, BLOCK_K)
        result, result_error = add_product(values, weights, result, result_error)
        if GATED:
            others = load_weights(weight_ptr, num_outputs + output, exists, start, SIZE, BLOCK_K)
            through, through_error = add_product(values, others, through, through_error)
    if HAS_BIAS:
        result += tl.load(bias_ptr + output, mask=exists, other=0.0).to(tl.float32)[None, :]
    if GATED:
        result = silu(result) * through
    written = is_row[:, None] & exists[None, :]
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * stride_out + output[None, :]
    if ADDS:
        result += tl.load(out_ptrs, mask=written, other=0.0).to(tl.float32)
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=written)


# --- launching --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InvariantLinearLaunch:
    """How a product is cut, whatever its rows."""

    block_m: int  # rows of a program
    block_n: int  # outputs of a program
    block_k: int  # columns at a time
    num_warps: int
    num_stages: int


BLOCK_M = 64  # one warp group's rows
ENOUGH_PROGRAMS = 64  # of one tile of rows: a decode has no more, and its weights are read by all of them together


def choose_invariant_linear(num_outputs: int, gated: bool, itemsize: int) -> InvariantLinearLaunch:
    """Wide tiles where there are outputs enough for them. The number of rows has no say: that is the whole promise."""
    widest = 128 // (2 if gated else 1) // (2 if itemsize == 4 else 1)
    block_n = widest
    while block_n > 32 and ceil_div(num_outputs, block_n) < ENOUGH_PROGRAMS:
        block_n //= 2
    if itemsize == 4:  # IEEE fp32 dots run on the FMA units and keep both operands in registers
        return InvariantLinearLaunch(BLOCK_M, block_n, block_k=32, num_warps=4, num_stages=2)
    return InvariantLinearLaunch(BLOCK_M, block_n, block_k=64, num_warps=4, num_stages=4)


def _product(out: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, adds: bool) -> None:
    """Values [T, K] times weight [N, K] into out, or added to it."""
    rows, size = values.shape
    num_outputs = out.shape[1]
    if not out.numel():
        return
    cut = choose_invariant_linear(num_outputs, gated, values.element_size())
    overlap = overlaps(values.device)
    sizes = (num_outputs, out.stride(0), values.stride(0))
    constants = (size, cut.block_m, cut.block_n, cut.block_k, bias is not None, gated, adds, overlap)
    launch = launch_invariant_linear.prepare(
        (values.dtype, specialized(sizes), constants),
        (ceil_div(rows, cut.block_m), ceil_div(num_outputs, cut.block_n)),
        values.device,
        (rows, *sizes, *constants),
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        launch_pdl=overlap,
    )
    launch((out, values, weight, bias))


def norm_linear(
    values: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None, gated: bool
) -> Tensor:
    """rms_norm(values) [T, K] times weight [N, K]; gated: [T, N / 2], silu of the first half times the second."""
    out = values.new_empty((values.shape[0], weight.shape[0] // (2 if gated else 1)))
    _product(out, layers.rms_norm(values, norm_weight, eps), weight, bias, gated, adds=False)
    return out


def add_linear(residual: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Add values [T, K] times weight [N, K] to residual [T, N] in place."""
    _product(residual, values, weight, bias, gated=False, adds=True)


launch_invariant_linear = Launcher(invariant_linear_kernel)
