"""Faults for ``tests/sanitizer.py`` to catch: ``python -m tests.planted_fault bounds | race | uninitialized``.

A tool that finds nothing in the kernels has to find these. ``bounds`` is ``append_kv`` with a slot a block past its
cache; the others are kernels of their own, for which ours give no handle. A fourth one, ``handover``, is no fault,
but racecheck takes it for one.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

import pagedattn


@triton.jit
def sum_of_unwritten(source_ptr, out_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(out_ptr, tl.sum(tl.load(source_ptr + tl.arange(0, SIZE))))


RACE = r"""
extern "C" __global__ void race(float* out) {
    __shared__ float cell[64];
    cell[threadIdx.x % 64] = threadIdx.x;      // two threads write one cell,
    out[threadIdx.x] = cell[(threadIdx.x + 33) % 64];  // and a third reads it without a barrier
}
"""


def bounds() -> None:
    rows = torch.randn(1, 2, 64, device="cuda", dtype=torch.float16)
    caches = torch.zeros(2, 4, 16, 2, 64, device="cuda", dtype=torch.float16).unbind()
    pagedattn.append_kv(rows, rows, caches[1], caches[1], torch.tensor([4 * 16 + 3], device="cuda"))


def race() -> None:
    out = torch.zeros(128, device="cuda")
    torch.cuda._compile_kernel(RACE, "race")(grid=(1, 1, 1), block=(128, 1, 1), args=(out,))


def uninitialized() -> None:
    sum_of_unwritten[(1,)](torch.empty(1024, device="cuda"), torch.zeros(1, device="cuda"), 1024)


@gluon.jit
def give(word, full, empty, count):  # type: ignore[no-untyped-def]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for number in range(count):
        mbarrier.wait(empty, number % 2 ^ 1)
        word.store(gl.full([1], number, gl.int32, LAYOUT))
        mbarrier.arrive(full, count=1)


@gluon.jit
def take(out_ptr, word, full, empty, count):  # type: ignore[no-untyped-def]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    total = 0
    for number in range(count):
        mbarrier.wait(full, number % 2)
        total += gl.max(word.load(LAYOUT), 0)
        mbarrier.arrive(empty, count=1)
    gl.store(out_ptr, total)


@gluon.jit
def hand_over(out_ptr, count):  # type: ignore[no-untyped-def]
    word = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=1)
    gl.warp_specialize([(take, (out_ptr, word, full, empty, count)), (give, (word, full, empty, count))], [1], [40])


def handover() -> None:
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    hand_over[(1,)](out, 20, num_warps=4)
    assert int(out) == sum(range(20))


if __name__ == "__main__":
    {"bounds": bounds, "race": race, "uninitialized": uninitialized, "handover": handover}[sys.argv[1]]()
    torch.cuda.synchronize()
