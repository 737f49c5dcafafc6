"""Attention of sequences that share a prefix: one pass over the prefix for all of them, one over what is their own.

Cascade inference (Ye et al., 2024, "Cascade Inference: Memory Bandwidth Efficient Shared Prefix Batch Decoding"): the
prefix's keys and values are read once for a tile of query tokens of many sequences instead of once for each sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagedattn import ops
from pagedattn.checks import check_block_ids, check_index, fail, require_int, require_tensor


def shared_prefix_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    prefix_blocks: Tensor,
    prefix_len: int,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    max_query_len: int,
    max_seq_len: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention over a common prefix and each sequence's own tokens behind it.

    Args:
        query: [T, Hq, D], the new tokens, which are own tokens of their sequences.
        key_cache, value_cache, k_scale, v_scale: as in ``paged_attention``.
        prefix_blocks: int32 [P], the prefix's blocks.
        prefix_len: tokens of the prefix, a host int from 1 to P * S.
        block_table: int32 [B, max_blocks], the blocks of each sequence's own tokens.
        seq_lens: int32 [B], own tokens, the new ones included, the prefix not; at least the query lengths.
        query_start_loc, max_query_len, scale, softcap, sinks: as in ``paged_attention``.
        max_seq_len: upper bound of ``seq_lens``.

    Returns:
        [T, Hq, Dv] and the log-sum-exp, fp32 [T, Hq]; 0 and -inf in rows past query_start_loc[B].

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    require_tensor("prefix_blocks", prefix_blocks)
    own, own_lse = ops.paged_attention(
        query, key_cache, value_cache, block_table, seq_lens, query_start_loc,
        max_query_len=max_query_len, max_seq_len=max_seq_len, scale=scale, softcap=softcap, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, return_lse=True,
    )  # fmt: skip
    check_index("prefix_blocks", prefix_blocks, torch.int32, 1, query.device)
    limit = prefix_blocks.shape[0] * key_cache.shape[1]
    require_int("prefix_len", prefix_len)
    if not 1 <= prefix_len <= limit:
        fail("prefix_len", prefix_len, f"within 1..{limit}, what prefix_blocks hold")
    if ops.CHECK_VALUES:
        check_block_ids("prefix_blocks", prefix_blocks[: -(-prefix_len // key_cache.shape[1])], key_cache.shape[0])
    # To the prefix all query tokens are one batch, of rows no longer than it: a query must not lie before position 0.
    num_tokens = query.shape[0]
    step = max(1, min(prefix_len, num_tokens))
    rows = -(-num_tokens // step)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=query.device) * step
    prefix, prefix_lse = ops.paged_attention(
        query, key_cache, value_cache, prefix_blocks.expand(rows, -1), seq_lens.new_full((rows,), prefix_len),
        torch.minimum(starts, query_start_loc[-1]),
        max_query_len=step, max_seq_len=prefix_len, scale=scale, causal=False, softcap=softcap,
        k_scale=k_scale, v_scale=v_scale, return_lse=True,
    )  # fmt: skip
    return ops.merge_attention_states(prefix, prefix_lse, own, own_lse)
