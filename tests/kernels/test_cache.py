"""Appending, rotating, gathering, copying and merging against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pagedattn
from pagedattn.kernels import cache_reference
from pagedattn.kernels.quantization import LARGEST, dequantize, quantize, token_scale
from tests.device import DEVICE, DTYPES, INTERPRETED, IS_CUDA
from tests.kernels.cases import cache_layout


def inputs(
    seed: int, dtype: torch.dtype, layout: str, block_size: int, heads: int = 3, size: int = 24, tokens: int = 9
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // block_size) + 2
    key_cache, value_cache = (
        t.to(DEVICE) for t in cache_layout(layout, blocks, block_size, heads, (size, size), dtype)
    )
    query = torch.randn(tokens, heads * 2, size, generator=generator).to(DEVICE, dtype)
    key = torch.randn(tokens, heads, size, generator=generator).to(DEVICE, dtype)
    value = torch.randn(tokens, heads, size, generator=generator).to(DEVICE, dtype)
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    slots[tokens // 2] = -1
    return query, key, value, key_cache, value_cache, slots.to(DEVICE)


def assert_appended(cache: Tensor, rows: Tensor, slots: Tensor, **tolerance: float) -> None:
    """The cache holds rows in slots and NaN, as before, everywhere else."""
    expected = torch.full_like(cache, torch.nan, memory_format=torch.contiguous_format)
    for row, slot in zip(rows, slots.tolist(), strict=True):
        if slot >= 0:
            expected[slot // cache.shape[1], slot % cache.shape[1]] = row
    torch.testing.assert_close(cache, expected, equal_nan=True, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved"])
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_append(dtype: torch.dtype, layout: str, block_size: int) -> None:
    _, key, value, key_cache, value_cache, slots = inputs(block_size, dtype, layout, block_size)
    pagedattn.append_kv(key, value, key_cache, value_cache, slots)
    assert_appended(key_cache, key, slots)
    assert_appended(value_cache, value, slots)


def test_append_of_different_value_head_size_and_strided_rows() -> None:
    _, key, value, key_cache, _, slots = inputs(0, DTYPES[0], "NHD", 4)
    qkv = torch.cat((key, value[..., :8]), dim=-1)
    value_cache = torch.full((*key_cache.shape[:3], 8), torch.nan, dtype=key.dtype, device=DEVICE)
    pagedattn.append_kv(qkv[..., :24], qkv[..., 24:], key_cache, value_cache, slots)
    assert_appended(key_cache, key, slots)
    assert_appended(value_cache, value[..., :8], slots)


def test_append_nothing() -> None:
    _, key, value, key_cache, value_cache, slots = inputs(0, DTYPES[0], "NHD", 4)
    pagedattn.append_kv(key[:0], value[:0], key_cache, value_cache, slots[:0])
    pagedattn.append_kv(key, value, key_cache, value_cache, torch.full_like(slots, -1))
    assert key_cache.isnan().all()
    assert value_cache.isnan().all()


def rotated_by_hand(row: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Rotate each pair of [H, D] by its angle through complex multiplication, in fp64."""
    result = row.double().clone()
    half = len(angles)
    for pair, angle in enumerate(angles.double().tolist()):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        turned = torch.complex(result[:, first], result[:, second]) * complex(torch.tensor(1j * angle).exp())
        result[:, first], result[:, second] = turned.real, turned.imag
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [24, 16, 2])
def test_rope_append(dtype: torch.dtype, interleaved: bool, rotary_dim: int) -> None:
    query, key, value, key_cache, value_cache, slots = inputs(rotary_dim, dtype, "NHD", 4)
    generator = torch.Generator().manual_seed(1)
    angles = torch.rand(50, rotary_dim // 2, generator=generator) * 6
    positions = torch.randint(0, 50, (len(key),), generator=generator)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(DEVICE)
    original_query, original_key = query.clone(), key.clone()
    pagedattn.rope_append_kv(
        query, key, value, cos_sin, positions.to(DEVICE), key_cache, value_cache, slots,
        interleaved=interleaved, rotary_dim=rotary_dim,
    )  # fmt: skip
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}[
        dtype
    ]  # one rounding of values near 4
    expected = [
        torch.stack(
            [rotated_by_hand(row, angles[p], interleaved) for row, p in zip(rows.cpu(), positions, strict=True)]
        )
        for rows in (original_query, original_key)
    ]
    torch.testing.assert_close(query.cpu().double(), expected[0], atol=tolerance, rtol=0)
    assert torch.equal(key, original_key)
    assert_appended(key_cache.cpu().double(), expected[1], slots, atol=tolerance, rtol=0)
    assert_appended(value_cache, value, slots)


@pytest.mark.parametrize(("size", "rotary_dim"), [(128, 80), (96, 96), (104, 96), (80, 6)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("cache", ["as dtype", torch.uint8], ids=str)
def test_rotary_dims_that_are_no_powers_of_two(
    size: int, rotary_dim: int, interleaved: bool, cache: torch.dtype | str
) -> None:
    """A rotation of each head, and an append of what it gives; several programs for the heads of one query."""
    generator = torch.Generator().manual_seed(size)
    key, value = torch.randn(2, 3, 2, size, generator=generator).to(DEVICE, torch.float32).unbind()
    query = torch.randn(3, 24, size, generator=generator).to(DEVICE, torch.float32)
    cos_sin = torch.randn(7, rotary_dim, generator=generator).to(DEVICE)
    positions, slots = torch.tensor([6, 0, 3], device=DEVICE), torch.tensor([5, 0, 2], device=DEVICE)
    dtype = torch.float32 if isinstance(cache, str) else cache
    stored = size if isinstance(cache, str) else size // 2
    caches, expected = torch.zeros(2, 2, 2, 3, 2, stored, device=DEVICE).to(dtype).unbind()
    key_cache, value_cache = caches.unbind()
    scales: Any = dict.fromkeys(("k_scale", "v_scale"), torch.full((), 0.3, device=DEVICE)) if stored != size else {}
    rows = cos_sin[positions]
    wanted = cache_reference.rotate(query, rows, interleaved)
    rotated = cache_reference.rotate(key, rows, interleaved)
    cache_reference.append_kv(rotated, value, expected[0], expected[1], slots, **scales)
    pagedattn.rope_append_kv(
        query, key, value, cos_sin, positions, key_cache, value_cache, slots, interleaved=interleaved, **scales
    )
    torch.testing.assert_close(query, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(caches, expected)


def test_no_rotation_is_an_append() -> None:
    """A rotary dimension of 0 is refused by name; what it would mean is append_kv."""
    query, key, value, key_cache, value_cache, slots = inputs(0, DTYPES[0], "NHD", 4)
    positions = torch.zeros(len(key), dtype=torch.int64, device=DEVICE)
    for width in (0, 26, 7):
        with pytest.raises(ValueError, match=r"^cos_sin: "):
            pagedattn.rope_append_kv(
                query, key, value, torch.ones(1, width, device=DEVICE), positions, key_cache, value_cache, slots
            )


def test_choose_append_launch() -> None:
    """Every head has a program, and with few tokens no program has many elements."""
    pytest.importorskip("triton")
    from pagedattn.kernels.cache import FEW_ELEMENTS, MANY_ELEMENTS, MANY_TOKENS, choose_append_launch

    for num_tokens in (1, 256, MANY_TOKENS - 1, MANY_TOKENS, 8192):
        limit = FEW_ELEMENTS if num_tokens < MANY_TOKENS else MANY_ELEMENTS
        for heads, kv_heads, size in ((32, 8, 128), (9, 3, 64), (128, 1, 576), (1, 1, 8), (40, 40, 256)):
            launch = choose_append_launch(num_tokens, heads, kv_heads, size)
            for per_program, total in ((launch.heads, heads), (launch.kv_heads, kv_heads)):
                assert per_program & (per_program - 1) == 0
                assert 1 <= per_program < 2 * total
                assert per_program == 1 or per_program * size <= limit


def test_rope_append_rotates_queries_of_skipped_tokens() -> None:
    query, key, value, key_cache, value_cache, slots = inputs(0, DTYPES[0], "NHD", 4)
    before = query.clone()
    cos_sin = torch.cat((torch.zeros(1, 12), torch.ones(1, 12)), dim=-1).to(DEVICE)  # a quarter turn
    positions = torch.zeros(len(key), dtype=torch.int64, device=DEVICE)
    pagedattn.rope_append_kv(query, key, value, cos_sin, positions, key_cache, value_cache, torch.full_like(slots, -1))
    assert torch.equal(query, torch.cat((-before[..., 12:], before[..., :12]), dim=-1))


SPECIAL = (0.0, -0.0, 1e-9, -3e-8, 0.0019, 0.5, 1.5, 2.5, -2.5, 447.9, 1e9, float("inf"), float("-inf"), float("nan"))


@pytest.mark.parametrize("cache_dtype", list(LARGEST), ids=str)
@pytest.mark.parametrize("scales", ["tensor", "head", "token"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved"])
def test_quantized_append(cache_dtype: torch.dtype, scales: str, dtype: torch.dtype, layout: str) -> None:
    """Bit for bit what the reference stores, its scales too, and nothing beside; odd sizes and special values."""
    generator = torch.Generator().manual_seed(0)
    blocks, block_size, heads, size, size_v, tokens = 3, 5, 3, 40, 24, 11
    key = torch.randn(tokens, heads, size, generator=generator) * 3
    value = torch.randn(tokens, heads, size_v, generator=generator) * 0.1
    key[0, 0, : len(SPECIAL)] = torch.tensor(SPECIAL)
    if cache_dtype in (torch.int8, torch.uint8):
        key[key.isnan()] = 0.0  # as an integer it is nothing
    key[1] = 0.0
    if scales == "token":
        key[~key.isfinite()] = 5.0
    key, value = key.to(dtype), value.to(dtype)
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    slots[tokens // 2] = -1
    shape = {"tensor": (), "head": (heads,), "token": (blocks, block_size, heads)}[scales]
    given = [(torch.rand(shape, generator=generator) + 0.5) * 5 / LARGEST[cache_dtype] for _ in range(2)]
    results = []
    # The reference runs on the CPU: on CUDA torch divides by a number as it multiplies by its inverse.
    for append, device in ((pagedattn.append_kv, DEVICE), (cache_reference.append_kv, torch.device("cpu"))):
        caches = cache_layout(layout, blocks, block_size, heads, (size, size_v), cache_dtype)
        if layout == "interleaved":  # two views of one tensor: move it as one
            both = torch.cat(caches, dim=-1).to(device)
            caches = (both[..., : caches[0].shape[-1]], both[..., caches[0].shape[-1] :])
        elif layout == "HND":
            caches = (
                caches[0].transpose(1, 2).to(device).transpose(1, 2),
                caches[1].transpose(1, 2).to(device).transpose(1, 2),
            )
        else:
            caches = (caches[0].to(device), caches[1].to(device))
        used = [scale.clone().to(device) for scale in given]
        append(key.to(device), value.to(device), *caches, slots.to(device), k_scale=used[0], v_scale=used[1])
        results.append([*(cache.contiguous().view(torch.uint8).cpu() for cache in caches), *(u.cpu() for u in used)])
    for ours, expected in zip(*results, strict=True):
        if ours.dtype == torch.uint8 and cache_dtype.is_floating_point:  # a NaN has several spellings
            ours, expected = (t.view(cache_dtype).float().nan_to_num(1e6) for t in (ours, expected))
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("cache_dtype", list(LARGEST), ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [24, 16, 6])
def test_quantized_rope_append(cache_dtype: torch.dtype, interleaved: bool, rotary_dim: int) -> None:
    """One launch rotates and quantizes as the reference does in two steps."""
    query, key, value, *_, slots = inputs(rotary_dim, DTYPES[0], "NHD", 4)
    angles = torch.rand(50, rotary_dim // 2, generator=torch.Generator().manual_seed(1)) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(DEVICE)
    positions = torch.arange(len(key), device=DEVICE) * 3
    results = []
    for append, device in ((pagedattn.rope_append_kv, DEVICE), (cache_reference.rope_append_kv, torch.device("cpu"))):
        caches = [c.to(device) for c in cache_layout("NHD", 5, 4, 3, (24, 24), cache_dtype)]
        scales = [torch.full((5, 4, 3), torch.nan, device=device) for _ in range(2)]
        given: list[Tensor] = [tensor.clone().to(device) for tensor in (query, key, value, cos_sin, positions)]
        given += [*caches, slots.to(device)]
        append(*given, interleaved=interleaved, k_scale=scales[0], v_scale=scales[1])  # type: ignore[misc]
        results.append([dequantize(c.cpu(), s.cpu()) for c, s in zip(caches, scales, strict=True)])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours.nan_to_num(1e6), expected.nan_to_num(1e6))


@pytest.mark.parametrize("dtype", list(LARGEST), ids=str)
def test_quantized_append_is_accurate(dtype: torch.dtype) -> None:
    """Every kind of scale; per-token scales are written so that the largest element survives exactly."""
    generator = torch.Generator().manual_seed(0)
    key, value = (t.to(DEVICE) for t in torch.randn(2, 5, 3, 16, generator=generator).unbind())
    slots = torch.tensor([3, 9, -1, 0, 11], device=DEVICE)
    stored_size = 8 if dtype == torch.uint8 else 16
    step = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}.get(dtype)
    for shape in ((), (3,), (3, 4, 3)):
        zeros = torch.zeros(2, 3, 4, 3, stored_size, dtype=torch.uint8, device=DEVICE)
        key_cache, value_cache = zeros.view(dtype).unbind()
        k_scale, v_scale = torch.full((2, *shape), 5.0 / LARGEST[dtype], device=DEVICE).unbind()
        pagedattn.append_kv(key, value, key_cache, value_cache, slots, k_scale=k_scale, v_scale=v_scale)
        for rows, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
            for row, slot in zip(rows, slots.tolist(), strict=True):
                if slot < 0:
                    continue
                index = (slot // 4, slot % 4)
                used = scale[index] if scale.dim() == 3 else scale
                got = dequantize(cache[index], used)
                unit = used if used.dim() == 0 else used[:, None]
                limit = unit * 0.5 if step is None else row.abs() * step + unit
                assert ((got - row).abs() <= limit * 1.001).all()
                if scale.dim() == 3:
                    torch.testing.assert_close(got.abs().amax(-1), row.abs().amax(-1))


def test_quantize_saturates_and_packs_low_nibble_first() -> None:
    values = torch.tensor([[100.0, -100.0, 1.0, -2.0]])
    assert quantize(values, torch.uint8, None).tolist() == [[7 | (9 << 4), 1 | (14 << 4)]]
    assert quantize(values * 1e5, torch.float8_e4m3fn, None).float().tolist() == [[448.0, -448.0, 448.0, -448.0]]
    assert token_scale(torch.zeros(1, 4), torch.int8).tolist() == [1.0]


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_gather_reads_what_append_wrote(block_size: int) -> None:
    lengths = [7, 0, 12]
    generator = torch.Generator().manual_seed(block_size)
    blocks = sum(-(-n // block_size) for n in lengths) + 1
    key_cache, value_cache = (t.to(DEVICE) for t in cache_layout("HND", blocks, block_size, 2, (16, 16), torch.float32))
    table = torch.full((3, -(-12 // block_size) + 1), 2**30, dtype=torch.int32, device=DEVICE)
    ids = torch.randperm(blocks, generator=generator).tolist()
    rows = []
    for sequence, length in enumerate(lengths):
        needed = -(-length // block_size)
        table[sequence, :needed] = torch.tensor([ids.pop() for _ in range(needed)], dtype=torch.int32)
        position = torch.arange(length, device=DEVICE)
        slots = table[sequence, position // block_size] * block_size + position % block_size
        row = torch.randn(length, 2, 16, generator=generator).to(DEVICE)
        pagedattn.append_kv(row, -row, key_cache, value_cache, slots.to(torch.int64))
        rows.append(row)
    key, value = pagedattn.gather_kv(
        key_cache,
        value_cache,
        table,
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        max_seq_len=14,
        dtype=torch.float16,
    )
    assert key.shape == (3, 14, 2, 16)
    for sequence, row in enumerate(rows):
        assert torch.equal(key[sequence, : len(row)], row.half())
        assert not key[sequence, len(row) :].any()
    assert torch.equal(value, -key)


def test_copy_reads_before_it_writes() -> None:
    key = torch.arange(4.0, device=DEVICE).view(4, 1, 1, 1).expand(4, 2, 1, 8).contiguous()
    value = -key
    mapping = torch.tensor([[0, 1], [1, 0], [3, 2]], device=DEVICE)
    pagedattn.copy_blocks(key, value, key, value, mapping)
    assert key[:, 0, 0, 0].tolist() == [1.0, 0.0, 3.0, 3.0]
    assert torch.equal(value, -key)


def test_copy_of_values_that_share_the_keys_memory() -> None:
    key = torch.rand(4, 2, 1, 16, device=DEVICE)
    before = key.clone()
    pagedattn.copy_blocks(key, key[..., :8], key, key[..., :8], torch.tensor([[0, 1], [1, 0]], device=DEVICE))
    assert torch.equal(key, before[[1, 0, 2, 3]])


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the op takes this way by itself")
@pytest.mark.parametrize(
    ("layout", "to"), [("NHD", "NHD"), ("HND", "HND"), ("interleaved", "NHD"), ("HND", "interleaved")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8], ids=str)
def test_copy_in_one_launch(layout: str, to: str, dtype: torch.dtype) -> None:
    """What runs between a GPU and pinned memory, with more chunks than programs, and ends of blocks that fill none."""
    from pagedattn.kernels import copy

    size = 600 * (2 if dtype == torch.uint8 else 1)
    key, value = cache_layout(layout, 5, 4, 3, (size, size), dtype)
    for cache in (key, value):
        cache.copy_(torch.randint(0, 100, cache.shape))
    copies = [t.zero_() for t in cache_layout(to, 5, 4, 3, (size, size), dtype)]
    mapping = torch.tensor([[0, 4], [3, 3], [4, 0]])
    copy.copy_blocks(key, value, copies[0], copies[1], mapping)
    for source, target in zip((key, value), copies, strict=True):
        assert torch.equal(target[[4, 3, 0]], source[[0, 3, 4]])
        assert not target[[1, 2]].any()


@pytest.mark.gpu
@pytest.mark.skipif(not IS_CUDA, reason="pinned memory needs a GPU")
@pytest.mark.parametrize("mapping_device", ["cuda", "cpu"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint8], ids=str)
def test_copy_through_pinned_memory_on_a_side_stream(mapping_device: str, layout: str, dtype: torch.dtype) -> None:
    """Out and back without a synchronization, while the stream is still busy with what came before."""
    generator = torch.Generator().manual_seed(0)
    shape = (6, 16, 8, 128)
    device_caches: list[Tensor] = []
    host_caches: list[Tensor] = []
    for _ in range(2):
        bits = torch.randint(0, 100, shape, generator=generator, dtype=torch.uint8).to(DEVICE)
        cache = bits.to(dtype) if dtype == torch.bfloat16 else bits.view(dtype)
        host = torch.zeros(shape, dtype=dtype).pin_memory()
        if layout == "HND":
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
            host = torch.zeros(6, 8, 16, 128, dtype=dtype).pin_memory().transpose(1, 2)
        device_caches.append(cache)
        host_caches.append(host)
    restored = [torch.zeros_like(cache) for cache in device_caches]
    copy: Any = pagedattn.copy_blocks
    out = torch.tensor([[5, 0], [1, 2], [2, 1]], device=mapping_device)
    back = torch.tensor([[0, 5], [2, 1], [1, 2]], device=mapping_device)
    copy(*device_caches, *host_caches, out)  # compile, and let the allocators have their memory
    copy(*host_caches, *restored, back)
    torch.cuda.synchronize()
    for cache in (*host_caches, *restored):
        cache.view(torch.uint8).zero_()
    torch.cuda.synchronize()
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            copy(*device_caches, *host_caches, out)
            copy(*host_caches, *restored, back)
            done.record()
            was_busy = not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert was_busy
    done.synchronize()
    for cache, host, again in zip(device_caches, host_caches, restored, strict=True):
        bits, host_bits, again_bits = (t.view(torch.uint8) for t in (cache, host, again))
        assert torch.equal(host_bits[[0, 2, 1]], bits[[5, 1, 2]].cpu())
        assert torch.equal(again_bits[[5, 1, 2]], bits[[5, 1, 2]])
        assert not again_bits[[0, 3, 4]].any()


@pytest.mark.gpu
@pytest.mark.skipif(not IS_CUDA, reason="copies between memories need a GPU")
@pytest.mark.parametrize("pinned", [False, True])
def test_copy_between_host_and_device_of_other_layouts(pinned: bool) -> None:
    """In one launch where the host's memory is pinned, through staging where it is not."""
    key, value = torch.randn(2, 4, 2, 3, 8, device=DEVICE).unbind()
    host = [torch.zeros(4, 3, 2, 8).transpose(1, 2) for _ in range(2)]
    host = [t.pin_memory() if pinned else t for t in host]
    mapping = torch.tensor([[0, 3], [2, 1]], device=DEVICE)
    pagedattn.copy_blocks(key, value, host[0], host[1], mapping)
    torch.cuda.synchronize()
    assert torch.equal(host[0][[3, 1]], key[[0, 2]].cpu())
    assert torch.equal(host[1][[3, 1]], value[[0, 2]].cpu())


def test_merge_of_parts_is_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 20, generator=generator, dtype=torch.float64)
    values = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    parts = [
        (logits[..., s].softmax(-1) @ values[s], logits[..., s].logsumexp(-1)) for s in (slice(0, 5), slice(5, 20))
    ]
    (out_a, lse_a), (out_b, lse_b) = [(o.float().to(DEVICE), n.float().to(DEVICE)) for o, n in parts]
    out, lse = pagedattn.merge_attention_states(out_a, lse_a, out_b, lse_b)
    torch.testing.assert_close(out.cpu().double(), logits.softmax(-1) @ values, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.cpu().double(), logits.logsumexp(-1), atol=1e-6, rtol=1e-5)
    nothing = torch.full_like(lse_a, -torch.inf)
    out, lse = pagedattn.merge_attention_states(out_a, lse_a, torch.zeros_like(out_b), nothing)
    torch.testing.assert_close((out, lse), (out_a, lse_a))
    out, lse = pagedattn.merge_attention_states(torch.zeros_like(out_a), nothing, torch.zeros_like(out_b), nothing)
    assert not out.any()
    assert lse.isneginf().all()
