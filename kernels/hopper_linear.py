"""Small matrix products for Hopper, in Gluon: 5 to 128 rows times weights of a few megabytes, bound by latency.

Such a product takes a few microseconds, most of which are a launch, the memory's latency and a drain. A thread block
has 64 rows and a few outputs, and one warp group. What it needs of the weights depends on nothing, so it asks the copy
engine (TMA) for all of it that fits into its ring of STAGES chunks before it waits for the kernel ahead, and then for
the values; in the loop there is nothing left but products. The gate behind a product or the residual that it is added
to cost no launch of their own.

Memory: values [T, K], weight [N, K], rows of both 16-byte aligned; a gated product has the gates' rows first, then as
many others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pagedattn.kernels.hopper_decode import Address, fetch, swizzled_layout, wait_for_launches_before
from pagedattn.kernels.launcher import Descriptors, Launcher, specialized

BLOCK_M = gl.constexpr(64)  # rows of a warp group's product
BLOCK_K = gl.constexpr(64)  # of a chunk: rows of one swizzle


@gluon.jit
def fetch_weights(
    descriptor, first_output, first_other, chunk, barrier, weights, others, BLOCK_N: gl.constexpr, GATED: gl.constexpr
):  # fmt: skip
    """Ask for a chunk of the weights. The barrier is told of the values' bytes too."""
    mbarrier.expect(barrier, (BLOCK_M + BLOCK_N * (2 if GATED else 1)) * BLOCK_K * 2)
    fetch(descriptor, [first_output, chunk * BLOCK_K], barrier, weights)
    if GATED:
        fetch(descriptor, [first_other, chunk * BLOCK_K], barrier, others)


@gluon.jit
def silu(x):
    """As ``kernels.layers.silu``."""
    return x / (1.0 + gl.exp(-x))


@gluon.jit(do_not_specialize=["num_rows", "num_outputs"])
def hopper_linear_kernel(
    values_descriptor,
    weight_descriptor,
    out_ptr,
    bias_ptr,
    num_rows,
    num_outputs,
    stride_out,
    BLOCK_N: gl.constexpr,
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    ADDS: gl.constexpr,
):
    DTYPE: gl.constexpr = values_descriptor.dtype
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    first_output = gl.program_id(0) * BLOCK_N
    first_row = gl.program_id(1) * BLOCK_M
    values = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_K], values_descriptor.layout)
    weights = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, BLOCK_K], weight_descriptor.layout)
    others = weights
    if GATED:
        others = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, BLOCK_K], weight_descriptor.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    for stage in gl.static_range(STAGES):
        fetch_weights(
            weight_descriptor, first_output, num_outputs + first_output, stage, full.index(stage),
            weights.index(stage), others.index(stage), BLOCK_N, GATED,
        )  # fmt: skip
    row = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, RESULT))
    output = first_output + gl.arange(0, BLOCK_N, gl.SliceLayout(0, RESULT))
    exists = (row < num_rows)[:, None] & (output < num_outputs)[None, :]
    out_ptrs = out_ptr + row.to(gl.int64)[:, None] * stride_out + output[None, :]
    wait_for_launches_before()
    for stage in gl.static_range(STAGES):
        fetch(values_descriptor, [first_row, stage * BLOCK_K], full.index(stage), values.index(stage))
    result = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, RESULT)
    if GATED:
        through = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, RESULT)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + output, mask=output < num_outputs, other=0.0).to(gl.float32)
        result += bias[None, :]
    if ADDS:
        result += gl.load(out_ptrs, mask=exists, other=0.0).to(gl.float32)

    for chunk in gl.static_range(CHUNKS):
        mbarrier.wait(full.index(chunk % STAGES), chunk // STAGES % 2)
        result = warpgroup_mma(
            values.index(chunk % STAGES), weights.index(chunk % STAGES).permute((1, 0)), result, is_async=True
        )
        if GATED:
            through = warpgroup_mma(
                values.index(chunk % STAGES), others.index(chunk % STAGES).permute((1, 0)), through, is_async=True
            )
        if chunk + STAGES < CHUNKS:
            result = warpgroup_mma_wait(0, deps=[result])
            if GATED:
                through = warpgroup_mma_wait(0, deps=[through])
            fetch_weights(
                weight_descriptor, first_output, num_outputs + first_output, chunk + STAGES, full.index(chunk % STAGES),
                weights.index(chunk % STAGES), others.index(chunk % STAGES), BLOCK_N, GATED,
            )  # fmt: skip
            fetch(
                values_descriptor,
                [first_row, (chunk + STAGES) * BLOCK_K],
                full.index(chunk % STAGES),
                values.index(chunk % STAGES),
            )
    result = warpgroup_mma_wait(0, deps=[result])
    if GATED:
        through = warpgroup_mma_wait(0, deps=[through])
        result = silu(result) * through
    gl.store(out_ptrs, result.to(DTYPE), mask=exists)


# --- launching --------------------------------------------------------------------------------------------------------

MAX_ROWS = 128  # with 256 the vendor's are as fast (docs/kernel-notes.md)
MAX_SIZE = 2048  # of a sum, as the loop over it is unrolled
MAX_WEIGHTS = 1 << 22  # elements; more are bound by bytes or arithmetic, which the vendor's products are better at
MULTIPROCESSORS = 132  # thread blocks that run at a time where each takes most of the shared memory
SHARED_MEMORY = 225_280  # bytes, of the 232,448 that a thread block may use


@dataclass(frozen=True)
class HopperLinearLaunch:
    """How a small product is cut."""

    block_n: int  # outputs of a thread block
    chunks: int
    stages: int
    programs: tuple[int, int]


def choose_hopper_linear(num_rows: int, num_outputs: int, size: int, gated: bool) -> HopperLinearLaunch | None:
    """None: leave it to the vendor. ``num_outputs``: those of the result."""
    matrices = 2 if gated else 1
    if not 0 < num_rows <= MAX_ROWS or matrices * num_outputs * size > MAX_WEIGHTS or size > MAX_SIZE or size % 8:
        return None
    row_tiles = -(-num_rows // BLOCK_M.value)
    block_n = next((n for n in (16, 32) if -(-num_outputs // n) * row_tiles <= MULTIPROCESSORS), 64)
    chunks = -(-size // BLOCK_K.value)
    stage_bytes = (BLOCK_M.value + matrices * block_n) * BLOCK_K.value * 2
    stages = min(chunks, SHARED_MEMORY // stage_bytes)
    return HopperLinearLaunch(block_n, chunks, stages, (-(-num_outputs // block_n), row_tiles))


def hopper_linear(
    cut: HopperLinearLaunch,
    out: Tensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gated: bool,
    adds: bool,
) -> None:
    """Values [T, K] times weight [N, K] into out, or added to it."""
    sizes = (values.shape[0], out.shape[1], out.stride(0))
    constants = (cut.block_n, cut.chunks, cut.stages, bias is not None, gated, adds)
    launch = launch_hopper_linear.prepare(
        (values.dtype, specialized(sizes[2:]), constants),
        cut.programs,
        values.device,
        (*sizes, *constants),
        num_warps=4,
        launch_pdl=True,
    )
    place = (values.data_ptr(), values.shape, values.stride(0), weight.data_ptr(), weight.shape)
    launch((out, bias), describe(*place, cut.block_n, values.dtype))


@lru_cache(maxsize=4096)
def describe(
    values: int,
    values_shape: tuple[int, int],
    stride: int,
    weight: int,
    shape: tuple[int, int],
    block_n: int,
    dtype: torch.dtype,
) -> Descriptors:
    """What the copy engine needs to know of a product's operands, which are at these addresses."""
    layout = swizzled_layout(BLOCK_K.value * 2, 16)
    return Descriptors(
        TensorDescriptor(Address(values, dtype), [*values_shape], [stride, 1], [BLOCK_M.value, BLOCK_K.value], layout),
        TensorDescriptor(Address(weight, dtype), [*shape], [shape[1], 1], [block_n, BLOCK_K.value], layout),
    )


launch_hopper_linear = Launcher(hopper_linear_kernel)
