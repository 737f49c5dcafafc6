"""The Hopper kernel for prefill: when it serves, and (on that chip) its errors against the fp64 oracle."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from pagedattn.kernels import hopper_prefill
from pagedattn.kernels.tiling import (
    HOPPER_SHARED_MEMORY,
    AttentionTiling,
    CacheRows,
    HopperPrefillLaunch,
    choose_hopper_prefill,
    choose_tiling,
)
from tests.device import DEVICE, INTERPRETED, IS_HOPPER, IS_LARGE
from tests.kernels.budget import assert_within_budget
from tests.kernels.cases import build_case, draw_features
from tests.kernels.gluon_interpreter import Descriptor, InterpretedLauncher
from tests.kernels.hopper import Result, check_on_the_chip, described, run_prepared, tiling_of
from tests.kernels.oracle import AttentionCase


def tiling(group: int = 4, head_size: int = 128, max_query_len: int = 512, **changes: Any) -> AttentionTiling:
    sizes: dict[str, Any] = {"num_heads": 2 * group, "num_kv_heads": 2, "head_size": head_size}
    sizes |= {"head_size_v": head_size, "max_query_len": max_query_len, "max_seq_len": 4096, "num_seqs": 8}
    sizes |= {"multiprocessors": 132, "shared_memory": HOPPER_SHARED_MEMORY}
    return choose_tiling(**{**sizes, **changes})


def choose(made: AttentionTiling, head_size: int = 128, **changes: Any) -> HopperPrefillLaunch | None:
    rows = CacheRows.of((9, 16, 2, head_size), (32 * head_size, 2 * head_size, head_size, 1), 2)
    arguments: dict[str, Any] = {"head_size": head_size, "head_size_v": head_size, "multiprocessors": 132}
    arguments |= {"block_size": 16, "key_rows": rows, "value_rows": rows}
    return choose_hopper_prefill(tiling=made, **{**arguments, **changes})


def test_who_is_served() -> None:
    for head_size in (64, 128, 256):
        assert choose(tiling(head_size=head_size), head_size) is not None
    for group in (1, 3, 7, 64, 128):
        assert choose(tiling(group)) is not None
    assert choose(tiling(max_query_len=1)) is None  # decode
    assert choose(tiling(batch_invariant=True)) is None
    assert choose(tiling(head_size=192), 192) is None
    assert choose(tiling(head_size=256, shared_memory=0), 256) is None
    assert choose(tiling(), block_size=4) is None
    assert choose(tiling(), block_size=12) is None
    assert choose(tiling(), head_size_v=64) is None
    assert choose(tiling(), key_rows=None) is None


@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_launch_fits(head_size: int) -> None:
    made = tiling(head_size=head_size)
    launch = choose(made, head_size, block_size=544)
    assert launch is not None
    assert launch.page == 32
    assert launch.stages >= 2
    stage = 2 * launch.block_n * head_size * 2
    assert launch.stages * stage + made.rows * head_size * 2 + 2048 <= HOPPER_SHARED_MEMORY


def draw_case(number: int, device: torch.device) -> AttentionCase:
    draw, small = random.Random(number), not IS_LARGE or device.type == "cpu"
    head_size = draw.choice([64, 128] if small else [64, 128, 128, 256])
    group, num_kv_heads = draw.choice([(1, 3), (4, 2), (7, 1), (8, 2), (3, 2), (16, 1), (5, 2)])
    sequences = draw.choice([1, 3, 5] if small else [1, 3, 20])
    lengths = [0, 1, 9, 63, 64, 65, 300, 1000, 5000]
    seq_lens = [draw.choice(lengths[:8] if small else lengths) for _ in range(sequences)]
    longest = draw.choice([130, 200, 400] if small else [130, 200, 700])
    query_lens = [draw.choice([0, 1, 1, 5, min(longest, length), draw.randint(0, longest)]) for length in seq_lens]
    query_lens[0] = longest
    generator = torch.Generator().manual_seed(number)
    options = draw_features(draw, generator, group * num_kv_heads)
    return build_case(
        generator=generator,
        dtype=draw.choice([torch.bfloat16, torch.float16]),
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=draw.choice([8, 16, 48, 64, 128, 544]),
        seq_lens=seq_lens,
        query_lens=query_lens,
        layout=draw.choice(["NHD", "HND", "interleaved"]),
        padding_rows=draw.choice([0, 0, 3, 50]),
        magnitude=draw.choice([0.1, 1, 4]),
        **options,
    ).to(device)


def attend_interpreted(case: AttentionCase, workers: int) -> Result:
    """The kernel's output and log-sum-exp, on the interpreter."""
    made = tiling_of(case, multiprocessors=workers, shared_memory=HOPPER_SHARED_MEMORY)
    launch = choose(made, case.query.shape[2], multiprocessors=workers, **described(case))
    assert launch is not None
    return run_prepared(hopper_prefill.PreparedHopperPrefill, case, made, launch)


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedattn.kernels.hopper_decode.describe", Descriptor)
    launcher = InterpretedLauncher(hopper_prefill.hopper_prefill_kernel)
    monkeypatch.setattr(hopper_prefill, "launch_hopper_prefill", launcher)


NOT_IN_TRITONS_INTERPRETER = pytest.mark.skipif(INTERPRETED, reason="that interpreter replaces the jit functions")


@NOT_IN_TRITONS_INTERPRETER
@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("number", range(1000, 1010))
def test_drawn_on_a_cpu(number: int) -> None:
    case = draw_case(number, torch.device("cpu"))
    assert_within_budget(case, *attend_interpreted(case, workers=3 if number % 2 else 40))


@NOT_IN_TRITONS_INTERPRETER
@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(
    ("seq_lens", "query_lens", "padding_rows", "options"),
    [
        ([200, 40], [130, 30], 250, {}),  # more padding than the workers write at a time
        ([300, 0], [700, 33], 0, {"causal": False}),  # queries before the sequence, keys that none of them may see
        ([1500, 700, 900], [140, 1, 1], 0, {}),  # rings filled several times; decodes beside a chunk
        ([300, 900, 0, 700, 800], [140, 1, 1, 20, 1], 0, {"head_size": 256}),  # units that one consumer passes by
        ([2000, 3000], [5, 130], 0, {}),  # and tiles that are split
        ([500, 447, 390, 333, 300], [140, 1, 1, 1, 20], 0, {"sliding_window": 65}),  # and begin within a page
        ([3000], [130], 0, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}),  # split
        ([300, 200], [140, 70], 0, {"head_size": 256}),  # one tile of queries at a time
    ],
)
def test_edges_on_a_cpu(seq_lens: list[int], query_lens: list[int], padding_rows: int, options: dict[str, Any]) -> None:
    case = build_case(
        generator=torch.Generator().manual_seed(0),
        dtype=torch.bfloat16,
        num_heads=4,
        num_kv_heads=2,
        block_size=128,  # so that the producer is ahead
        seq_lens=seq_lens,
        query_lens=query_lens,
        padding_rows=padding_rows,
        **{"head_size": 64, **options},
    )
    assert_within_budget(case, *attend_interpreted(case, workers=7))


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="the kernel is for compute capability 9")
@pytest.mark.parametrize("number", range(120))
def test_drawn_on_hopper(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_on_the_chip(draw_case(number, DEVICE), hopper_prefill.PreparedHopperPrefill, monkeypatch, number % 10 == 0)
