"""The race detector: a correct handover passes, and each planted fault is found, in every run."""

from __future__ import annotations

import inspect
import linecache
import random
from types import ModuleType
from typing import Any

import pytest
import torch

from pagedattn.kernels import hopper_decode, hopper_linear, hopper_prefill
from pagedattn.kernels.launcher import Descriptors
from tests.device import INTERPRETED
from tests.kernels import gluon_interpreter, test_hopper_decode, test_hopper_prefill
from tests.kernels.cases import build_case
from tests.kernels.gluon_interpreter import Descriptor, InterpretedLauncher, MatrixDescriptor
from tests.kernels.handover import handover_kernel
from tests.kernels.happens_before import RaceError
from tests.kernels.oracle import AttentionCase

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter replaces the jit functions")

# --- a small kernel ---------------------------------------------------------------------------------------------------


def hand_over(fault: str) -> None:
    num_tiles = 6
    matrix = torch.randn(num_tiles * 64, 64, generator=torch.Generator().manual_seed(0)).half()
    expected = matrix.double().view(num_tiles, 64, 64)
    expected[1::2, 32:] = 2.0
    out = torch.full((64, 64), torch.nan)
    launch = InterpretedLauncher(handover_kernel).prepare((), (1, 1), None, (num_tiles, fault))
    launch((out, torch.ones(64, 64).half()), Descriptors(MatrixDescriptor(matrix)))
    torch.testing.assert_close(out, expected.sum((0, 1)).float().expand(64, 64), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_a_correct_handover_passes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_interpreter, "chance", random.Random(seed))
    hand_over("none")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("overwritten before it is empty", "tiles|arrivals"),
        ("written before its copy has ended", "tiles is written by a copy that tells landed, unordered, and produce"),
        ("stored without a fence", "tiles is written by produce.*, unordered, and consume .* reads"),
        ("copied by threads without a fence", "ones is written by a copy that tells ones_full, unordered, and consume"),
        ("read before it is full", "tiles"),
        ("released before the product is waited for", "tiles"),
        ("read by who copies before it has ended", "ones is written by a copy that tells ones_full, unordered"),
        ("still being copied as the block ends", "ones is written by a copy that tells unread.*the block ends"),
    ],
)
def test_faults(fault: str, said: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_interpreter, "chance", random.Random(seed))
    with pytest.raises(RaceError, match=said):
        hand_over(fault)


# --- our kernels, each with a fault -----------------------------------------------------------------------------------


def changed(module: ModuleType, before: str, after: str) -> Any:
    """A module's names with one place of its source changed."""
    source = inspect.getsource(module)
    assert source.count(before) == 1, "the place to change is no longer there, or not alone"
    source, name = source.replace(before, after), f"<{module.__name__} changed>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # where Triton reads a function's source
    names: dict[str, Any] = {"__name__": module.__name__}
    exec(compile(source, name, "exec"), names)
    return names


def decode(names: dict[str, Any], patch: pytest.MonkeyPatch, what: dict[str, Any]) -> None:
    """One sequence, or what else is said, whose tiles fill the ring several times."""
    patch.setattr(hopper_decode, "describe", Descriptor)
    patch.setattr(hopper_decode, "launch_hopper_decode", InterpretedLauncher(names["hopper_decode_kernel"]))
    test_hopper_decode.attend_interpreted(sequences(query_lens=[1], **what), 1)


def prefill(names: dict[str, Any], patch: pytest.MonkeyPatch, what: dict[str, Any]) -> None:
    patch.setattr(hopper_decode, "describe", Descriptor)
    patch.setattr(hopper_prefill, "launch_hopper_prefill", InterpretedLauncher(names["hopper_prefill_kernel"]))
    test_hopper_prefill.attend_interpreted(sequences(**{"query_lens": [130], **what}), 1)


def sequences(**what: Any) -> AttentionCase:
    generator = torch.Generator().manual_seed(0)
    sizes = {"seq_lens": [1500], "block_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_size": 64}
    return build_case(**{"generator": generator, "dtype": torch.bfloat16, **sizes, **what})


def multiply(names: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    """A product that fills a ring of two stages several times."""
    values, weight = (torch.ones(64, 512, dtype=torch.bfloat16) for _ in range(2))
    described = Descriptors(MatrixDescriptor(values), MatrixDescriptor(weight))
    patch.setattr(hopper_linear, "describe", lambda *_: described)
    patch.setattr(hopper_linear, "launch_hopper_linear", InterpretedLauncher(names["hopper_linear_kernel"]))
    cut = hopper_linear.HopperLinearLaunch(32, 8, 2, (1, 1))
    hopper_linear.hopper_linear(cut, torch.empty(64, 32, dtype=torch.bfloat16), values, weight[:32], None, True, False)


INT8: dict[str, Any] = {"cache_dtype": torch.int8, "scales": "tensor"}
# A case, what of the source is left out, and what takes its place.
FAULTS_IN_DECODE: dict[str, tuple[dict[str, Any], str, str]] = {
    "keys read before they are full": (
        {}, "mbarrier.wait(keys_full.index(stage), phase)\n                logits = w", "logits = w",
    ),
    "values read before they are full": (
        {}, "mbarrier.wait(values_full.index(stage), phase)\n                if is_ragged", "if is_ragged",
    ),
    "a stage written before it is empty": ({}, "mbarrier.wait(tile_empty.index(stage), phase)", "pass"),
    "a stage written while the copy engine warms up": ({}, "    mbarrier.wait(warmed, 0)\n", "    pass\n"),
    "the block ends while the copy engine warms up": (
        {"seq_lens": [64]}, "mbarrier.wait(warmed, 0)  # shared memory", "# shared memory",
    ),
    "probabilities stored without a fence": (
        {}, "fence_async_shared()\n            synchronize()\n            is_ragged", "is_ragged",
    ),
    "a stage released before its values are read": (
        {},
        """\
                accumulator = warpgroup_mma(
                    values.index(stage).permute((1, 0)), probability_tile.permute((1, 0)), accumulator
                )
                synchronize()  # all warps have read the tile
                mbarrier.arrive(tile_empty.index(stage), count=1)
""",
        """\
                mbarrier.arrive(tile_empty.index(stage), count=1)
                accumulator = warpgroup_mma(
                    values.index(stage).permute((1, 0)), probability_tile.permute((1, 0)), accumulator
                )
""",
    ),
    "int8 keys read before they are full": (INT8, "mbarrier.wait(keys_full.index(next_stage), next_phase)", "pass"),
    "int8 keys made while a product reads those before": (
        INT8,
        "logits = warpgroup_mma_wait(0, deps=[logits_token])",
        "key_tile.store(key_tile.load(STORED)); logits = warpgroup_mma_wait(0, deps=[logits_token])",
    ),
    "int8 keys made without a fence": (INT8, "fence_async_shared()\n                accumulator", "accumulator"),
}  # fmt: skip
FAULTS_IN_PREFILL: dict[str, tuple[dict[str, Any], str, str]] = {
    "queries read before they are full": (
        {},
        "mbarrier.wait(queries_full.index(query_tile), turn // QUERY_TILES % 2)\n        fence_async_shared()",
        "fence_async_shared()",
    ),
    "queries read without a fence": ({}, "fence_async_shared()\n        mbarrier.wait", "mbarrier.wait"),
    "queries written before they are empty": (
        {}, "mbarrier.wait(queries_empty.index(turn % TILES), turn // TILES % 2 ^ 1)", "pass",
    ),
    "keys read before they are full": (
        {}, "mbarrier.wait(keys_full.index(stage), phase)\n            logits = g", "logits = g",
    ),
    "keys written before they are empty": ({}, "mbarrier.wait(keys_empty.index(stage), phase)", "pass"),
    "values read before they are full": ({}, "mbarrier.wait(values_full.index(last_stage), last_phase)", "pass"),
    "values released before they are read": (
        {},
        """\
            result = warpgroup_mma_wait(0, deps=[result_token])
            mbarrier.arrive(values_empty.index(last_stage), count=1)
""",
        """\
            mbarrier.arrive(values_empty.index(last_stage), count=1)
            result = warpgroup_mma_wait(0, deps=[result_token])
""",
    ),
    "values cleared before they have landed": ({}, "mbarrier.wait(values_landed, landed_phase)", "pass"),
    "values cleared without a fence": ({}, "    fence_async_shared()\n    synchronize()", "    synchronize()"),
    "a unit read before it is told": (
        {},
        "turn += 1\n        mbarrier.wait(units_full.index(turn % UNITS), turn // UNITS % 2)\n        if",
        "turn += 1\n        if",
    ),
}  # fmt: skip
FAULTS_IN_LINEAR: dict[str, tuple[str, str]] = {
    "a stage read before it is full": ("mbarrier.wait(full.index(chunk % STAGES), chunk // STAGES % 2)", "pass"),
    "a stage written while a product reads it": (
        """\
            result = warpgroup_mma_wait(0, deps=[result])
            if GATED:
                through = warpgroup_mma_wait(0, deps=[through])
            fetch_weights(
""",
        """\
            fetch_weights(
""",
    ),
}


ATTENTION = {
    "decode": (decode, hopper_decode, FAULTS_IN_DECODE),
    "prefill": (prefill, hopper_prefill, FAULTS_IN_PREFILL),
}


def test_kernels_without_a_fault_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for run, module, faults in ATTENTION.values():
        for what, *_ in faults.values():
            run(vars(module), monkeypatch, what)
    multiply(vars(hopper_linear), monkeypatch)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kernel", "fault"), [(kernel, fault) for kernel, (_, _, faults) in ATTENTION.items() for fault in faults]
)
def test_faults_in_attention(kernel: str, fault: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_interpreter, "chance", random.Random(seed))
    run, module, faults = ATTENTION[kernel]
    what, before, after = faults[fault]
    with pytest.raises(RaceError):
        run(changed(module, before, after), monkeypatch, what)


PASSING = {"seq_lens": [900, 700, 900, 800, 300], "query_lens": [140, 1, 1, 20, 1], "head_size": 256}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("mbarrier.wait(queries_full.index(query_tile), turn // QUERY_TILES % 2)  #", "#"),
        ("mbarrier.wait(keys_full.index(stage), phase)\n            mbarrier.arrive", "mbarrier.arrive"),
    ],
    ids=["queries", "keys"],
)
def test_faults_where_a_consumer_passes_by(before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They show where the other consumer is slow: in some of these runs."""
    names = changed(hopper_prefill, before, after)

    def run_often() -> None:
        for seed in range(20):
            monkeypatch.setattr(gluon_interpreter, "chance", random.Random(seed))
            prefill(names, monkeypatch, PASSING)

    with pytest.raises((RaceError, TimeoutError)):
        run_often()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", FAULTS_IN_LINEAR)
def test_faults_in_linear(fault: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_interpreter, "chance", random.Random(seed))
    with pytest.raises(RaceError):
        multiply(changed(hopper_linear, *FAULTS_IN_LINEAR[fault]), monkeypatch)
