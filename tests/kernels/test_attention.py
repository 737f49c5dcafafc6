"""``paged_attention`` against the fp64 oracle: the reference on a CPU, the kernels on a GPU or interpreted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import pagedattn
from tests.device import DEVICE, DTYPES, INTERPRETED, IS_LARGE
from tests.kernels import oracle
from tests.kernels.budget import assert_within_budget
from tests.kernels.cases import (
    DRAWS_PER_VARIANT,
    NUM_VARIANTS,
    all_pairs,
    build_case,
    draw_case,
    goes_with,
    pairs,
    variants,
)
from tests.kernels.oracle import AttentionCase

VARIANTS = variants(NUM_VARIANTS)


def plan_for(case: AttentionCase, **changes: object) -> pagedattn.AttentionPlan:
    per_byte = 2 if case.value_cache.dtype == torch.uint8 else 1
    return pagedattn.plan_attention(
        case.seq_lens,
        case.query_start_loc,
        **{
            "num_heads": case.query.shape[1],
            "num_kv_heads": case.key_cache.shape[2],
            "head_size": case.query.shape[2],
            "head_size_v": case.value_cache.shape[3] * per_byte,
            "block_size": case.key_cache.shape[1],
            "max_query_len": case.max_query_len,
            "max_seq_len": case.block_table.shape[1] * case.key_cache.shape[1],
            "sliding_window": case.options.get("sliding_window"),
            **changes,
        },
    )


def attend(
    case: AttentionCase, plan: str = "none", dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, poisoned beforehand, and log-sum-exp. ``dtype``: the output's, None = the query's."""
    options = dict(case.options)
    if plan != "none":
        options["plan"] = plan_for(case, batch_invariant=plan == "batch invariant")
    size_v = case.value_cache.shape[3] * (2 if case.value_cache.dtype == torch.uint8 else 1)
    out = torch.full(
        (*case.query.shape[:2], size_v), torch.nan, dtype=dtype or case.query.dtype, device=case.query.device
    )
    return pagedattn.paged_attention(
        *case.arguments(), max_query_len=case.max_query_len, out=out, return_lse=True, **options
    )


@pytest.mark.parametrize("number", range(NUM_VARIANTS))
def test_drawn_configurations(number: int, record_property: Callable[[str, object], None]) -> None:
    variant = VARIANTS[number]
    worst = 0.0
    for seed in range(DRAWS_PER_VARIANT):
        case = draw_case(variant, seed).to(DEVICE)
        # The interpreter has no bf16, which is what an fp8 query gives unless told otherwise.
        gives_out = variant["results"] == "given out and lse" or (INTERPRETED and variant["query"] != "as dtype")
        options = dict(case.options)
        if variant["plan"] != "none":
            options["plan"] = plan_for(case, batch_invariant=variant["plan"] == "batch invariant")
        lse = None
        if gives_out:
            out, lse = attend(case, str(variant["plan"]), variant["dtype"])
        elif variant["results"] == "out":
            out = pagedattn.paged_attention(*case.arguments(), max_query_len=case.max_query_len, **options)
        else:
            out, lse = pagedattn.paged_attention(
                *case.arguments(), max_query_len=case.max_query_len, return_lse=True, **options
            )
        worst = max(worst, assert_within_budget(case, out, lse))
    record_property("error_ratio", {"variant": {k: str(v) for k, v in variant.items()}, "worst": worst})
    record_property("draws", DRAWS_PER_VARIANT)


def test_variants_cover_all_pairs() -> None:
    missing = set(all_pairs())
    for variant in VARIANTS:
        assert goes_with(variant)
        missing -= pairs(variant)
    assert not missing
    assert len({tuple(variant.items()) for variant in VARIANTS}) >= 300


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 4, 7, 16])
def test_long_sequence_among_short_ones_is_split(dtype: torch.dtype, group: int) -> None:
    longest = 20_000 if IS_LARGE else 600
    case = build_case(
        generator=torch.Generator().manual_seed(group),
        dtype=dtype,
        num_heads=group,
        num_kv_heads=1,
        head_size=64,
        block_size=16,
        seq_lens=[5, longest, 0, 40],
        query_lens=[1, 2, 1, 1],
    ).to(DEVICE)
    for plan in ("given", "batch invariant"):
        assert_within_budget(case, *attend(case, plan))


def plain_case(**changes: object) -> AttentionCase:
    """A mixed batch without features, long enough to be split."""
    return build_case(
        **{
            "generator": torch.Generator().manual_seed(0),
            "dtype": DTYPES[0],
            "num_heads": 6,
            "num_kv_heads": 2,
            "head_size": 32,
            "block_size": 16,
            "seq_lens": [700, 9, 0, 33],
            "query_lens": [5, 9, 1, 1],
            "padding_rows": 2,
            **changes,
        }
    )


@pytest.mark.parametrize("plan", ["none", "given", "batch invariant"])
def test_same_call_gives_the_same_bits(plan: str) -> None:
    case = plain_case().to(DEVICE)
    first = attend(case, plan)
    torch.use_deterministic_algorithms(True)
    try:
        again = attend(case, plan)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_plan_serves_several_layers() -> None:
    """The merge's counters are back at 0 after each launch."""
    case = plain_case(query_lens=[1, 1, 1, 1]).to(DEVICE)
    expected = attend(case)[0]
    for batch_invariant in (False, True):
        plan = plan_for(case, batch_invariant=batch_invariant)
        for _ in range(3):
            out = pagedattn.paged_attention(*case.arguments(), max_query_len=case.max_query_len, plan=plan)
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_plan_of_another_batch_is_refused(batch_invariant: bool) -> None:
    case = plain_case().to(DEVICE)
    plan = plan_for(case, batch_invariant=batch_invariant)
    more = plain_case(seq_lens=[700, 9, 0, 33, 5], query_lens=[5, 9, 1, 1, 1]).to(DEVICE)

    def call(on: AttentionCase, max_seq_len: int | None = None) -> None:
        pagedattn.paged_attention(*on.arguments(), max_query_len=9, max_seq_len=max_seq_len, plan=plan)

    call(case)
    with pytest.raises(ValueError, match=r"^plan: .*made for these 5 sequences"):
        call(more)
    with pytest.raises(ValueError, match=r"^plan: got one for"):
        call(case, max_seq_len=700)


def test_repeated_blocks_of_a_shared_prefix() -> None:
    """Two sequences whose tables begin with the same blocks see the same keys there."""
    case = plain_case(seq_lens=[70, 80], query_lens=[1, 3]).to(DEVICE)
    case.block_table[1, :4] = case.block_table[0, :4]
    assert_within_budget(case, *attend(case))


def test_wide_and_sliced_tables() -> None:
    """Columns that no sequence needs, of garbage, and a table that is a slice of a wider one."""
    case = plain_case().to(DEVICE)
    expected = attend(case)
    wide = torch.full((len(case.seq_lens), 500), -(2**31), dtype=torch.int32, device=DEVICE)
    columns = case.block_table.shape[1]
    wide[:, 3 : 3 + columns] = case.block_table
    for table in (wide[:, 3:], wide[:, 3 : 3 + columns]):
        case.block_table = table
        torch.testing.assert_close(attend(case), expected, rtol=2e-2, atol=2e-3)


def test_expanded_inputs() -> None:
    """A query that every token shares, and a KV head that two heads of the cache are: strides of 0."""
    case = plain_case(seq_lens=[40, 40, 40], query_lens=[1, 1, 1], padding_rows=0).to(DEVICE)
    case.query = case.query[:1].expand(3, -1, -1)
    case.key_cache = case.key_cache[:, :, :1].expand(-1, -1, 2, -1)
    case.value_cache = case.value_cache[:, :, :1].expand(-1, -1, 2, -1)
    assert_within_budget(case, *attend(case))


def test_nan_in_blocks_of_others_and_behind_the_window() -> None:
    """Blocks that only others use, and those that a window has left behind (freed, perhaps rewritten), never matter."""
    for batch_invariant in ("given", "batch invariant"):
        case = plain_case(seq_lens=[333], query_lens=[2], padding_rows=0, sliding_window=40)
        left = (333 - 2 - 40 + 1) // 16
        for cache in (case.key_cache, case.value_cache):
            used = case.block_table[0, left : -(-333 // 16)].long()
            keep = cache[used].clone()
            cache.fill_(torch.nan)
            cache[used] = keep
        kept = case.block_table.clone()
        case.block_table[0, :left] = 2**30
        out, lse = attend(case.to(DEVICE), batch_invariant)
        case.block_table = kept
        for cache in (case.key_cache, case.value_cache):
            cache[kept[0, :left].long()] = 0  # the oracle multiplies them by 0
        assert_within_budget(case.to(DEVICE), out, lse)


def test_strided_query_and_output() -> None:
    """Query and output as slices of wider tensors, as a fused QKV projection gives them."""
    case = plain_case().to(DEVICE)
    tokens, heads, size = case.query.shape
    wide = torch.full((tokens, heads + 2, size + 8), torch.nan, dtype=case.query.dtype, device=DEVICE)
    wide[:, 1:-1, :size] = case.query
    result = torch.full((tokens, heads + 4, size), torch.nan, dtype=case.query.dtype, device=DEVICE)
    expected, _ = attend(case)
    case.query = wide[:, 1:-1, :size]
    pagedattn.paged_attention(*case.arguments(), max_query_len=case.max_query_len, out=result[:, 2:-2], **case.options)
    assert torch.equal(result[:, 2:-2], expected)
    assert result[:, :2].isnan().all()
    assert result[:, -2:].isnan().all()


def test_nothing_to_do() -> None:
    """No tokens, no sequences, and sequences without queries."""
    case = plain_case().to(DEVICE)
    query = case.query[:0]
    empty = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    start = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    table = case.block_table[:0]
    out = pagedattn.paged_attention(query, case.key_cache, case.value_cache, table, empty, start, max_query_len=1)
    assert out.shape == query.shape
    rows, lse = pagedattn.paged_attention(
        case.query, case.key_cache, case.value_cache, table, empty, start, max_query_len=1, return_lse=True
    )
    assert not rows.any()
    assert lse.isneginf().all()


def test_oracle_by_hand() -> None:
    """Two keys with logits 0 and log(3): weights 1/4 and 3/4."""
    key = torch.zeros(1, 2, 1, 8)
    key[0, 1, 0, 0] = 1.0986122886681098
    value = torch.zeros(1, 2, 1, 8)
    value[0, 1] = 4.0
    query = torch.zeros(1, 1, 8)
    query[0, 0, 0] = 1.0
    case = AttentionCase(
        query, key, value, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([2], dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32), 1, {"scale": 1.0},
    )  # fmt: skip
    out, lse = oracle.attention(case)
    torch.testing.assert_close(out, torch.full_like(out, 3.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(lse.exp(), torch.full_like(lse, 4.0), atol=1e-6, rtol=0)
