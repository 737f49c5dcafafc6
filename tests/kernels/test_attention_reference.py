"""The reference against the fp64 oracle, each feature alone and several together, and what it keeps in memory."""

from __future__ import annotations

import pytest
import torch

from pagedattn.kernels import attention_reference
from pagedattn.kernels.options import AttentionOptions
from tests.kernels.budget import assert_within_budget
from tests.kernels.cases import build_case
from tests.kernels.oracle import AttentionCase


def attend(case: AttentionCase, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, size = case.query.shape
    size_v = case.value_cache.shape[3] * (2 if case.value_cache.dtype == torch.uint8 else 1)
    out = torch.full((tokens, heads, size_v), torch.nan, dtype=dtype)
    lse = torch.full((tokens, heads), torch.nan)
    options = AttentionOptions(size**-0.5, **case.options)
    attention_reference.paged_attention(*case.arguments(), options=options, out=out, lse=lse)
    return out, lse


def make_case(seed: int, **options: object) -> AttentionCase:
    return build_case(
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float32,
        num_heads=6,
        num_kv_heads=2,
        head_size=32,
        block_size=8,
        seq_lens=[70, 9, 0, 33],
        query_lens=[5, 9, 1, 1],
        padding_rows=2,
        **options,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 3.0},
        {"attention_chunk": 16},
        {"attention_chunk": 16, "causal": False},
        {"alibi_slopes": torch.linspace(0.1, 1, 6)},
        {"alibi_slopes": torch.linspace(0.1, 1, 6), "causal": False},
        {"sinks": torch.linspace(-1, 3, 6)},
        {"softcap": 5.0, "sinks": torch.zeros(6), "sliding_window": 12, "alibi_slopes": torch.linspace(0, 1, 6)},
    ],
    ids=lambda options: "+".join(options),
)
def test_masks_and_biases(options: dict[str, object]) -> None:
    case = make_case(1, **options)
    assert_within_budget(case, *attend(case))


def test_tree_mask() -> None:
    case = make_case(2)
    generator = torch.Generator().manual_seed(0)
    tree = torch.rand(case.query.shape[0], case.max_query_len, generator=generator) < 0.5
    for options in ({}, {"sliding_window": 6}, {"sinks": torch.zeros(6)}):
        case.options = {"tree_mask": tree, **options}
        assert_within_budget(case, *attend(case))


def test_tree_mask_of_a_chain_is_causal() -> None:
    case = make_case(2)
    expected = attend(case)
    index = (
        torch.arange(case.query.shape[0])[:, None]
        - case.query_start_loc[
            torch.searchsorted(case.query_start_loc, torch.arange(case.query.shape[0], dtype=torch.int32), right=True)
            - 1
        ][:, None]
    )
    case.options["tree_mask"] = index >= torch.arange(case.max_query_len)
    torch.testing.assert_close(attend(case), expected)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("scales", ["tensor", "head", "token"])
def test_quantized_caches(cache_dtype: torch.dtype, scales: str) -> None:
    case = make_case(3)
    blocks, block_size, heads, size = case.key_cache.shape
    generator = torch.Generator().manual_seed(1)
    shape = {"tensor": (), "head": (heads,), "token": (blocks, block_size, heads)}[scales]
    for name in ("key_cache", "value_cache"):
        stored = torch.randint(0, 256, (blocks, block_size, heads, size), dtype=torch.uint8, generator=generator)
        if cache_dtype == torch.uint8:
            stored = stored[..., : size // 2].contiguous()
        elif cache_dtype == torch.int8:
            stored = stored.view(torch.int8)
        else:
            stored = (stored.float() / 64 - 2).to(cache_dtype)
        setattr(case, name, stored)
    case.options |= {n: torch.rand(shape, generator=generator) * 0.1 + 0.01 for n in ("k_scale", "v_scale")}
    assert_within_budget(case, *attend(case))


def test_fp8_query() -> None:
    case = make_case(4)
    case.query = case.query.to(torch.float8_e4m3fn)
    for name in ("key_cache", "value_cache"):
        setattr(case, name, getattr(case, name).nan_to_num(0).to(torch.float8_e4m3fn))
    case.options["q_scale"] = torch.tensor([0.5, 2.0])
    out, lse = attend(case, torch.bfloat16)
    assert_within_budget(case, out, lse)


def test_value_head_size_differs_and_shares_memory() -> None:
    case = make_case(5)
    case.value_cache = case.key_cache[..., :16]
    out, lse = attend(case)
    assert out.shape[-1] == 16
    assert_within_budget(case, out, lse)


def test_working_memory_is_bounded() -> None:
    """63 short sequences beside a long one are not padded to it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class LargestTensor(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    blocks = 65_536 // 16
    cache = torch.zeros(blocks, 16, 1, 16)
    table = torch.arange(blocks, dtype=torch.int32).expand(64, -1)
    lengths = torch.tensor([65_536] + [256] * 63, dtype=torch.int32)
    starts = torch.arange(65, dtype=torch.int32)
    query = torch.randn(64, 4, 16)
    with LargestTensor() as largest:
        attention_reference.paged_attention(
            query, cache.clone(), cache.clone(), table, lengths, starts,
            options=AttentionOptions(1.0), out=torch.empty_like(query), lse=torch.empty(64, 4),
        )  # fmt: skip
    assert largest.elements <= max(attention_reference.GATHERED, attention_reference.LOGITS)


def test_what_is_kept_of_a_long_prefill_is_bounded() -> None:
    """Masks and positions of 32k query tokens are more than is kept; what was not kept is made again, the same."""
    visibility = attention_reference.Visibility(causal=True, sliding_window=None, attention_chunk=None)
    batch = attention_reference.cut_batch((32_768,), (0, 32_768), 16, 8, 2 * 8 * 128, visibility)
    needed = 0
    for group in batch:
        needed += group.num_bytes
    assert batch.num_results == 32_768
    assert needed > attention_reference.REMEMBERED >= batch.num_kept_bytes > 0
    assert [group.rows[0].item() for group in batch] == sorted(range(0, 32_768, 256))


def test_a_batch_too_large_to_keep_attends_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(6)
    expected = attend(case)
    for remembered in (0, 2000):
        monkeypatch.setattr(attention_reference, "REMEMBERED", remembered)
        attention_reference.cut_batch.cache_clear()
        for _ in range(2):
            assert all(torch.equal(ours, other) for ours, other in zip(attend(case), expected, strict=True))
