"""Eager calls whose like has passed all checks: they are made again without the dispatcher and without the checks.

Checks, tiling and a launch's constants follow from host numbers and from the tensors' metadata alone. The host numbers
are a key; the metadata is compared by ``TensorGuards``, with which ``torch.compile`` guards its graphs: one C++ call
for all tensors, where reading four attributes of each in Python costs several microseconds. It compares class,
dispatch keys, dtype, device, shape and strides. The dispatch keys include what modes, transforms and tracers add for
the current thread, so that under any of these no call is found that was remembered outside of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # not a public interface: without it calls take the dispatcher's way, which is right and slower
    TensorGuards = None  # type: ignore[assignment, misc]
try:
    from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]
except ImportError:
    _empty_strided_cuda = None

MAX_KEYS = 4096  # a decode loop makes a new one each time that a bound or a batch size changes
CALLS_PER_KEY = 4  # of other strides, or other lengths of tables

Prepared = TypeVar("Prepared")


class Empty:
    """Allocates contiguous tensors of a shape, dtype and device; on CUDA as compiled code does, past the dispatcher."""

    __slots__ = ("_arguments", "_device", "_place")

    def __init__(self, like: Tensor) -> None:
        strides = torch.empty(like.shape, device="meta").stride()
        self._arguments = (tuple(like.shape), strides, like.dtype)
        self._place = like.device
        self._device = like.device.index if like.is_cuda and _empty_strided_cuda is not None else None

    def __call__(self) -> Tensor:
        if self._device is not None and self._device == torch._C._cuda_getDevice():
            return _empty_strided_cuda(*self._arguments)
        shape, _, dtype = self._arguments
        return torch.empty(shape, dtype=dtype, device=self._place)


class SeenCalls(Generic[Prepared]):
    """What calls prepared, by a key of host numbers and the metadata of their tensors."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, list[tuple[Any, Prepared]]] = {}

    def find(self, key: Hashable, tensors: Sequence[Tensor]) -> Prepared | None:
        """What was remembered of a call with an equal key and alike tensors, if nothing has to see the op."""
        calls = self._calls.get((torch.is_grad_enabled(), key))
        if calls is None or torch._C._len_torch_function_stack() or torch._C._autograd._profiler_enabled():
            return None
        if forward_ad._current_level >= 0:  # a tensor with a tangent is like one without
            return None
        for guards, prepared in calls:
            if guards.check(*tensors):
                return prepared
        return None

    def add(self, key: Hashable, tensors: Sequence[Tensor], prepared: Prepared) -> None:
        """Remember a call that has passed all checks, unless something had to see the op."""
        if (
            TensorGuards is None
            or torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
        ):
            return
        if len(self._calls) >= MAX_KEYS:
            self._calls.clear()
        sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
        strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        key = (torch.is_grad_enabled(), key)
        self._calls[key] = [(guards, prepared), *self._calls.get(key, ())[: CALLS_PER_KEY - 1]]
