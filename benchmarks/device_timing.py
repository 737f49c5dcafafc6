"""Time on the device: CUDA graph replays of several launches, and the ceilings that results are held against.

A launch reads memory that the launches around it do not, so that nothing it reads is in the L2 cache; a graph of them
hides the host. Replays follow one another without a gap, and an event between each two gives each one's time. On a CPU
the host clock is read, which is good for trying the code and for nothing else.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GRAPH_SECONDS = 0.002  # of device time that a graph should have at least, so that what a replay costs is lost in it
MAX_LAUNCHES = 64
MIN_REPLAYS, MAX_REPLAYS = 5, 200


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches where one thing is all that it does."""

    read_bytes: float  # bytes read a second
    copy_bytes: float  # bytes read and written a second
    matmul_flops: float  # of a large bf16 product, a second

    def limit(self, num_bytes: float, flops: float, is_copy: bool = False) -> float:
        """Seconds that so much work takes at the least."""
        return max(num_bytes / (self.copy_bytes if is_copy else self.read_bytes), flops / self.matmul_flops)


def capture(launch: Callable[[int], object], launches: int) -> torch.cuda.CUDAGraph:
    """A graph of ``launch(0)`` ... ``launch(launches - 1)``, all of which have run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(launches):
            launch(index)
    return graph


def launches_per_graph(seconds: float, copies: int) -> int:
    """How many launches of about ``seconds`` a graph gets: whole rounds over the copies, or just one."""
    wanted = min(MAX_LAUNCHES, int(GRAPH_SECONDS / max(seconds, 1e-7)) + 1)
    return copies * max(1, -(-wanted // copies)) if copies < MAX_LAUNCHES else copies


def time_launches(
    launch: Callable[[int], object], copies: int, expected: float, seconds: float, device: torch.device
) -> float:
    """Median seconds of a launch, given about ``seconds`` to find it.

    Args:
        launch: run on the copy of the inputs with this index.
        expected: seconds that a launch should take, to choose how many go into a graph.
    """
    if device.type != "cuda":
        return _time_on_host(launch, copies, seconds)
    launches = launches_per_graph(expected, copies)
    graph = capture(lambda index: launch(index % copies), launches)
    replay = _time_replays(graph, 2)
    _time_replays(graph, max(1, min(MAX_REPLAYS, int(0.1 * seconds / replay))))  # let the clocks settle
    found = _time_replays(graph, max(MIN_REPLAYS, min(MAX_REPLAYS, int(seconds / replay))))
    return found / launches


def _time_replays(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Median seconds of a replay; the first is not counted, for it starts on an idle device."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1e3


def _time_on_host(launch: Callable[[int], object], copies: int, seconds: float) -> float:
    times: list[float] = []
    while len(times) < copies or sum(times) < seconds:
        start = time.perf_counter()
        launch(len(times) % copies)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def scratch_elements(device: torch.device) -> int:
    """How many numbers ``measure_ceilings`` needs: far more than a cache holds."""
    return 1 << 30 if device.type == "cuda" else 1 << 18


def measure_ceilings(scratch: Tensor) -> Ceilings:
    """Read, copy and matrix product rates.

    Args:
        scratch: flat, bf16, random, at least ``scratch_elements`` long; part of it is overwritten with the rest.
    """
    device, seconds = scratch.device, 0.2 if scratch.is_cuda else 0.01
    half = scratch_elements(device) // 2
    source, target = scratch[:half], scratch[half : 2 * half]
    copies = (lambda _: target.copy_(source), lambda _: torch.neg(source, out=target))  # the driver's, and a kernel's
    copied = min(time_launches(copy, 1, 1e-3, seconds, device) for copy in copies)
    if scratch.is_cuda:
        from benchmarks.read_kernel import read

        sums = torch.empty(1 << 20, dtype=torch.float32, device=device)
        read(source, sums)
        time_read = time_launches(lambda _: read(source, sums), 1, 1e-3, seconds, device)
    else:
        time_read = time_launches(lambda _: source.view(torch.int16).sum(), 1, 1e-3, seconds, device)
    size = 8192 if scratch.is_cuda else 256
    left, right = scratch[: size * size].view(size, size), scratch[half : half + size * size].view(size, size)
    product = torch.empty_like(left)
    torch.matmul(left, right, out=product)
    time_product = time_launches(lambda _: torch.matmul(left, right, out=product), 1, 1e-3, seconds, device)
    return Ceilings(half * 2 / time_read, half * 4 / copied, 2 * size**3 / time_product)
