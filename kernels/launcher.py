"""Launching a Triton kernel at the cost of the launch.

``kernel[grid](...)`` works out on every call which compiled variant its arguments need; with forty arguments that
costs more host time than the kernel costs device time. A ``Launcher`` is told: its key holds all that the compiled
code may depend on (constants, strides, alignment of pointers, dtypes), so that calls with a key seen before go
straight to the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor


class Launcher:
    """Compiled variants of one kernel by key. Triton's launch hooks see the first launch of a variant only."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, tuple[Any, Any, Any]] = {}

    def __call__(
        self,
        key: tuple[Hashable, ...],
        programs: tuple[int, int],
        tensors: tuple[Tensor | None, ...],
        device: torch.device,
        sizes: tuple[Any, ...],
        *,
        num_warps: int,
        num_stages: int = 3,
    ) -> None:
        """Launch on the device's current stream.

        Args:
            key: all that the compiled code may depend on, except the device and the alignment of the tensors.
            programs: the grid.
            tensors: the kernel's leading parameters.
            device: theirs.
            sizes: all of its other parameters, constexprs included, in its order.
        """
        if device.type != "cuda":
            self._kernel[programs](*tensors, *sizes, num_warps=num_warps, num_stages=num_stages)
            return
        if device.index != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self(key, programs, tensors, device, sizes, num_warps=num_warps, num_stages=num_stages)
            return
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        alignment = [pointer % 16 == 0 for pointer in pointers]
        full_key = (device.index, key, *alignment)
        compiled = self._compiled.get(full_key)
        if compiled is None:
            kernel = self._kernel[programs](*tensors, *sizes, num_warps=num_warps, num_stages=num_stages)
            self._compiled[full_key] = (kernel.run, kernel.function, kernel.packed_metadata)
            return
        run, function, metadata = compiled
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        run(*programs, 1, stream, function, metadata, None, None, None, *pointers, *sizes)
