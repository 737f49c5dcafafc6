"""Blocks copied and swapped on real tensors, and models whose layers see different windows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pagedattn.engine.block_manager import BlockTransfers
from pagedattn.engine.kv_cache import KV_CACHE_DTYPES, KVCache, resolve_kv_cache_dtype
from pagedattn.engine.llm import LLM
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.weights import RANDOM_MODELS, load_model
from tests.device import DEVICE
from tests.engine.checkpoints import make_model, save_directory

CONFIG = RANDOM_MODELS["random"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "all windowed": ("mistral", {"sliding_window": 9}),
    "first full": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "five to two": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "num_hidden_layers": 7,
            "layer_types": [f"{'full' if index % 4 == 3 else 'sliding'}_attention" for index in range(7)],
        },
    ),
}


def numbered(cache: KVCache) -> None:
    """Every block holds its own number."""
    for pool in cache._pools:
        for block_id in range(pool.shape[2]):
            pool[:, :, block_id] = block_id


def numbers(cache: KVCache) -> list[int]:
    """The number in each block, the same in every layer, for keys, values and scales."""
    tensors = [tensor for layer in cache.layers for tensor in layer if tensor is not None]
    found = {tuple(tensor.float().flatten(1).mean(1).tolist()) for tensor in tensors}
    assert len(found) == 1, "layers, or keys and values, differ"
    return [int(value) for value in found.pop()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_transfers(dtype: torch.dtype) -> None:
    cache = KVCache(CONFIG, 8, 4, dtype, DEVICE, num_host_blocks=5)
    numbered(cache)
    # What is swapped out and copied is read before anything is written over it.
    cache.transfer(BlockTransfers(swap_out=((6, 0), (2, 1), (7, 4)), copy=((6, 2), (0, 6), (2, 7))))
    assert numbers(cache) == [0, 1, 6, 3, 4, 5, 0, 2]
    cache.transfer(BlockTransfers(copy=((3, 0),), swap_in=((0, 5), (4, 3), (1, 1))))
    assert numbers(cache) == [3, 2, 6, 7, 4, 6, 0, 2]


@pytest.mark.gpu
def test_host_blocks_are_pinned_and_a_long_swap_overlaps_nothing_it_should_not() -> None:
    cache = KVCache(RANDOM_MODELS["random-135m"], 512, 16, torch.bfloat16, "cuda", num_host_blocks=512)
    assert all(pool.is_pinned() for pool in cache._host_pools)
    pool = cache._pools[0]
    pool.normal_()
    before = pool.clone()
    out = tuple((block_id, 511 - block_id) for block_id in range(512))
    cache.transfer(BlockTransfers(swap_out=out))
    pool.zero_()  # queued behind the copies
    cache.transfer(BlockTransfers(swap_in=tuple((host_id, block_id) for block_id, host_id in out)))
    assert torch.equal(pool, before)


def test_the_null_block_is_zero_and_nobodys() -> None:
    cache = KVCache(replace(CONFIG, sliding_window=(8, None)), 6, 4, torch.float32, DEVICE)
    assert cache.windows == (8, None)
    assert [layer.key.shape[0] for layer in cache.layers] == [7, 7]
    assert not cache.layers[0].key[cache.null_block].any()
    assert cache.layers[0].key.data_ptr() == cache.layers[1].key.data_ptr()
    plain = KVCache(CONFIG, 6, 4, torch.float32, DEVICE)
    assert [layer.key.shape[0] for layer in plain.layers] == [6, 6]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    common = torch.randint(0, 256, (30,), generator=generator).tolist()
    tails = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (1, 7, 20, 45, 64)]
    return [common + tail for tail in tails] + [tail[:9] for tail in tails[2:]]


@torch.inference_mode()
def generate(model: Any, prompt: list[int]) -> list[int]:
    """transformers' greedy tokens."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    result = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0
    )
    return result[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", HYBRIDS)
def test_windows_give_up_what_they_have_passed_and_tokens_stay_transformers(name: str, tmp_path: Path) -> None:
    architecture, overrides = HYBRIDS[name]
    model = make_model(architecture, **overrides)
    expected = [generate(model, prompt) for prompt in prompts()]
    loaded = load_model(save_directory(model, tmp_path), device="cpu")
    windows = KVCache(loaded.config, 1, 4, torch.float32, "cpu").windows
    for options in (
        {"num_blocks": 60 * len(windows), "enable_prefix_caching": False},
        {"num_blocks": 60 * len(windows)},
        {"num_blocks": 30 * len(windows)},
        {"num_blocks": 30 * len(windows), "swap_space": 0.01},
    ):
        llm = LLM(loaded, block_size=4, max_num_batched_tokens=24, max_model_len=120, **options)
        outputs = llm.generate(prompts(), GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == expected, options
        stats = llm.engine.stats()
        assert (stats.prefix_cache_hits > 0) == options.get("enable_prefix_caching", True)
        if "swap_space" in options:
            assert stats.num_swaps == stats.num_preemptions


@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2", "int8", "int4"])
def test_an_engine_on_a_quantized_cache(name: str) -> None:
    """This model's tokens do not change where blocks are shared, computed again or swapped; any model's, where the mode
    is batch-invariant (test_batch_invariance.py)."""
    loaded = load_model("random", device="cpu")  # elsewhere products round by their number of rows
    dtype = KV_CACHE_DTYPES[name]
    assert dtype is not None
    expected = None
    for options, (preempts, swaps) in (
        ({"num_blocks": 200, "enable_prefix_caching": False}, (False, False)),
        ({"num_blocks": 200}, (False, False)),
        ({"num_blocks": 30}, (True, False)),
        ({"num_blocks": 30, "swap_space": 0.01}, (True, True)),
    ):
        llm = LLM(loaded, kv_cache_dtype=name, block_size=4, max_num_batched_tokens=24, max_model_len=100, **options)
        assert isinstance(llm.engine.cache, KVCache)
        layer = llm.engine.cache.layers[0]
        assert {layer.key.dtype, layer.value.dtype} == {dtype}
        tokens = [output.outputs[0].token_ids for output in llm.generate(prompts(), GREEDY, use_tqdm=False)]
        expected = expected or tokens
        assert tokens == expected, options
        stats = llm.engine.stats()
        assert (stats.num_preemptions > 0, stats.num_swaps > 0) == (preempts, swaps), options
        llm.engine.check_integrity()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_graphs_on_a_quantized_cache(name: str) -> None:
    loaded = load_model("random", device="cuda")
    sizes: dict[str, Any] = {"num_blocks": 200, "max_num_batched_tokens": 64, "max_model_len": 100, "max_num_seqs": 8}
    tokens = []
    for eager in (False, True):
        llm = LLM(loaded, kv_cache_dtype=name, enforce_eager=eager, **sizes)
        tokens.append([output.outputs[0].token_ids for output in llm.generate(prompts(), GREEDY, use_tqdm=False)])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.int8, torch.uint8])
def test_bytes_of_a_block(dtype: torch.dtype) -> None:
    cache = KVCache(CONFIG, 8, 4, dtype, "cpu")
    tensors = [tensor for layer in cache.layers for tensor in layer if tensor is not None]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert stored == 8 * KVCache.bytes_per_block(CONFIG, 4, dtype)


def test_heads_that_are_not_pairs_are_not_int4() -> None:
    with pytest.raises(ValueError, match="heads of 7 are not pairs of numbers"):
        resolve_kv_cache_dtype("int4", torch.float32, 7)


def test_a_long_request_holds_only_its_windows_blocks(tmp_path: Path) -> None:
    """Of layers half windowed, 8 blocks of 4 instead of 25 each: more requests fit into the same memory."""
    model = make_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    loaded = load_model(save_directory(model, tmp_path), device="cpu")
    engine = LLM(loaded, block_size=4, num_blocks=100, max_num_batched_tokens=16, enable_prefix_caching=False).engine
    engine.add_request(list(range(90)), replace(GREEDY, max_tokens=10))
    most = 0
    while engine.has_unfinished:
        usage = engine.step().usage
        assert usage is not None
        most = max(most, usage.num_used_blocks)
        engine.check_integrity()
    assert most == 25 + 3  # all of 99 tokens in full layers; at the end a window of 8 lies in 3 blocks
