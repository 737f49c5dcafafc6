"""``StepGraphs``: whole steps as CUDA graphs, one for each of a closed set of sizes.

A decode's size is its rows, that of any other step its tokens. What a step has fewer of is filled up with padding.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pagedattn.engine.sampler import SamplingTensors

# (logits, token ids, what they were drawn by) of a step of such a size.
Step = Callable[[int], tuple[Tensor, Tensor, SamplingTensors]]

# What a large GPU computes, roughly, in the time in which a host launches a step's few hundred kernels. A step of more
# operations gains nothing from a graph and loses what is padded.
LAUNCH_BOUND_FLOPS = 8e12
SMALLEST_MIXTURE = 16  # tokens


def decode_batch_sizes(max_num_seqs: int) -> list[int]:
    """The sizes that decodes are padded to: small ones by doubling, then every eighth, and the largest."""
    sizes = [size for size in (1, 2, 4) if size < max_num_seqs]
    return [*sizes, *range(8, max_num_seqs, 8), max_num_seqs]


def mixture_sizes(max_num_batched_tokens: int, flops_per_token: float) -> list[int]:
    """The numbers of tokens that other steps are padded to: four for each doubling, as far as launches bound them."""
    largest = min(max_num_batched_tokens, int(LAUNCH_BOUND_FLOPS / flops_per_token))
    sizes, size = [], SMALLEST_MIXTURE
    while size < largest:
        sizes.append(size)
        size += max(SMALLEST_MIXTURE, (1 << size.bit_length() - 1) // 4)
    return [*sizes, largest] if largest >= SMALLEST_MIXTURE else []


@dataclass(frozen=True, slots=True)
class _CapturedStep:
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    token_ids: Tensor
    sampling: SamplingTensors


class StepGraphs:
    """``step`` as it runs on a state that is on the device; it must allocate and read nothing else.

    Captured from the largest size down into ``pool``, so that all sizes together need what the largest does. What a
    replay returns is good until the next one, of any graphs that share the pool.
    """

    def __init__(self, step: Step, sizes: Sequence[int], device: torch.device, pool: Any) -> None:
        self._sizes = sizes
        self._steps: list[_CapturedStep] = []
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for size in reversed(sizes):
                step(size)  # whatever is compiled or allocated at the first time
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    logits, token_ids, sampling = step(size)
                finally:
                    graph.capture_end()
                # Tensors that own their memory would keep it from the next capture.
                self._steps.append(_CapturedStep(graph, _borrowed(logits), _borrowed(token_ids), sampling))
                del logits, token_ids
        self._steps.reverse()
        torch.cuda.current_stream(device).wait_stream(stream)

    def replay(self, size: int) -> tuple[Tensor, Tensor, SamplingTensors]:
        """A step of that size or the next larger one; the outputs may have rows more, of nobody."""
        captured = self._steps[bisect_left(self._sizes, size)]
        captured.graph.replay()
        return captured.logits, captured.token_ids, captured.sampling


class _Memory:
    """Device memory by its address, as ``torch.as_tensor`` takes it: it is neither owned nor kept."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _borrowed(tensor: Tensor) -> Tensor:
    """The same memory, as a tensor that does not own it."""
    assert tensor.is_contiguous()
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype).view(tensor.shape)
