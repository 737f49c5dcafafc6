"""To the device and back without waiting for it: ``Upload``, what a step says in one copy; single tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 4  # words; kernels are compiled for pointers to 16 bytes
_FIRST_CAPACITY = 1 << 16  # words
# One is read by the device while the next is written, and one may be of a launch that failed: who writes to a buffer
# again has waited for a step behind its last copy.
_NUM_BUFFERS = 3


class Upload:
    """int32 arrays to ``device`` through pinned memory. At most two steps may be under way at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [_allocate(_FIRST_CAPACITY, device) for _ in range(_NUM_BUFFERS)]
        self._received = torch.empty(_FIRST_CAPACITY, dtype=torch.int32, device=device)
        self._turn = 0

    def send(self, parts: Sequence[np.ndarray]) -> list[Tensor]:
        """The parts on the device, contiguous, good until the next ``send`` reaches the stream."""
        offsets, size = [], 0
        for part in parts:
            offsets.append(size)
            size += -(-part.size // ALIGNMENT) * ALIGNMENT
        self._turn = (self._turn + 1) % _NUM_BUFFERS
        if size > len(self._received):
            self._received = torch.empty(2 * size, dtype=torch.int32, device=self._device)
        if size > len(self._buffers[self._turn]):
            self._buffers[self._turn] = _allocate(2 * size, self._device)
        buffer, received = self._buffers[self._turn], self._received
        words = buffer.numpy()
        for offset, part in zip(offsets, parts, strict=True):
            words[offset : offset + part.size] = part.reshape(-1)
        if size:
            received[:size].copy_(buffer[:size], non_blocking=True)
        return [
            received[offset : offset + part.size].view(part.shape) for offset, part in zip(offsets, parts, strict=True)
        ]


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of ``values`` without waiting for the device."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def to_host(values: Tensor) -> Tensor:
    """A copy of ``values`` that is there once the device has come so far."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda).copy_(values, non_blocking=True)


def _allocate(num_words: int, device: torch.device) -> Tensor:
    return torch.empty(num_words, dtype=torch.int32, pin_memory=device.type == "cuda")
