"""Launching a Triton kernel at the cost of the launch.

``kernel[grid](...)`` works out on every call which compiled variant its arguments need; with forty arguments that costs more
host time than the kernel costs device time. A ``Launcher`` is told: its key holds all that the compiled code may depend on
(constants, strides, alignment of pointers, dtypes), so that calls with a key seen before go straight to the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor


class Launcher:
    """Compiled variants of one kernel by key."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self,
        key: tuple[Hashable, ...],
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        *,
        device: torch.device,
        **options: int,
    ) -> None:
        """Launch on ``device``'s current stream. ``arguments`` are all of the kernel's parameters, in its order."""
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(key, grid, arguments, device=device, **options)
            return
        compiled = self._compiled.get((device, key))
        if compiled is None:
            compiled = self._kernel[grid](*arguments, **options)
            if compiled is not None:  # under the interpreter there is nothing to keep
                self._compiled[device, key] = compiled
        else:
            compiled[grid](*arguments)


def is_aligned(*tensors: Tensor) -> tuple[bool, ...]:
    """Whether each tensor starts on 16 bytes, which Triton's pointers are specialized on."""
    return tuple([tensor.data_ptr() % 16 == 0 for tensor in tensors])
