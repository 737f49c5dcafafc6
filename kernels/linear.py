"""Matrix products with what is around them. For a few rows, as long as they are bound by the weights' bytes: one launch
of a kernel of ours. For more, where weights are small and the GPU is a Hopper, that of ``hopper_linear.py``. Else the
vendor's.

A product with few rows reads its weights and does little else. Weights depend on nothing, so a program asks for its
own, BLOCK_N whole rows of the matrix, before it waits for the kernel ahead: that one's end, this one's start
and the memory's latency overlap. And the norm before the product, the gate behind it, or the residual that it is added
to cost no launch of their own. Norms are a factor of the sum, so nothing is rounded before the product.

Memory: values [T, K], weight [N, K], dense; a gated product has the gates' rows first, then as many others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pagedattn.kernels import layers
from pagedattn.kernels.launcher import ALIGNMENT, Launcher, specialized
from pagedattn.kernels.layers import silu
from pagedattn.kernels.overlap import is_hopper, let_next_start, overlaps, wait_for_previous
from pagedattn.kernels.tiling import next_power_of_2


@triton.jit
def columns(BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr):
    """The columns of pieces [CHUNKS * BLOCK_N, LANES] of rows: piece i is chunk i // BLOCK_N of row i % BLOCK_N.

    The compiler spreads warps over LANES first, then over pieces in turn. So with LANES of one warp each warp has rows
    of its own, and no sum crosses warps; with LANES of all warps a thread has a bit of each row, and needs but one of
    the values.
    """
    return tl.arange(0, CHUNKS * BLOCK_N)[:, None] // BLOCK_N * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def load_rows(
    weight_ptr, first_row, num_rows, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N whole rows of a matrix in pieces, zero where there is nothing. Nobody reads them again."""
    row = (first_row + tl.arange(0, CHUNKS * BLOCK_N) % BLOCK_N)[:, None]
    column = columns(BLOCK_N, CHUNKS, LANES)
    mask = (row < num_rows) & (column < SIZE)
    return tl.load(weight_ptr + row.to(tl.int64) * SIZE + column, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_row(row_ptr, size, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr):
    """``size`` elements of one row, in the layout of ``load_rows``."""
    column = columns(BLOCK_N, CHUNKS, LANES)
    return tl.load(row_ptr + column, mask=column < size, other=0.0)


@triton.jit
def sum_rows(pieces, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr):
    """The sums of BLOCK_N rows: first of what a thread holds, then across lanes."""
    return tl.sum(tl.sum(tl.reshape(pieces, (CHUNKS, BLOCK_N, LANES)), axis=0), axis=1)


@triton.jit(do_not_specialize=["num_rows"])
def few_rows_linear_kernel(
    out_ptr,
    values_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    eps,
    num_rows,
    num_outputs,
    stride_out,
    stride_values,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    first = tl.program_id(0) * BLOCK_N
    output = first + tl.arange(0, BLOCK_N)
    exists = output < num_outputs
    weight = load_rows(weight_ptr, first, num_outputs, SIZE, BLOCK_N, CHUNKS, LANES)
    if GATED:
        others = load_rows(
            weight_ptr + num_outputs.to(tl.int64) * SIZE, first, num_outputs, SIZE, BLOCK_N, CHUNKS, LANES
        )  # fmt: skip
    if HAS_NORM:
        norm_weight = load_row(norm_weight_ptr, SIZE, BLOCK_N, CHUNKS, LANES)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + output, mask=exists, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    for row in tl.static_range(ROWS):
        is_row = num_rows > row
        values = load_row(values_ptr + row * stride_values, tl.where(is_row, SIZE, 0), BLOCK_N, CHUNKS, LANES)
        values = values.to(tl.float32)
        factor = 1.0
        if HAS_NORM:
            factor = 1.0 / tl.sqrt_rn(sum_rows(values * values, BLOCK_N, CHUNKS, LANES) / SIZE + eps)
            values *= norm_weight.to(tl.float32)
        result = sum_rows(weight.to(tl.float32) * values, BLOCK_N, CHUNKS, LANES) * factor
        if HAS_BIAS:
            result += bias
        if GATED:
            result = silu(result) * (sum_rows(others.to(tl.float32) * values, BLOCK_N, CHUNKS, LANES) * factor)
        row_ptr = out_ptr + row * stride_out + output
        written = output < tl.where(is_row, num_outputs, 0)
        if ADDS:
            result += tl.load(row_ptr, mask=written, other=0.0).to(tl.float32)
        tl.store(row_ptr, result.to(out_ptr.dtype.element_ty), mask=written)


# --- launching --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearLaunch:
    """How a product with a few rows is cut."""

    rows: int  # at the most
    block_n: int  # outputs of a program
    lanes: int  # columns that lie side by side over threads; the others a thread takes one after the other
    chunks: int
    num_warps: int


FEW_ROWS = 4
MAX_PRODUCTS = 1 << 23  # of several rows: past it the arithmetic takes longer than the vendor's tensor cores
MAX_PROGRAMS = 8192  # past it the vendor's products read faster
WARP_LANES = 256  # a warp's loads of 8 weights a thread
WEIGHTS_PER_THREAD = 64  # asked for at once


def choose_linear_launch(num_rows: int, num_outputs: int, size: int, gated: bool) -> LinearLaunch | None:
    """None: leave it to others. Few outputs are spread over many programs."""
    matrices = 2 if gated else 1
    rows = next_power_of_2(max(1, num_rows))
    if not 0 < num_rows <= FEW_ROWS or (rows > 1 and rows * matrices * num_outputs * size > MAX_PRODUCTS):
        return None
    padded = max(WARP_LANES, next_power_of_2(size))
    per_output = matrices * padded // 32  # of a thread, if an output has one warp
    block_n = 4 if per_output <= 2 * WEIGHTS_PER_THREAD else 2
    if num_outputs > MAX_PROGRAMS * block_n:
        return None
    num_warps = max(4, min(16, block_n * per_output // WEIGHTS_PER_THREAD))
    lanes = WARP_LANES if num_warps <= block_n else min(padded, WARP_LANES * num_warps)
    return LinearLaunch(rows, block_n, lanes, padded // lanes, num_warps)


def _few_rows_linear(
    cut: LinearLaunch,
    out: Tensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    gated: bool,
    adds: bool,
) -> None:
    """Rows [T, K], T at most ``cut.rows``, times weight [N, K] into out."""
    rows, size = values.shape
    num_outputs = out.shape[1]
    overlap = overlaps(values.device)
    sizes = (num_outputs, out.stride(0), values.stride(0))
    constants = (
        cut.rows, size, cut.block_n, cut.chunks, cut.lanes,
        bias is not None, norm_weight is not None, gated, adds, overlap,
    )  # fmt: skip
    launch = launch_linear.prepare(
        (values.dtype, specialized(sizes), constants, cut),
        (-(-num_outputs // cut.block_n), 1),
        values.device,
        (eps, rows, *sizes, *constants),
        num_warps=cut.num_warps,
        launch_pdl=overlap,
    )
    launch((out, values, weight, bias, norm_weight))


def _small_product(values: Tensor, num_outputs: int, weight: Tensor, gated: bool) -> Callable[..., None] | None:
    """The Hopper kernel's launch, where it serves a product."""
    is_served = values.dtype != torch.float32 and values.stride(0) % 8 == 0 and is_hopper(values.device)
    if not is_served or (values.data_ptr() | weight.data_ptr()) % ALIGNMENT:
        return None
    from pagedattn.kernels import hopper_linear

    cut = hopper_linear.choose_hopper_linear(values.shape[0], num_outputs, values.shape[1], gated)
    return None if cut is None else partial(hopper_linear.hopper_linear, cut)


def norm_linear(
    values: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None, gated: bool
) -> Tensor:
    """rms_norm(values) [T, K] times weight [N, K]; gated: [T, N / 2], silu of the first half times the second."""
    num_outputs = weight.shape[0] // (2 if gated else 1)
    cut = choose_linear_launch(values.shape[0], num_outputs, values.shape[1], gated)
    if cut is not None:
        out = values.new_empty((values.shape[0], num_outputs))
        _few_rows_linear(cut, out, values, weight, bias, norm_weight, eps, gated, adds=False)
        return out
    normed = layers.rms_norm(values, norm_weight, eps)
    small = _small_product(normed, num_outputs, weight, gated)
    if small is not None:
        out = values.new_empty((values.shape[0], num_outputs))
        small(out, normed, weight, bias, gated, False)
        return out
    product = F.linear(normed, weight, bias)
    return layers.silu_and_mul(product) if gated else product


def add_linear(residual: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Add values [T, K] times weight [N, K] to residual [T, N] in place."""
    cut = choose_linear_launch(values.shape[0], weight.shape[0], values.shape[1], gated=False)
    if cut is not None:
        _few_rows_linear(cut, residual, values, weight, bias, None, 0.0, gated=False, adds=True)
        return
    small = _small_product(values, weight.shape[0], weight, gated=False)
    if small is not None:
        small(residual, values, weight, bias, False, True)
    elif bias is None:
        residual.addmm_(values, weight.t())
    else:
        residual += F.linear(values, weight, bias)


launch_linear = Launcher(few_rows_linear_kernel)
