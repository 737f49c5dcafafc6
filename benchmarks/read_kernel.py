"""A kernel that reads and does nothing else: the bandwidth that decode attention is held against."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16384  # elements of a program, in loads of 16 bytes


@triton.jit
def read_kernel(source_ptr, sums_ptr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    values = tl.load(source_ptr + program * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums_ptr + program, tl.sum(values))


def read(source: Tensor, sums: Tensor) -> None:
    """Read a flat 16-bit tensor whole; ``sums`` (fp32) keeps a number of each program, so that the loads are wanted."""
    words = source.view(torch.int32)
    programs = words.numel() // BLOCK
    read_kernel[(programs,)](words, sums.view(torch.int32), BLOCK=BLOCK, num_warps=8)
