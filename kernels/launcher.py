"""Launching a Triton kernel at the cost of the launch.

``kernel[grid](...)`` works out on every call which compiled variant its arguments need; with sixty arguments that
costs more host time than the kernel costs device time. A ``Launcher`` is told: the key of a ``Launch`` holds all that
the compiled code may depend on (constants, strides, dtypes; the pointers' alignment is added), so that one with a key
seen before goes straight to the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; Triton compiles other code for pointers that are not its multiples
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def specialized(integers: tuple[int, ...]) -> tuple[Hashable, ...]:
    """What compiled code may depend on of integer arguments: Triton tells 1 and multiples of 16 from all others."""
    return tuple((integer == 1, integer % ALIGNMENT == 0, integer < 1 << 31) for integer in integers)


class Launch:
    """A kernel with all of its arguments but the tensors. Call it with those, on their device's current stream."""

    __slots__ = ("_compiled", "_device", "_kernel", "_options", "_programs", "_sees_bits", "_sizes")

    def __init__(
        self,
        kernel: Any,
        compiled: dict[Hashable, Any],
        programs: tuple[int, int],
        device: torch.device,
        sizes: tuple[Any, ...],
        sees_bits: bool,
        options: dict[str, Any],
    ) -> None:
        self._kernel = kernel
        self._compiled = compiled
        self._programs = programs
        self._device: int | None = device.index
        self._sizes = sizes
        self._sees_bits = sees_bits
        self._options = options

    def __call__(self, tensors: tuple[Tensor | None, ...], descriptors: tuple[Any, ...] = ()) -> None:
        """Launch with ``descriptors``, which the copy engine reads, and ``tensors`` as the leading parameters."""
        device = self._device
        if device is None:  # the interpreter's, on a CPU
            self._compile(tensors, descriptors)
            return
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self(tensors, descriptors)
            return
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        variant: Hashable = reduce(or_, pointers) % ALIGNMENT
        if variant:
            variant = tuple(pointer % ALIGNMENT == 0 for pointer in pointers)
        compiled = self._compiled.get(variant)
        if compiled is None:
            kernel = self._compile(tensors, descriptors)
            self._compiled[variant] = (kernel.run, kernel.function, kernel.packed_metadata)
            return
        run, function, metadata = compiled
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(*self._programs, 1, stream, function, metadata, None, None, None, *descriptors, *pointers, *self._sizes)

    def _compile(self, tensors: tuple[Tensor | None, ...], descriptors: tuple[Any, ...]) -> Any:
        """Launch through Triton, which compiles the kernel for arguments of this kind if it has not before."""
        if self._sees_bits:
            tensors = tuple(
                tensor.view(torch.uint8) if tensor is not None and tensor.dtype in FLOAT8_DTYPES else tensor
                for tensor in tensors
            )
        return self._kernel[self._programs](*descriptors, *tensors, *self._sizes, **self._options)


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
        sees_bits: bool = False,
        **options: Any,
    ) -> Launch:
        """Prepare a launch.

        Args:
            key: all that the compiled code may depend on, except the device and the alignment of the tensors; a tensor
                that is None here and there among launches must be told by it.
            programs: the grid.
            device: the tensors'.
            sizes: all parameters after the tensors, constexprs included, in the kernel's order. Triton's own launcher
                skips the constants, but in every version it wants them in their places.
            sees_bits: hand fp8 tensors to the kernel as uint8.
            options: ``num_warps`` and other compiler options.
        """
        compiled = self._variants.setdefault((device.index, sees_bits, key), {})
        return Launch(self._kernel, compiled, programs, device, sizes, sees_bits, options)
