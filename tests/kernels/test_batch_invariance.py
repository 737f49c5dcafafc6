"""Batch-invariant plans: a sequence's bits are its own, whatever is beside it and however its prefill was cut."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pagedattn
from pagedattn.kernels import hopper_decode
from tests.device import DEVICE, DTYPES, INTERPRETED, IS_HOPPER, IS_LARGE, SANITIZED
from tests.kernels.cases import build_case
from tests.kernels.gluon_interpreter import Descriptor, InterpretedLauncher, Shared
from tests.kernels.oracle import AttentionCase
from tests.kernels.test_attention import plan_for
from tests.kernels.test_hopper_decode import attend_interpreted

NUM_BATCHES = 3 if INTERPRETED or SANITIZED else 50
NUM_CUTS = 2 if INTERPRETED or SANITIZED else 5
LENGTHS = [700, 33, 300] if not IS_LARGE else [3000, 33, 9000, 257, 20_000, 1]

Result = tuple[Tensor, Tensor]  # output and log-sum-exp
Chunk = tuple[int, int, int]  # sequence, first and end of its queries


def attend(case: AttentionCase) -> Result:
    options = {**case.options, "max_seq_len": int(case.seq_lens.max())}
    options["plan"] = plan_for(case, batch_invariant=True, max_seq_len=options["max_seq_len"])
    return pagedattn.paged_attention(*case.arguments(), max_query_len=case.max_query_len, return_lse=True, **options)


class Sequences:
    """Sequences with all of their queries, keys and values; ``attend`` runs any chunks of any of them."""

    def __init__(
        self,
        lengths: list[int],
        query_len: int,
        run: Callable[[AttentionCase], Result],
        device: torch.device = DEVICE,
        **what: Any,
    ) -> None:
        self.lengths, self.run, self.device = lengths, run, device
        self.num_queries = [min(query_len, length) for length in lengths]
        self.whole = build_case(
            **{
                "generator": torch.Generator().manual_seed(0), "num_heads": 6, "num_kv_heads": 2, "head_size": 64,
                "block_size": 16, "seq_lens": lengths, "query_lens": self.num_queries, **what,
            }
        ).to(device)  # fmt: skip
        self.queries = self.whole.query.split(self.num_queries)

    def chunks(self) -> list[Chunk]:
        """Each sequence's queries."""
        return [(s, 0, n) for s, n in enumerate(self.num_queries)]

    def decodes(self) -> list[Chunk]:
        """Each sequence's last query."""
        return [(s, n - 1, n) for s, n in enumerate(self.num_queries)]

    def attend(self, chunks: list[Chunk], padding_rows: int = 0, extra: int = 0) -> list[Result]:
        """Results of chunks; ``extra``: unused columns of the table."""
        lens = [self.lengths[s] - self.num_queries[s] + end for s, _, end in chunks]
        steps = [end - first for _, first, end in chunks]
        table = self.whole.block_table[[s for s, _, _ in chunks]]
        table = torch.cat([table, table.new_full((len(chunks), extra), 2**30)], 1)
        window = self.whole.options.get("sliding_window")
        if window is not None:  # blocks before what the first query sees are gone
            for row, length, count in zip(table, lens, steps, strict=True):
                row[: max(0, length - count - window + 1) // self.whole.key_cache.shape[1]] = 2**30
        query = torch.cat([self.queries[s][first:end] for s, first, end in chunks])
        query = torch.cat([query, query.new_ones(padding_rows, *query.shape[1:])])
        out, lse = self.run(
            AttentionCase(
                query, self.whole.key_cache, self.whole.value_cache, table,
                torch.tensor(lens, dtype=torch.int32, device=self.device),
                torch.tensor([0, *steps], device=self.device).cumsum(0).to(torch.int32),
                max(steps), self.whole.options,
            )
        )  # fmt: skip
        rows = [*steps, padding_rows]
        return list(zip(out.split(rows), lse.split(rows), strict=True))[: len(chunks)]


def assert_same(ours: Result, expected: Result) -> None:
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


def check_batches(sequences: Sequences, num_batches: int, sizes: list[int]) -> None:
    """Neighbours, padding and the table's width do not show; a prefill's last row is the decode of that token."""
    draw = random.Random(0)
    chunks, decodes = sequences.chunks(), sequences.decodes()
    alone = {chunk: sequences.attend([chunk])[0] for chunk in chunks + decodes}
    for chunk in decodes:
        out, lse = alone[(chunk[0], 0, chunk[2])]
        assert_same((out[-1:], lse[-1:]), alone[chunk])
    for _ in range(num_batches):
        batch = [draw.choice(chunks + decodes) for _ in range(draw.choice(sizes))]
        results = sequences.attend(batch, padding_rows=draw.choice([0, 3]), extra=draw.choice([0, 7]))
        for chunk, result in zip(batch, results, strict=True):
            assert_same(result, alone[chunk])


def check_cuts(sequences: Sequences, num_cuts: int) -> None:
    """How the first sequence's prefill is cut does not show."""
    count = sequences.num_queries[0]
    whole = sequences.attend([(0, 0, count)])[0]
    draw = random.Random(0)
    for _ in range(num_cuts):
        cuts = sorted({0, count, *(draw.randrange(1, count) for _ in range(3))})
        for first, end in itertools.pairwise(cuts):
            out, lse = sequences.attend([(0, first, end)])[0]
            assert_same((out, lse), (whole[0][first:end], whole[1][first:end]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 300}], ids=["plain", "window"])
def test_neighbours_padding_and_table_width_do_not_show(dtype: torch.dtype, options: dict[str, object]) -> None:
    sequences = Sequences(LENGTHS, 40, attend, dtype=dtype, **options)
    check_batches(sequences, NUM_BATCHES, [2, 3, 8] if INTERPRETED else [2, 5, 40])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_how_a_prefill_is_cut_does_not_show(dtype: torch.dtype) -> None:
    check_cuts(Sequences(LENGTHS[:1], 90 if INTERPRETED else 700, attend, dtype=dtype), NUM_CUTS)


def test_the_last_elements_of_a_tensor_are_computed_as_the_others() -> None:
    """On a CPU vectors do not divide odd numbers of heads, and a sequence that ends with a tile has its query there."""
    lengths = [320, 608] if INTERPRETED else [704, 320, 608]
    sequences = Sequences(lengths, 20, attend, dtype=torch.float32, num_heads=9, num_kv_heads=3)
    check_batches(sequences, NUM_BATCHES, [2, 3, 5])


# --- the kernel for Hopper --------------------------------------------------------------------------------------------

HOPPER_CASES: list[dict[str, Any]] = [
    {},
    {"sliding_window": 300, "head_size": 128},
    {"sliding_window": 100, "cache_dtype": torch.int8, "scales": "token", "layout": "HND"},
    {"cache_dtype": torch.float8_e4m3fn, "scales": "head", "num_heads": 10, "softcap": 20.0},
    {"cache_dtype": torch.uint8, "scales": "token", "head_size": 128, "attention_chunk": 190},
    {"head_size": 256, "num_heads": 16, "sinks": torch.linspace(-1, 3, 16)},
]


class StrictDescriptor(Descriptor):
    def fetch(self, row: int, column: int, box: Shared) -> None:
        assert 0 <= row <= self.matrix.shape[0] - box.shape[0], "a block that there is not"
        super().fetch(row, column, box)


@pytest.fixture
def interpreted_hopper(monkeypatch: pytest.MonkeyPatch) -> Callable[[AttentionCase], Result]:
    """The Hopper kernel on the CPU, each time on a chip of another size: what workers share does not show either.

    Results in fp32: rounded once more, few differences would be left to see.
    """
    monkeypatch.setattr(hopper_decode, "describe", StrictDescriptor)
    launcher = InterpretedLauncher(hopper_decode.hopper_decode_kernel)
    monkeypatch.setattr(hopper_decode, "launch_hopper_decode", launcher)
    draw = random.Random(0)
    return lambda case: attend_interpreted(case, draw.choice([1, 3, 8, 20]), batch_invariant=True, dtype=torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter replaces the jit functions")
@pytest.mark.parametrize("what", HOPPER_CASES, ids=str)
def test_hopper_on_a_cpu(what: dict[str, Any], interpreted_hopper: Callable[[AttentionCase], Result]) -> None:
    sequences = Sequences([1400, 33, 300], 20, interpreted_hopper, torch.device("cpu"), dtype=torch.bfloat16, **what)
    check_batches(sequences, 2, [2, 5])
    check_cuts(sequences, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="the kernel is for compute capability 9")
@pytest.mark.parametrize("what", HOPPER_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hopper(what: dict[str, Any], dtype: torch.dtype) -> None:
    sequences = Sequences(LENGTHS, 300, attend, dtype=dtype, **what)
    check_batches(sequences, NUM_BATCHES, [2, 5, 40])
    check_cuts(sequences, NUM_CUTS)
