"""Faults for ``tests/sanitizer.py`` to catch: ``python -m tests.planted_fault bounds | race | uninitialized``.

A tool that finds nothing in the kernels has to find these. ``bounds`` is ``append_kv`` with a slot a block past its
cache; the others are kernels of their own, for which ours give no handle.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

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


if __name__ == "__main__":
    {"bounds": bounds, "race": race, "uninitialized": uninitialized}[sys.argv[1]]()
    torch.cuda.synchronize()
