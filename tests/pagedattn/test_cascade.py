"""Attention over a shared prefix and own tokens is attention over both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pagedattn
from tests.device import DEVICE, DTYPES
from tests.kernels.budget import assert_within_budget
from tests.kernels.cases import build_case
from tests.kernels.oracle import AttentionCase


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix_len", [16, 160, 512])
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}, {"sinks": True}], ids=["plain", "softcap", "sinks"])
def test_shared_prefix(dtype: torch.dtype, prefix_len: int, options: dict[str, object]) -> None:
    """Against the oracle on tables that hold the prefix's blocks before each sequence's own; padding rows are 0."""
    generator = torch.Generator().manual_seed(prefix_len)
    own, query_lens = [7, 30, 1, 19], [1, 30, 1, 3]
    if "sinks" in options:
        options = {"sinks": torch.randn(6, generator=generator).to(DEVICE)}
    case = build_case(
        generator=generator, dtype=dtype, num_heads=6, num_kv_heads=2, head_size=32, block_size=16,
        seq_lens=[prefix_len + n for n in own], query_lens=query_lens, padding_rows=3,
    ).to(DEVICE)  # fmt: skip
    blocks = prefix_len // 16
    prefix_blocks = case.block_table[0, :blocks].clone()
    case.block_table[:, :blocks] = prefix_blocks
    case.options = dict(options)
    out, lse = pagedattn.shared_prefix_attention(
        case.query, case.key_cache, case.value_cache, prefix_blocks, prefix_len, case.block_table[:, blocks:],
        case.seq_lens - prefix_len, case.query_start_loc, max_query_len=case.max_query_len, **options,
    )  # fmt: skip
    assert_within_budget(case, out, lse)


def arguments() -> tuple[AttentionCase, torch.Tensor]:
    case = build_case(
        generator=torch.Generator().manual_seed(0), dtype=DTYPES[0], num_heads=2, num_kv_heads=1, head_size=16,
        block_size=4, seq_lens=[9], query_lens=[1],
    ).to(DEVICE)  # fmt: skip
    return case, case.block_table[0, :2].clone()


@pytest.mark.parametrize(
    ("prefix_len", "error"), [(0, ValueError), (9, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_bad_prefix_lengths(prefix_len: object, error: type[Exception]) -> None:
    case, blocks = arguments()
    query, key_cache, value_cache, table, seq_lens, starts = case.arguments()
    call: Any = pagedattn.shared_prefix_attention
    with pytest.raises(error, match=r"^prefix_len: "):
        call(query, key_cache, value_cache, blocks, prefix_len, table, seq_lens, starts, max_query_len=1)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda blocks: None, TypeError),
        (lambda blocks: [0, 1], TypeError),
        (lambda blocks: blocks[None], ValueError),
        (lambda blocks: blocks.long(), ValueError),
        (lambda blocks: blocks + 1000, ValueError),  # found by the checks of values
    ],
)
def test_bad_prefix_blocks(change: Any, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagedattn.ops, "CHECK_VALUES", True)
    case, blocks = arguments()
    query, key_cache, value_cache, table, seq_lens, starts = case.arguments()
    call: Any = pagedattn.shared_prefix_attention
    call(query, key_cache, value_cache, blocks, 8, table, seq_lens, starts, max_query_len=1)
    with pytest.raises(error, match=r"^prefix_blocks: "):
        call(query, key_cache, value_cache, change(blocks), 8, table, seq_lens, starts, max_query_len=1)
    with pytest.raises(TypeError, match=r"^key_cache: "):
        call(query, None, value_cache, blocks, 8, table, seq_lens, starts, max_query_len=1)
