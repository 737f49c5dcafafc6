"""Batch-invariant plans: a sequence's bits are its own, whatever is beside it and however its prefill was cut."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import pagedattn
from tests.device import DEVICE, DTYPES, INTERPRETED, IS_CUDA

NUM_BATCHES = 3 if INTERPRETED else 50
NUM_CUTS = 2 if INTERPRETED else 5
LENGTHS = [700, 33, 300] if not IS_CUDA else [3000, 33, 9000, 257, 20_000, 1]


class Sequences:
    """Sequences with all of their queries, keys and values; ``attend`` runs any chunks of any of them."""

    def __init__(self, dtype: torch.dtype, lengths: list[int], query_len: int, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths, self.options, self.block_size = lengths, options, 16
        self.blocks = [-(-length // 16) for length in lengths]
        total = sum(self.blocks)
        self.key_cache, self.value_cache = (
            torch.randn(2, total, 16, 2, 64, generator=generator).to(DEVICE, dtype).unbind()
        )
        self.ids = torch.randperm(total, generator=generator).to(torch.int32).split(self.blocks)
        self.num_queries = [min(query_len, length) for length in lengths]
        self.queries = [torch.randn(n, 6, 64, generator=generator).to(DEVICE, dtype) for n in self.num_queries]

    def attend(
        self, chunks: list[tuple[int, int, int]], padding_rows: int = 0, extra: int = 0
    ) -> list[tuple[Tensor, Tensor]]:
        """Output and log-sum-exp of (sequence, first, end) of the queries that it has; ``extra``: unused columns."""
        lens = [self.lengths[s] - self.num_queries[s] + end for s, _, end in chunks]
        steps = [end - first for _, first, end in chunks]
        table = torch.full((len(chunks), max(self.blocks) + extra), 2**30, dtype=torch.int32)
        for row, (s, _, _) in zip(table, chunks, strict=True):
            row[: self.blocks[s]] = self.ids[s]
        query = torch.cat([self.queries[s][a:b] for s, a, b in chunks])
        query = torch.cat([query, query.new_ones(padding_rows, *query.shape[1:])])
        seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
        starts = torch.tensor([0, *steps], device=DEVICE).cumsum(0).to(torch.int32)
        bounds: Any = {"max_query_len": max(steps), "max_seq_len": max(lens)}
        plan = pagedattn.plan_attention(
            seq_lens, starts, num_heads=6, num_kv_heads=2, head_size=64, block_size=16, batch_invariant=True,
            sliding_window=self.options.get("sliding_window"), **bounds,
        )  # fmt: skip
        out, lse = pagedattn.paged_attention(
            query, self.key_cache, self.value_cache, table.to(DEVICE), seq_lens, starts,
            plan=plan, return_lse=True, **bounds, **self.options,
        )  # fmt: skip
        return list(zip(out.split([*steps, padding_rows]), lse.split([*steps, padding_rows]), strict=True))[
            : len(chunks)
        ]


def assert_same(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 300}], ids=["plain", "window"])
def test_neighbours_padding_and_table_width_do_not_show(dtype: torch.dtype, options: dict[str, object]) -> None:
    sequences = Sequences(dtype, LENGTHS, 40, **options)
    draw = random.Random(0)
    chunks = [(s, 0, n) for s, n in enumerate(sequences.num_queries)]
    decodes = [(s, n - 1, n) for s, n in enumerate(sequences.num_queries)]
    alone = {chunk: sequences.attend([chunk])[0] for chunk in chunks + decodes}
    for chunk in decodes:  # the last row of a prefill is the decode of that token
        out, lse = alone[(chunk[0], 0, chunk[2])]
        assert_same((out[-1:], lse[-1:]), alone[chunk])
    for _ in range(NUM_BATCHES):
        batch = [draw.choice(chunks + decodes) for _ in range(draw.choice([2, 3, 8] if INTERPRETED else [2, 5, 40]))]
        results = sequences.attend(batch, padding_rows=draw.choice([0, 3]), extra=draw.choice([0, 7]))
        for chunk, result in zip(batch, results, strict=True):
            assert_same(result, alone[chunk])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_how_a_prefill_is_cut_does_not_show(dtype: torch.dtype) -> None:
    sequences = Sequences(dtype, LENGTHS[:1], 90 if INTERPRETED else 700)
    count = sequences.num_queries[0]
    whole = sequences.attend([(0, 0, count)])[0]
    draw = random.Random(0)
    for _ in range(NUM_CUTS):
        cuts = sorted({0, count, *(draw.randrange(1, count) for _ in range(3))})
        for first, end in itertools.pairwise(cuts):
            out, lse = sequences.attend([(0, first, end)])[0]
            assert_same((out, lse), (whole[0][first:end], whole[1][first:end]))
