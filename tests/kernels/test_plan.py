"""Plans: the bounds of ``choose_tiling`` hold, kernel and reference agree, and every key is covered once."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pagedattn
from pagedattn.kernels import plan_reference
from pagedattn.kernels import tiling as tiling_module
from pagedattn.kernels.tiling import (
    FINE_CHUNK,
    ITEM_FIELDS,
    MIN_CHUNK,
    MIN_SHARE,
    SHARE_UNIT,
    AttentionTiling,
    ceil_div,
    choose_launch,
    choose_tiling,
    chunk_of,
)
from tests.device import DEVICE


def make_plan(
    seq_lens: list[int], query_lens: list[int], tiling: AttentionTiling, sliding_window: int | None
) -> tuple[list[list[int]], list[int]]:
    """The items that a launch runs, in the order of its programs, and the counts."""
    items = torch.full((tiling.max_items, ITEM_FIELDS), -7, dtype=torch.int32)
    counts = torch.full((tiling.num_counts,), -7, dtype=torch.int32)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    lengths = torch.tensor(seq_lens, dtype=torch.int32)
    plan_reference.plan_attention(lengths, starts, items, counts, tiling=tiling, sliding_window=sliding_window)
    assert not counts[4:].any()
    return run_order(items, counts.tolist()), counts.tolist()


def run_order(items: torch.Tensor, counts: list[int]) -> list[list[int]]:
    """Every program's chain of items, those without queries left out. Rows that no chain leads to are not read."""
    rows: dict[int, list[int]] = {}
    reached = list(range(counts[0]))
    while reached:
        rows.update(zip(reached, items[reached].tolist(), strict=True))
        reached = [rows[number][10] for number in reached if rows[number][10] >= 0]
    order = []
    for number in range(counts[0]):
        while number >= 0:
            order.append(rows[number])
            number = rows[number][10]
    return [item for item in order if item[2]]


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 600)), min_size=1, max_size=20),
    group=st.sampled_from([1, 2, 3, 4, 7, 8, 16, 20, 128]),
    num_kv_heads=st.sampled_from([1, 3, 8]),
    head_size=st.sampled_from([64, 128, 256, 512]),
    sliding_window=st.none() | st.integers(1, 5000),
    multiprocessors=st.sampled_from([1, 4, 108, 132]),
    batch_invariant=st.booleans(),
)
def test_plan_covers_every_key_once_within_its_bounds(
    lengths: list[tuple[int, int]],
    group: int,
    num_kv_heads: int,
    head_size: int,
    sliding_window: int | None,
    multiprocessors: int,
    batch_invariant: bool,
) -> None:
    seq_lens, query_lens = [n for n, _ in lengths], [q for _, q in lengths]
    tiling = choose_tiling(
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        head_size_v=head_size,
        max_query_len=max(1, *query_lens, 1),
        max_seq_len=max(seq_lens),
        num_seqs=len(seq_lens),
        multiprocessors=multiprocessors,
        batch_invariant=batch_invariant,
    )
    assert tiling.queries_per_tile * tiling.heads_per_tile <= tiling.rows
    assert tiling.head_tiles * tiling.heads_per_tile >= group * num_kv_heads
    items, counts = make_plan(seq_lens, query_lens, tiling, sliding_window)
    assert counts[0] <= tiling.max_items
    assert counts[1] == sum(query_lens)
    first_row = dict(zip(range(len(seq_lens)), [sum(query_lens[:i]) for i in range(len(seq_lens))], strict=True))
    rows = {row for item in items for row in range(item[1], item[1] + item[2])}
    assert rows == set(range(sum(query_lens)))
    tiles: dict[int, list[list[int]]] = {}
    for item in items:
        tiles.setdefault(item[1], []).append(item)
    written: list[int] = []  # slots, over all tiles
    for parts in tiles.values():
        sequence, row, queries, position, _, _, slot, first_slot, num_slots, awaited, _, origin = parts[0]
        assert origin == seq_lens[sequence] - query_lens[sequence]
        assert position == origin + row - first_row[sequence]
        assert 1 <= queries <= tiling.queries_per_tile
        window = sliding_window if sliding_window is not None else 1 << 30
        first_key = max(0, position - window + 1)
        last_key = min(seq_lens[sequence], position + queries - 1 + window)
        pieces = sorted((item[4], item[5], item[6]) for item in parts if item[4] < item[5])
        if first_key < last_key:
            assert (pieces[0][0], pieces[-1][1]) == (first_key, last_key)
            assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
        else:
            assert not pieces
        if slot < 0:
            assert len(parts) == 1
            continue
        assert awaited == (num_slots if batch_invariant else len(parts))
        assert all(item[7:10] == parts[0][7:10] for item in parts)
        slots = list(range(first_slot, first_slot + num_slots))
        if tiling.workers and not batch_invariant:
            slots = [first_slot, *(2 * (first_slot // 2 + index) for index in range(1, num_slots))]
        own = [item[6] for item in parts]
        if batch_invariant:  # one for what the tile begins with, then one for each chunk; items end where chunks do
            assert all(begin == first_key or begin in CHUNK_BEGINS for begin, _, _ in pieces)
            own = [first_slot] + [
                number
                for begin, end, first in pieces
                if first != first_slot
                for number in range(first, first + chunk_of(end - 1) - chunk_of(begin) + 1)
            ]
            assert own == slots  # in the order of keys
        elif not tiling.workers:
            assert all(end - begin <= counts[2] for begin, end, _ in pieces)
        assert sorted(own) == slots
        written += own
    assert len(written) == len(set(written))
    assert max(written, default=-1) < tiling.max_slots


@given(
    seq_lens=st.lists(st.integers(0, 40_000), min_size=1, max_size=40),
    sliding_window=st.none() | st.integers(1, 5000),
    num_kv_heads=st.sampled_from([1, 3, 8, 300]),
)
def test_workers_share_the_keys_equally(seq_lens: list[int], sliding_window: int | None, num_kv_heads: int) -> None:
    tiling = choose_tiling(
        num_heads=num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_size=128,
        head_size_v=128,
        max_query_len=1,
        max_seq_len=max(seq_lens),
        num_seqs=len(seq_lens),
        multiprocessors=132,
    )
    assert tiling.workers == {1: 256, 3: 88, 8: 32, 300: 1}[num_kv_heads]  # at most two to a multiprocessor
    items = torch.zeros(tiling.max_items, ITEM_FIELDS, dtype=torch.int32)
    counts = torch.zeros(tiling.num_counts, dtype=torch.int32)
    starts = torch.arange(len(seq_lens) + 1, dtype=torch.int32)
    plan_reference.plan_attention(
        torch.tensor(seq_lens, dtype=torch.int32), starts, items, counts, tiling=tiling, sliding_window=sliding_window
    )
    loads = []
    for number in range(tiling.workers):
        load, item = 0, number
        while item >= 0:
            _, _, _, _, begin, end, *_ = row = items[item].tolist()
            load += end - begin
            item = row[10]
        loads.append(load)
    visible = [min(n, sliding_window or n) for n in seq_lens]
    assert sum(loads) == sum(visible)
    # A sequence may begin and end within a unit, and one without keys takes the place of one unit.
    units = sum(ceil_div(n, SHARE_UNIT) + 1 for n in visible)
    assert max(loads) <= max(MIN_SHARE, (ceil_div(units, tiling.workers)) * SHARE_UNIT)


@pytest.mark.parametrize(("query_len", "num_cut"), [(1, 1), (40, 0)], ids=["shares", "list"])
def test_tiles_without_slots_are_not_cut(query_len: int, num_cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling_module, "INVARIANT_PARTIAL_BYTES", 0)
    tiling = choose_tiling(
        num_heads=8,
        num_kv_heads=2,
        head_size=64,
        head_size_v=64,
        max_query_len=query_len,
        max_seq_len=3000,
        num_seqs=5,
        multiprocessors=20,
        batch_invariant=True,
    )
    items, _ = make_plan([3000] * 5, [query_len] * 5, tiling, None)
    cut = {item[0] for item in items if item[6] >= 0}
    assert cut == set(range(num_cut))
    whole = [item for item in items if item[0] not in cut]
    assert len(whole) == (5 - num_cut) * tiling.tiles_per_sequence
    assert all(item[4:6] == [0, 3000] for item in whole)


CHUNK_BEGINS = {0, *(p for p in range(1, 60_000) if chunk_of(p) != chunk_of(p - 1))}


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_op_writes_what_the_reference_writes(seed: int, batch_invariant: bool) -> None:
    draw = random.Random(seed)
    count = draw.choice([1, 2, 5, 17])
    seq_lens = [draw.choice([0, 3, 100, 1000, 5000, 12_345, 30_000]) for _ in range(count)]
    longest = draw.choice([1, 5, 10**6])
    query_lens = [min(longest, draw.choice([0, 1, 1, min(n, 70), n + 90])) for n in seq_lens]
    sliding_window = draw.choice([None, None, 10, 300, 10**6])
    geometry = {"num_heads": 6, "num_kv_heads": 2, "head_size": 64, "head_size_v": 64}
    geometry["batch_invariant"] = batch_invariant
    bounds = {"max_query_len": max(1, *query_lens, 1), "max_seq_len": max(1, *seq_lens, 1)}
    plan = pagedattn.plan_attention(
        torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE),
        torch.tensor([0, *query_lens], device=DEVICE).cumsum(0).to(torch.int32),
        block_size=16,
        sliding_window=sliding_window,
        **geometry,
        **bounds,
    )
    multiprocessors = pagedattn.ops._multiprocessors(DEVICE)
    limits = {"multiprocessors": multiprocessors, "shared_memory": pagedattn.ops._shared_memory(DEVICE)}
    tiling = choose_tiling(**geometry, **bounds, num_seqs=count, **limits)
    effective = None if sliding_window is None or sliding_window >= bounds["max_seq_len"] else sliding_window
    items, counts = make_plan(seq_lens, query_lens, tiling, effective)
    assert plan.counts.tolist() == counts
    assert run_order(plan.items, counts) == items


def test_plan_is_rewritten_in_place() -> None:
    geometry = {
        "num_heads": 4,
        "num_kv_heads": 1,
        "head_size": 64,
        "block_size": 16,
        "max_query_len": 1,
        "max_seq_len": 900,
    }
    starts = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    first = torch.tensor([900, 3], dtype=torch.int32, device=DEVICE)
    second = torch.tensor([5, 700], dtype=torch.int32, device=DEVICE)
    plan = pagedattn.plan_attention(first, starts, **geometry)
    addresses = [tensor.data_ptr() for tensor in plan.tensors]
    assert pagedattn.plan_attention(second, starts, out=plan, **geometry) is plan
    assert [tensor.data_ptr() for tensor in plan.tensors] == addresses
    fresh = pagedattn.plan_attention(second, starts, **geometry)
    counts = plan.counts.tolist()
    assert counts == fresh.counts.tolist()
    assert run_order(plan.items, counts) == run_order(fresh.items, counts)
    with pytest.raises(ValueError, match=r"^out: got a plan for"):
        pagedattn.plan_attention(second, starts, out=plan, **{**geometry, "max_seq_len": 901})


@given(
    rows=st.sampled_from([16, 32, 64, 128]),
    head_size=st.sampled_from([8, 64, 80, 128, 256, 512, 576]),
    itemsize=st.sampled_from([2, 4]),
    cache_itemsize=st.sampled_from([0.5, 1, None]),
    shared_memory=st.sampled_from([65_536, 101_376, 166_912, 232_448]),
)
def test_launch_fits(
    rows: int, head_size: int, itemsize: int, cache_itemsize: float | None, shared_memory: int
) -> None:
    launch = choose_launch(
        rows=rows,
        head_size=head_size,
        head_size_v=min(head_size, 512),
        itemsize=itemsize,
        cache_itemsize=cache_itemsize or itemsize,
        shared_memory=shared_memory,
    )
    assert launch.num_stages >= 1
    assert launch.num_warps in (4, 8)
    assert MIN_CHUNK % launch.block_n == FINE_CHUNK % launch.block_n == 0  # a whole number of iterations
