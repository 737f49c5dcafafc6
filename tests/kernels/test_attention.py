"""``paged_attention`` against the fp64 oracle: the reference on a CPU, the kernels on a GPU or interpreted."""

from __future__ import annotations

import pytest
import torch

import pagedattn
from tests.device import DEVICE, DTYPES, IS_CUDA
from tests.kernels import oracle
from tests.kernels.budget import assert_within_budget
from tests.kernels.cases import build_case, draw_case
from tests.kernels.oracle import AttentionCase

NUM_DRAWS = 240


def attend(case: AttentionCase, plan: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    options = dict(case.options)
    if plan:
        options["plan"] = pagedattn.plan_attention(
            case.seq_lens,
            case.query_start_loc,
            num_heads=case.query.shape[1],
            num_kv_heads=case.key_cache.shape[2],
            head_size=case.query.shape[2],
            block_size=case.key_cache.shape[1],
            max_query_len=case.max_query_len,
            max_seq_len=case.block_table.shape[1] * case.key_cache.shape[1],
            sliding_window=options.get("sliding_window"),
        )
    out = torch.full_like(case.query, torch.nan)
    return pagedattn.paged_attention(
        *case.arguments(), max_query_len=case.max_query_len, out=out, return_lse=True, **options
    )


@pytest.mark.parametrize("seed", range(NUM_DRAWS))
def test_drawn_configurations(seed: int) -> None:
    case = draw_case(seed, DTYPES).to(DEVICE)
    out, lse = attend(case, plan=seed % 2 == 0)
    assert_within_budget(case, out, lse)


def test_draws_differ() -> None:
    """The draws above are >= 200 different configurations that reach each feature."""
    cases = [draw_case(seed, DTYPES) for seed in range(NUM_DRAWS)]
    keys = {(str(c.query.dtype), c.query.shape, c.key_cache.shape, str(c.options), c.max_query_len) for c in cases}
    assert len(keys) >= 200
    for option in ("sliding_window", "causal", "scale"):
        assert sum(option in case.options for case in cases) >= 20
    assert sum(case.max_query_len == 1 for case in cases) >= 20
    assert sum(int(case.seq_lens.max()) > 256 for case in cases) >= 20  # long enough to be split


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 4, 7, 16])
def test_long_sequence_among_short_ones_is_split(dtype: torch.dtype, group: int) -> None:
    longest = 20_000 if IS_CUDA else 600
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
    out, lse = attend(case, plan=True)
    assert_within_budget(case, out, lse)


def test_same_call_gives_the_same_bits() -> None:
    case = draw_case(7, DTYPES).to(DEVICE)
    first, again = attend(case), attend(case)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_strided_query_and_output() -> None:
    """Query and output as slices of wider tensors, as a fused QKV projection gives them."""
    case = draw_case(3, DTYPES).to(DEVICE)
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
    case = draw_case(3, DTYPES).to(DEVICE)
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
