"""What the tests of both Hopper attention kernels do: run one on the interpreter, or on the chip behind the op."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pagedattn.kernels.options import AttentionOptions
from pagedattn.kernels.plan_reference import plan_attention
from pagedattn.kernels.tiling import ITEM_FIELDS, AttentionTiling, CacheRows, choose_tiling
from tests.kernels.budget import assert_within_budget
from tests.kernels.oracle import AttentionCase
from tests.kernels.test_attention import attend, plan_for

Result = tuple[torch.Tensor, torch.Tensor]  # output and log-sum-exp


def tiling_of(case: AttentionCase, **how: Any) -> AttentionTiling:
    """A case's tiling. ``how``: of what device, and for what plan."""
    return choose_tiling(
        num_heads=case.query.shape[1],
        num_kv_heads=case.key_cache.shape[2],
        head_size=case.query.shape[2],
        head_size_v=case.query.shape[2],
        max_query_len=case.max_query_len,
        max_seq_len=case.block_table.shape[1] * case.key_cache.shape[1],
        num_seqs=case.seq_lens.shape[0],
        **how,
    )


def described(case: AttentionCase) -> dict[str, Any]:
    """What a launch is chosen by, of the caches."""
    key_rows, value_rows = (
        CacheRows.of(cache.shape, cache.stride(), cache.element_size()) for cache in (case.key_cache, case.value_cache)
    )
    return {"block_size": case.key_cache.shape[1], "key_rows": key_rows, "value_rows": value_rows}


def run_prepared(
    prepare: Any, case: AttentionCase, tiling: AttentionTiling, launch: Any, dtype: torch.dtype | None = None
) -> Result:
    """Plan a case and run what ``prepare`` makes of its launch, with all that it is to write poisoned before."""
    num_tokens, num_heads, head_size = case.query.shape
    items = torch.full((tiling.max_items, ITEM_FIELDS), -7, dtype=torch.int32)
    counts = torch.full((tiling.num_counts,), -7, dtype=torch.int32)
    window = case.options.get("sliding_window")
    plan_attention(case.seq_lens, case.query_start_loc, items, counts, tiling=tiling, sliding_window=window)
    out = torch.full_like(case.query, torch.nan, dtype=dtype)
    lse = torch.full((num_tokens, num_heads), torch.nan)
    options = AttentionOptions(**{"scale": head_size**-0.5, **case.options})
    partial_rows = tiling.max_slots * tiling.head_tiles * tiling.slot_rows
    partials = torch.full((partial_rows * (head_size + (2 if tiling.batch_invariant else 1)),), torch.nan)
    prepared = prepare(case.query, case.key_cache, case.block_table, tiling, launch, options, out, lse)
    prepared(
        case.query, case.key_cache, case.value_cache, case.block_table, (items, counts), options.alibi_slopes,
        options.sinks, options.k_scale, options.v_scale, partials, out, lse,
    )  # fmt: skip
    assert not counts[3:].any()
    return out, lse


def check_on_the_chip(case: AttentionCase, kind: type, patch: pytest.MonkeyPatch, twice: bool) -> None:
    """The op is served by a kind of launch, within the budget; ``twice``: the same bits again, and counters at 0."""
    from pagedattn.kernels import attention

    served: list[object] = []
    prepare = attention.prepare_hopper

    def record(*given: Any) -> Any:
        served.append(prepare(*given))
        return served[-1]

    patch.setattr(attention, "prepare_hopper", record)
    patch.setattr("pagedattn.ops._prepared", {})
    assert_within_budget(case, *attend(case, "given"))
    assert served
    assert all(isinstance(launch, kind) for launch in served)
    if twice:
        plan = plan_for(case)
        first, again = (attend(case, "given") for _ in range(2))
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        assert not plan.counts[3:].any()
