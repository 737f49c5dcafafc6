"""Programmatic dependent launch: a kernel starts while the one ahead of it in the stream still runs.

A decode step is hundreds of short kernels, and between two of them a multiprocessor is idle for as long as a launch
takes. A kernel that is launched to overlap may do what depends on nothing; before it reads or writes what others do, it
waits until those ahead have ended and their writes are seen. A kernel ahead that says nothing lets it start at its end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def overlaps(device: torch.device) -> bool:
    """Whether launches on a device may overlap: from Hopper (9.0) on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def is_hopper(device: torch.device) -> bool:
    """Whether a device has what kernels in Gluon are written for: compute capability 9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """The next kernel may start as soon as all programs of this one have said so."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Those ahead have ended, and what they wrote is seen."""
    if OVERLAP:
        gdc_wait()
