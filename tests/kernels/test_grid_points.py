"""Points of other projects' test grids that draws would reach by chance only; ``docs/peer-tests.md`` has the grids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pagedattn
from tests.device import DEVICE, DTYPES, INTERPRETED, IS_CUDA
from tests.kernels.budget import assert_within_budget
from tests.kernels.cases import build_case
from tests.kernels.oracle import AttentionCase
from tests.kernels.test_attention import attend


def make_case(**changes: Any) -> AttentionCase:
    return build_case(
        **{
            "generator": torch.Generator().manual_seed(0),
            "dtype": DTYPES[0],
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_size": 32,
            "block_size": 16,
            "seq_lens": [40],
            "query_lens": [1],
            **changes,
        }
    )


@pytest.mark.parametrize("block_size", [2, 5, 7, 784, 1024, 1040, 1056, 1568])
@pytest.mark.parametrize("plan", ["given", "batch invariant"])
def test_block_sizes(block_size: int, plan: str) -> None:
    """Tables of a few large blocks, and a sequence that ends with its block."""
    lengths = [block_size, min(block_size + 1, 900 if INTERPRETED else 10_000), 3]
    case = make_case(block_size=block_size, seq_lens=lengths, query_lens=[1, 2, 3]).to(DEVICE)
    assert_within_budget(case, *attend(case, plan))


def check_decode_and_prefill(**changes: Any) -> None:
    """One token of a sequence of three blocks, and a chunk of another that begins within a block."""
    for query_lens in ([1, 1], [1, 21]):
        case = make_case(seq_lens=[40, 33], query_lens=query_lens, **changes).to(DEVICE)
        assert_within_budget(case, *attend(case))


@pytest.mark.parametrize("head_size", range(8, 257, 8))
def test_head_sizes(head_size: int) -> None:
    check_decode_and_prefill(head_size=head_size)


@pytest.mark.parametrize(
    ("head_size", "head_size_v"), [(64, 256), (64, 512), (128, 512), (256, 128), (512, 256), (576, 128)]
)
def test_values_of_another_size(head_size: int, head_size_v: int) -> None:
    check_decode_and_prefill(head_size=head_size, head_size_v=head_size_v)


@pytest.mark.parametrize("ratio", [24, 32, 33, 48, 63])
def test_query_heads_of_a_key_head(ratio: int) -> None:
    check_decode_and_prefill(num_heads=2 * ratio)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter walks a sequence in minutes")
@pytest.mark.parametrize("length", [16_385, 33_001, 131_072] if IS_CUDA else [33_001])
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 128}, {"attention_chunk": 8192}, {"sinks": True}], ids=lambda o: "+".join(o)
)
def test_long_sequences(length: int, options: dict[str, Any]) -> None:
    if "sinks" in options:
        options = {"sinks": torch.linspace(-1, 4, 4)}
    case = make_case(seq_lens=[length, 7], query_lens=[2, 1], num_heads=4, num_kv_heads=1, head_size=64, **options).to(
        DEVICE
    )
    for plan in ("given", "batch invariant"):
        assert_within_budget(case, *attend(case, plan))


@pytest.mark.parametrize("batch", [256, 533, 1025] if IS_CUDA else [256, 533])
def test_hundreds_of_sequences(batch: int) -> None:
    """More than a plan has lanes for at the usual sizes, some of them empty, one long."""
    if INTERPRETED:
        batch = batch // 16 + 1
    seq_lens = [(7 * n) % 23 for n in range(batch - 1)] + [400]
    query_lens = [min(1, length) for length in seq_lens]
    case = make_case(
        seq_lens=seq_lens, query_lens=query_lens, num_heads=2, num_kv_heads=1, head_size=16, padding_rows=3
    ).to(DEVICE)
    for plan in ("given", "batch invariant"):
        assert_within_budget(case, *attend(case, plan))


@pytest.mark.parametrize(
    "magnitude", [64.0, 66.2]
)  # logits near -46,000 and -49,600, past the largest fp16 with scale 1
@pytest.mark.parametrize("visible", [1, 2, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_near_minus_fifty_thousand(magnitude: float, visible: int, dtype: torch.dtype) -> None:
    """All keys alike: the output is the mean of the values, and the log-sum-exp is one logit and the count's log."""
    case = make_case(dtype=dtype, head_size=128, seq_lens=[visible])
    size = case.query.shape[2]
    case.query.fill_(magnitude)
    used = case.block_table[0, : -(-visible // 16)].long()
    keys = case.key_cache[used].isnan()
    case.key_cache[used] = torch.full_like(case.key_cache[used], -magnitude).masked_fill(keys, torch.nan)
    case = case.to(DEVICE)
    values = case.value_cache[used.to(DEVICE)].flatten(0, 1)[:visible].double()
    for plan in ("given", "batch invariant"):
        out, lse = attend(case, plan)
        logit = -(float(case.query[0, 0, 0]) ** 2) * size**0.5
        expected = torch.full_like(lse, logit + torch.tensor(float(visible)).log().item())
        torch.testing.assert_close(lse, expected, rtol=1e-6, atol=1e-4 if visible == 1 else 2e-2)
        rounding = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-3}[dtype]
        mean = values.mean(0).repeat_interleave(2, 0)
        torch.testing.assert_close(out[0].double(), mean, rtol=rounding, atol=rounding)


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, from one element past an aligned address on."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    moved = storage[1:].view(tensor.shape)
    moved.copy_(tensor)
    assert moved.data_ptr() % 16
    return moved


def test_pointers_that_are_not_multiples_of_sixteen() -> None:
    """Each tensor of a call alone, after an aligned call of the same shapes: it takes other compiled code."""
    case = make_case(seq_lens=[70, 9], query_lens=[1, 3]).to(DEVICE)
    expected = attend(case)
    for name in ("query", "key_cache", "value_cache", "block_table", "seq_lens", "query_start_loc"):
        aligned = getattr(case, name)
        setattr(case, name, misaligned(aligned.contiguous()))
        for ours, theirs in zip(attend(case), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
        setattr(case, name, aligned)


def test_append_of_pointers_that_are_not_multiples_of_sixteen() -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 5, 2, 32, generator=generator).to(DEVICE, DTYPES[0]).unbind()
    slots = torch.tensor([3, -1, 9, 0, 7], device=DEVICE)
    for move in (lambda t: t, misaligned):
        caches = [move(torch.zeros(3, 4, 2, 32, dtype=key.dtype, device=DEVICE)) for _ in range(2)]
        pagedattn.append_kv(move(key), move(value), caches[0], caches[1], slots)
        for cache, rows in zip(caches, (key, value), strict=True):
            assert torch.equal(cache.flatten(0, 1)[slots[[0, 2, 3, 4]]], rows[[0, 2, 3, 4]])
            assert int(cache.flatten(0, 1).any(-1).any(-1).sum()) == 4


@pytest.mark.parametrize("heads", [13])
@pytest.mark.parametrize("size", [40, 72])
def test_rows_that_no_vector_divides(heads: int, size: int) -> None:
    case = make_case(num_heads=heads, num_kv_heads=heads, head_size=size, seq_lens=[19], query_lens=[2]).to(DEVICE)
    assert_within_budget(case, *attend(case))


@pytest.mark.parametrize("parts", [3, 17, 100])
def test_merge_of_many_partials(parts: int) -> None:
    """Folded one after the other, some of them empty: the attention over all of them."""
    generator = torch.Generator().manual_seed(parts)
    logits = torch.randn(parts, 6, 4, 5, generator=generator, dtype=torch.float64) * 3
    values = torch.randn(parts, 5, 8, generator=generator, dtype=torch.float64)
    logits[1] = -torch.inf
    partials = [
        (part.softmax(-1).nan_to_num(0) @ values[number], part.logsumexp(-1)) for number, part in enumerate(logits)
    ]
    (out, lse), *others = [(out.to(DEVICE, torch.float32), lse.to(DEVICE, torch.float32)) for out, lse in partials]
    for other, other_lse in others:
        out, lse = pagedattn.merge_attention_states(out, lse, other, other_lse)
    together = logits.permute(1, 2, 0, 3).flatten(2)
    torch.testing.assert_close(out.cpu().double(), together.softmax(-1) @ values.flatten(0, 1), rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(lse.cpu().double(), together.logsumexp(-1), rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("longest", [4096 if not INTERPRETED else 300, 32_768 if IS_CUDA else 500])
def test_gather_of_one_long_row(longest: int) -> None:
    lengths = [17, longest, 0, 71]
    columns = -(-longest // 16)
    cache = torch.randn(columns + 8, 16, 1, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    table = torch.randint(0, columns + 8, (4, columns), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    keys, values = pagedattn.gather_kv(cache, -cache, table.to(DEVICE), lens, max_seq_len=longest)
    for row, length in enumerate(lengths):
        expected = cache[table[row].to(DEVICE).long()].flatten(0, 1)[:length]
        assert torch.equal(keys[row, :length], expected)
        assert not keys[row, length:].any()
    assert torch.equal(values, -keys)
