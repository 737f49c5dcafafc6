from __future__ import annotations

import pytest
import torch

from pagedattn.engine import cache_size
from pagedattn.engine.kv_cache import KVCache
from pagedattn.engine.llm import LLM
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.weights import load_model


def blocks_on_cpu(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> tuple[int, int]:
    """Default number of blocks with so much free memory, and the bytes of one."""
    decoder = load_model("random", device="cpu").decoder
    monkeypatch.setattr(cache_size, "_free_cpu_memory", lambda: free_bytes)
    num_blocks = cache_size.default_num_blocks(
        decoder,
        block_size=16,
        max_model_len=100,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        gpu_memory_utilization=0.9,
    )
    return num_blocks, KVCache.bytes_per_block(decoder.config, 16, decoder.dtype)


def test_no_more_blocks_than_the_sequences_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks_on_cpu(monkeypatch, 2**40)[0] == 8 * 7


def test_a_quarter_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    num_blocks, bytes_per_block = blocks_on_cpu(monkeypatch, 400_000)
    assert num_blocks == 100_000 // bytes_per_block > 1


def test_four_gib_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_size, "CPU_MEMORY_LIMIT", 50_000)
    num_blocks, bytes_per_block = blocks_on_cpu(monkeypatch, 2**40)
    assert num_blocks == 50_000 // bytes_per_block > 1


def test_no_room_for_a_block_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no memory for the KV cache: 0 MiB available, a block takes"):
        blocks_on_cpu(monkeypatch, 10_000)


def test_free_memory_is_plausible() -> None:
    assert 2**20 < cache_size._free_cpu_memory() < 2**50


@pytest.mark.gpu
def test_cuda_memory_stays_within_its_share() -> None:
    """The largest step of a full engine, top_p for every row, after the cache took what was left."""
    torch.cuda.empty_cache()
    llm = LLM("random-135m", device="cuda", gpu_memory_utilization=0.5, max_num_seqs=4096, max_num_batched_tokens=8192)
    params = SamplingParams(top_p=0.9, max_tokens=4, ignore_eos=True)
    outputs = llm.generate([[7, 8]] * 4096, params, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    free, total = torch.cuda.mem_get_info()
    assert 0.4 < 1 - free / total <= 0.52  # the CUDA context and the allocator's rounding come on top
