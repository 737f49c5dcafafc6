"""A small Gluon kernel in which partitions hand tiles to each other by all means of our kernels, with a fault if asked.

A producer fills a ring of tiles, half by the copy engine alone and half with stores behind it; a third partition copies
a matrix of ones by its threads; the consumer sums up the tiles' rows by products with the ones.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pagedattn.kernels.hopper_decode import LANES, fetch
from pagedattn.kernels.hopper_prefill import copy

ROWS = gl.constexpr(64)
SIZE = gl.constexpr(64)
STAGES = gl.constexpr(2)


@gluon.jit
def produce(matrix, tiles, full, empty, landed, TILES: gl.constexpr, FAULT: gl.constexpr):
    """Fill the ring; every other tile waits for its copy here, and is written over by stores."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    for number in gl.static_range(TILES):
        stage = number % STAGES
        if FAULT != "overwritten before it is empty":
            mbarrier.wait(empty.index(stage), number // STAGES % 2 ^ 1)
        if number % 2 == 0:
            mbarrier.expect(full.index(stage), ROWS * SIZE * 2)
            fetch(matrix, [number * ROWS, 0], full.index(stage), tiles.index(stage))
        else:
            mbarrier.expect(landed, ROWS * SIZE * 2)
            fetch(matrix, [number * ROWS, 0], landed, tiles.index(stage))
            if FAULT != "written before its copy has ended":
                mbarrier.wait(landed, number // 2 % 2)
            last_rows = tiles.index(stage).slice(ROWS // 2, ROWS // 2)
            last_rows.store(gl.full([ROWS // 2, SIZE], 2.0, gl.float16, LAYOUT))
            if FAULT != "stored without a fence":
                fence_async_shared()
            mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def consume(out_ptr, ones, tiles, ones_full, full, empty, TILES: gl.constexpr, FAULT: gl.constexpr):
    """Sum up the tiles' rows by products with ones, two of which are under way at a time."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, SIZE, gl.SliceLayout(0, LAYOUT))
    mbarrier.wait(ones_full, 0)
    if FAULT != "copied by threads without a fence":
        fence_async_shared()
    sums = gl.zeros([ROWS, SIZE], gl.float32, LAYOUT)
    last = gl.zeros([ROWS, SIZE], gl.float32, LAYOUT)
    for number in gl.static_range(TILES):
        stage = number % STAGES
        if FAULT != "read before it is full":
            mbarrier.wait(full.index(stage), number // STAGES % 2)
        started = warpgroup_mma(ones, tiles.index(stage), sums, is_async=True)
        if number > 0:
            if FAULT != "released before the product is waited for":
                last = warpgroup_mma_wait(1, deps=[last])
            mbarrier.arrive(empty.index((number - 1) % STAGES), count=1)
        sums, last = last, started
    last = warpgroup_mma_wait(0, deps=[last])
    gl.store(out_ptr + row[:, None] * SIZE + column[None, :], sums + last)


@gluon.jit
def bring(ones_ptr, ones, ones_full, FAULT: gl.constexpr):
    """Copy by threads."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, SIZE, gl.SliceLayout(0, LAYOUT))
    copy(ones, ones_ptr + row[:, None] * SIZE + column[None, :])
    async_copy.mbarrier_arrive(ones_full, increment_count=False)
    if FAULT == "read by who copies before it has ended":
        ones.store(ones.load(LAYOUT))


@gluon.jit
def handover_kernel(matrix, out_ptr, ones_ptr, TILES: gl.constexpr, FAULT: gl.constexpr):
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ones = gl.allocate_shared_memory(gl.float16, [ROWS, SIZE], swizzled)
    tiles = gl.allocate_shared_memory(gl.float16, [STAGES, ROWS, SIZE], swizzled)
    ones_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    unread = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ones_full, count=LANES)
    mbarrier.init(landed, count=1)
    mbarrier.init(unread, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    gl.warp_specialize(
        [
            (consume, (out_ptr, ones, tiles, ones_full, full, empty, TILES, FAULT)),
            (produce, (matrix, tiles, full, empty, landed, TILES, FAULT)),
            (bring, (ones_ptr, ones, ones_full, FAULT)),
        ],
        [1, 1],
        [24, 24],
    )
    # The partitions have ended, so what the consumer has read is free.
    mbarrier.expect(unread, ROWS * SIZE * 2)
    fetch(matrix, [0, 0], unread, ones)
    if FAULT != "still being copied as the block ends":
        mbarrier.wait(unread, 0)
