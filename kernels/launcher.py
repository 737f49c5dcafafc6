"""Launching a Triton kernel at the cost of the launch.

``kernel[grid](...)`` works out on every call which compiled variant its arguments need; with sixty arguments that
costs more host time than the kernel costs device time. A ``Launcher`` is told: the key of a ``Launch`` holds all that
the compiled code may depend on (constants, strides, dtypes; the pointers' alignment is added), so that one with a key
seen before goes straight to the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; Triton compiles other code for pointers that are not its multiples


def specialized(integers: tuple[int, ...]) -> tuple[Hashable, ...]:
    """What compiled code may depend on of integer arguments: Triton tells 1 and multiples of 16 from all others."""
    return tuple((integer == 1, integer % ALIGNMENT == 0, integer < 1 << 31) for integer in integers)


class Launch:
    """A kernel with all of its arguments but the tensors. Call it with those, on their device's current stream."""

    __slots__ = ("_compiled", "_device", "_kernel", "_options", "_programs", "_sizes")

    def __init__(
        self,
        kernel: Any,
        compiled: dict[Hashable, Any],
        programs: tuple[int, int],
        device: torch.device,
        sizes: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        self._kernel = kernel
        self._compiled = compiled
        self._programs = programs
        self._device = device
        self._sizes = sizes
        self._options = options

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Launch with ``tensors`` as the kernel's leading parameters."""
        device, programs, sizes = self._device, self._programs, self._sizes
        if device.type != "cuda":
            self._kernel[programs](*tensors, *sizes, **self._options)
            return
        if device.index != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self(tensors)
            return
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        misaligned = 0
        for pointer in pointers:
            misaligned |= pointer % ALIGNMENT
        variant = misaligned and tuple(pointer % ALIGNMENT == 0 for pointer in pointers)
        compiled = self._compiled.get(variant)
        if compiled is None:
            kernel = self._kernel[programs](*tensors, *sizes, **self._options)
            self._compiled[variant] = (kernel.run, kernel.function, kernel.packed_metadata)
            return
        run, function, metadata = compiled
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        run(*programs, 1, stream, function, metadata, None, None, None, *pointers, *sizes)


class Launcher:
    """Compiled variants of one kernel by key. Triton's launch hooks see the first launch of a variant only."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._variants: dict[Hashable, dict[Hashable, Any]] = {}

    def prepare(
        self,
        key: tuple[Hashable, ...],
        programs: tuple[int, int],
        device: torch.device,
        sizes: tuple[Any, ...],
        **options: Any,
    ) -> Launch:
        """Prepare a launch.

        Args:
            key: all that the compiled code may depend on, except the device and the alignment of the tensors; a tensor
                that is None here and there among launches must be told by it.
            programs: the grid.
            device: the tensors'.
            sizes: all parameters after the tensors, constexprs included, in the kernel's order.
            options: ``num_warps`` and other compiler options.
        """
        compiled = self._variants.setdefault((device.index, key), {})
        return Launch(self._kernel, compiled, programs, device, sizes, options)
