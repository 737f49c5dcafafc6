"""Launching a Triton kernel at the cost of the launch.

``kernel[grid](...)`` works out on every call which compiled variant its arguments need; with sixty arguments that
costs more host time than the kernel costs device time. A ``Launcher`` is told: the key of a ``Launch`` holds all that
the compiled code may depend on (constants, strides, dtypes; the pointers' alignment is added), so that one with a key
seen before goes straight to the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import reduce
from inspect import signature
from operator import or_
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; Triton compiles other code for pointers that are not its multiples
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def specialized(integers: tuple[int, ...]) -> tuple[Hashable, ...]:
    """What compiled code may depend on of integer arguments: Triton tells 1 and multiples of 16 from all others."""
    return tuple((integer == 1, integer % ALIGNMENT == 0, integer < 1 << 31) for integer in integers)


class Descriptors:
    """What the copy engine reads of a launch's caches, as Triton takes it, and encoded once it has been."""

    __slots__ = ("encoded", "given")

    def __init__(self, *given: Any) -> None:
        self.given = given
        self.encoded: list[Any] | None = None


class DirectLaunch:
    """Triton 3.6's own launcher, for descriptors that are encoded: encoding them costs more than all else of a launch,
    and Triton does it every time."""

    __slots__ = ("_encode", "_flags", "_launch", "_metadata")

    def __init__(self, launch: Callable[..., None], encode: Callable[..., list[Any]], kernel: Any) -> None:
        self._launch = launch
        self._encode = encode
        self._metadata = kernel.metadata.tensordesc_meta
        self._flags = (kernel.run.launch_cooperative_grid, kernel.run.launch_pdl, None, None)

    @classmethod
    def of(cls, kernel: Any) -> DirectLaunch | None:
        """None where Triton's launcher is built otherwise, or needs scratch memory."""
        run = kernel.run
        wrapper: Any = getattr(run, "launch", None)
        names = getattr(getattr(wrapper, "__code__", None), "co_freevars", ())
        if "launcher" not in names or run.global_scratch_size or run.profile_scratch_size:
            return None
        from triton.backends.nvidia import driver

        encode = getattr(driver, "make_tensordesc_arg", None)
        if encode is None or len(signature(encode).parameters) != 2:
            return None
        return cls(wrapper.__closure__[names.index("launcher")].cell_contents, encode, kernel)

    def __call__(self, place: tuple[Any, ...], metadata: Any, descriptors: Descriptors, arguments: list[Any]) -> None:
        """place: the grid, the stream and the function."""
        if descriptors.encoded is None:
            described = zip(descriptors.given, self._metadata, strict=True)
            descriptors.encoded = [part for one, layout in described for part in self._encode(one, layout)]
        self._launch(*place, *self._flags, metadata, None, None, None, *descriptors.encoded, *arguments)


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

    def __call__(self, tensors: tuple[Tensor | None, ...], descriptors: Descriptors | None = None) -> None:
        """Launch with ``descriptors`` and then ``tensors`` as the kernel's leading parameters."""
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
            direct = None if descriptors is None else DirectLaunch.of(kernel)
            self._compiled[variant] = (kernel.run, kernel.function, kernel.packed_metadata, direct)
            return
        run, function, metadata, direct = compiled
        place = (*self._programs, 1, torch._C._cuda_getCurrentRawStream(device), function)
        if descriptors is None:
            run(*place, metadata, None, None, None, *pointers, *self._sizes)
        elif direct is None:
            run(*place, metadata, None, None, None, *descriptors.given, *pointers, *self._sizes)
        else:
            direct(place, metadata, descriptors, [*pointers, *self._sizes])

    def _compile(self, tensors: tuple[Tensor | None, ...], descriptors: Descriptors | None) -> Any:
        """Launch through Triton, which compiles the kernel for arguments of this kind if it has not before."""
        if self._sees_bits:
            tensors = tuple(
                tensor.view(torch.uint8) if tensor is not None and tensor.dtype in FLOAT8_DTYPES else tensor
                for tensor in tensors
            )
        given = () if descriptors is None else descriptors.given
        return self._kernel[self._programs](*given, *tensors, *self._sizes, **self._options)


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
