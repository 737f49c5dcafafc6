"""The Hopper kernel: when it serves, how it sees a cache, and (on that chip) its errors against the fp64 oracle."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from pagedattn.kernels import hopper_decode
from pagedattn.kernels.tiling import (
    HOPPER_HALF_SHARED_MEMORY,
    INVARIANT_ROWS,
    AttentionTiling,
    CacheRows,
    HopperDecodeLaunch,
    choose_hopper_decode,
    choose_tiling,
)
from tests.device import DEVICE, INTERPRETED, IS_HOPPER, IS_LARGE
from tests.kernels.budget import assert_within_budget
from tests.kernels.cases import build_case, cache_layout, draw_features
from tests.kernels.gluon_interpreter import Descriptor, InterpretedLauncher
from tests.kernels.hopper import Result, check_on_the_chip, described, run_prepared, tiling_of
from tests.kernels.oracle import AttentionCase


def tiling(group: int = 4, head_size: int = 128, max_query_len: int = 1, **changes: Any) -> AttentionTiling:
    sizes: dict[str, Any] = {"num_heads": 2 * group, "num_kv_heads": 2, "head_size": head_size}
    sizes |= {"head_size_v": head_size, "max_query_len": max_query_len, "max_seq_len": 4096, "num_seqs": 8}
    return choose_tiling(**{**sizes, "multiprocessors": 132, **changes})


def choose(made: AttentionTiling, head_size: int = 128, **changes: Any) -> HopperDecodeLaunch | None:
    rows = CacheRows.of((9, 16, 2, head_size), (32 * head_size, 2 * head_size, head_size, 1), 2)
    arguments: dict[str, Any] = {"head_size": head_size, "head_size_v": head_size, "cache_itemsize": 2}
    arguments |= {"block_size": 16, "key_rows": rows, "value_rows": rows}
    return choose_hopper_decode(tiling=made, **{**arguments, **changes})


@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved"])
@pytest.mark.parametrize("heads", [1, 3])
def test_rows_find_every_slot(layout: str, heads: int) -> None:
    for cache in cache_layout(layout, 5, 16, heads, (64, 64), torch.float16):
        rows = CacheRows.of(cache.shape, cache.stride(), cache.element_size())
        assert rows is not None
        strides = (cache.stride(1), 1)
        matrix = cache.as_strided((rows.num_rows, rows.num_columns), strides, cache.storage_offset())
        cache.copy_(torch.arange(cache.numel()).view(cache.shape) % 2039)
        for block in range(5):
            for head in range(heads):
                first, column = block * rows.block_rows + head * rows.head_rows, head * rows.head_columns
                assert torch.equal(matrix[first : first + 16, column : column + 64], cache[block, :, head])


def test_rows_of_what_is_no_matrix() -> None:
    assert CacheRows.of((5, 16, 2, 64), (3000, 128, 64, 1), 2) is None  # blocks begin within a row
    assert CacheRows.of((5, 16, 2, 60), (16 * 120, 120, 60, 1), 1) is None  # rows that no copy engine reads
    assert CacheRows.of((5, 16, 2, 64), (16 * 100, 100, 64, 1), 2) is None  # heads that overlap the next slot
    assert CacheRows.of((1 << 27, 16, 2, 64), (2048, 128, 64, 1), 2) is None  # too many rows


def test_who_is_served() -> None:
    assert choose(tiling()) is not None
    for head_size in (64, 128, 256):
        assert choose(tiling(head_size=head_size), head_size) is not None
    assert choose(tiling(max_query_len=4)) is not None
    assert choose(tiling(max_query_len=512)) is None  # prefill
    assert choose(tiling(group=64)) is None
    for max_query_len, columns in ((1, 8), (4, 16), (512, INVARIANT_ROWS)):
        launch = choose(tiling(max_query_len=max_query_len, batch_invariant=True))
        assert launch is not None
        assert launch.columns == columns
    assert choose(tiling(group=64, batch_invariant=True)) is not None  # two head tiles
    assert choose(tiling(), block_size=4) is None
    assert choose(tiling(), head_size_v=64) is None
    assert choose(tiling(), cache_itemsize=4) is None
    assert choose(tiling(), key_rows=None) is None
    assert choose(tiling(), has_token_scales=True) is None
    assert choose(tiling(), cache_itemsize=1, has_token_scales=True) is not None


def test_launch_fits() -> None:
    for head_size in (64, 128):
        for itemsize in (0.5, 1, 2):
            for max_query_len in (1, 2, 4, 8):
                launch = choose(tiling(4, head_size, max_query_len), head_size, cache_itemsize=itemsize)
                if launch is None:
                    continue
                stage = 2 * launch.block_n * head_size * itemsize
                half = 2 * launch.block_n * head_size * 2 if itemsize < 2 else 0
                fixed = launch.columns * (head_size + launch.block_n) * 2
                assert launch.stages * stage + half + fixed + 2048 <= HOPPER_HALF_SHARED_MEMORY
                assert launch.stages >= 2


FORMATS = (None, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)


def draw_case(number: int, device: torch.device) -> AttentionCase:
    draw, small = random.Random(number), not IS_LARGE or device.type == "cpu"
    cache_dtype = FORMATS[number % len(FORMATS)]
    head_size = draw.choice([128, 256] if cache_dtype == torch.uint8 else [64, 128, 128, 256])
    group, num_kv_heads, max_query_len = draw.choice([(1, 3, 1), (4, 2, 1), (7, 1, 1), (8, 2, 4), (3, 2, 5), (4, 8, 2)])
    sequences = draw.choice([1, 3, 5] if small else [1, 3, 40])
    lengths = [0, 1, 9, 63, 64, 65, 300, 1000, 5000]
    seq_lens = [draw.choice(lengths[:8] if small else lengths) for _ in range(sequences)]
    query_lens = [draw.randint(0, max_query_len) for _ in seq_lens]
    query_lens[0] = max_query_len
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
        cache_dtype=cache_dtype,
        scales="none" if cache_dtype is None else draw.choice(["tensor", "head", "token"]),
        layout=draw.choice(["NHD", "HND", "interleaved"]),
        padding_rows=draw.choice([0, 0, 3, 50]),
        magnitude=draw.choice([0.1, 1, 4]),
        **options,
    ).to(device)


def attend_interpreted(
    case: AttentionCase, multiprocessors: int, batch_invariant: bool = False, dtype: torch.dtype | None = None
) -> Result:
    """The kernel's output and log-sum-exp, on the interpreter. ``dtype``: the output's, None = the query's."""
    made = tiling_of(case, multiprocessors=multiprocessors, batch_invariant=batch_invariant)
    itemsize = 0.5 if case.key_cache.dtype == torch.uint8 else case.key_cache.element_size()
    launch = choose(made, case.query.shape[2], cache_itemsize=itemsize, **described(case))
    assert launch is not None
    return run_prepared(hopper_decode.PreparedHopperDecode, case, made, launch, dtype)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter replaces the jit functions")
# 40, 58 and 258: parts of a sequence that lie outside of the attention chunk; 6028: one key in sight, a scale per token
@pytest.mark.parametrize("number", [40, 58, 258, 6028, *range(1000, 1020)])
def test_drawn_on_a_cpu(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_decode, "describe", Descriptor)
    launcher = InterpretedLauncher(hopper_decode.hopper_decode_kernel)
    monkeypatch.setattr(hopper_decode, "launch_hopper_decode", launcher)
    case = draw_case(number, torch.device("cpu"))
    assert_within_budget(case, *attend_interpreted(case, 3 if number % 2 else 20))
    assert_within_budget(case, *attend_interpreted(case, 20 if number % 2 else 3, batch_invariant=True))


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="the kernel is for compute capability 9")
@pytest.mark.parametrize("number", range(120))
def test_drawn_on_hopper(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_on_the_chip(draw_case(number, DEVICE), hopper_decode.PreparedHopperDecode, monkeypatch, number % 10 == 0)
