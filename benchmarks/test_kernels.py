"""The kernel benchmark's shapes as pytest-benchmark cases, for comparing runs: ``pytest benchmarks/test_kernels.py``.

The clock is the device's. A round is a graph of several launches with a cold L2 cache; microseconds of one, GB/s and
the share of the measured read bandwidth (for appends: of a copy's) are in ``extra_info``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.attention_systems import Ours
from benchmarks.device_timing import Ceilings, capture, launches_per_graph, measure_ceilings
from benchmarks.kernels import DEFAULT_SHAPES, append_launch
from benchmarks.shapes import Shape, load_shapes
from benchmarks.workload import AppendInputs, Arena, AttentionInputs

SHAPES = load_shapes(DEFAULT_SHAPES)
ROUNDS = 20

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class DeviceClock:
    """Seconds on the device, read when all that was enqueued is done."""

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None
        self._seconds = 0.0

    def __call__(self) -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        if self._last is not None:  # added up in steps, for an event's own time since long ago is coarse
            self._seconds += self._last.elapsed_time(now) / 1e3
        self._last = now
        return self._seconds


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    with torch.inference_mode():
        yield Arena(SHAPES, torch.device("cuda"))


@pytest.fixture(scope="module")
def ceilings(arena: Arena) -> Ceilings:
    return measure_ceilings(arena.keys)


def prepared(shape: Shape, arena: Arena) -> tuple[Callable[[int], object], int]:
    """A launch that has run on every copy and was found right, and the number of copies."""
    if shape.is_append:
        rows = AppendInputs(shape, arena)
        launch, before = append_launch(rows), rows.queries[0].clone()
        for copy in range(rows.copies):
            launch(copy)
        rows.check(0, before)
        return launch, rows.copies
    inputs = AttentionInputs(shape, arena)
    attention = Ours().prepare(inputs)
    for copy in range(inputs.copies):
        attention.launch(copy)
    inputs.check(0, inputs.outs[0], attention.tolerance)
    return attention.launch, inputs.copies


@pytest.mark.benchmark(timer=DeviceClock())
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.key)
@torch.inference_mode()
def test_kernel(benchmark: Any, shape: Shape, arena: Arena, ceilings: Ceilings) -> None:
    limit = ceilings.limit(shape.bytes, shape.flops, is_copy=shape.is_append)
    launch, copies = prepared(shape, arena)
    launches = launches_per_graph(limit, copies)
    graph = capture(lambda index: launch(index % copies), launches)
    benchmark.pedantic(graph.replay, rounds=ROUNDS, warmup_rounds=3)
    seconds = benchmark.stats["median"] / launches
    bandwidth = ceilings.copy_bytes if shape.is_append else ceilings.read_bytes
    benchmark.extra_info.update(
        us=seconds * 1e6,
        gb_per_second=shape.bytes / seconds / 1e9,
        percent_of_bandwidth=100 * shape.bytes / seconds / bandwidth,
        tflops=shape.flops / seconds / 1e12,
        percent_of_limit=100 * limit / seconds,
    )
