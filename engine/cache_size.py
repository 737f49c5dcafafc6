"""How many KV-cache blocks a device has room for."""

from __future__ import annotations

import os
from bisect import bisect_right

import torch

from pagedattn.engine.kv_cache import KVCache
from pagedattn.engine.layer_groups import LayerGroups, group_layers, peak_blocks
from pagedattn.engine.model import Decoder
from pagedattn.engine.model_runner import ModelRunner
from pagedattn.engine.step_graphs import decode_batch_sizes, mixture_sizes


def longest_sequence(
    groups: LayerGroups, num_blocks: int, block_size: int, max_step_tokens: int | None, limit: int
) -> int:
    """The most tokens, up to ``limit``, that one sequence can have in ``num_blocks`` blocks, when the blocks of at most
    ``max_step_tokens`` tokens are taken at once; None: of all."""

    def peak(num_tokens: int) -> int:
        step = num_tokens if max_step_tokens is None else min(num_tokens, max_step_tokens)
        return peak_blocks(groups.windows, block_size, num_tokens, step)

    return bisect_right(range(1, limit + 1), num_blocks, key=peak)


# On a CPU the cache shares the memory with everything else on the machine.
CPU_MEMORY_SHARE = 0.25
CPU_MEMORY_LIMIT = 4 * 2**30
GRAPH_BYTES = 16 * 2**20  # what the driver keeps for a captured step, roughly


def default_num_blocks(
    decoder: Decoder,
    *,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    gpu_memory_utilization: float,
    cache_dtype: torch.dtype | None = None,
    enforce_eager: bool = False,
    batch_invariant: bool = False,
) -> int:
    """Blocks for ``max_num_seqs`` sequences of ``max_model_len`` tokens, or as many as there is memory for.

    On CUDA that is ``gpu_memory_utilization`` of the device's memory less what is in use and what the largest step
    takes, which is measured with one. On a CPU it is a quarter of the free memory, and at most 4 GiB. ``cache_dtype``:
    what the cache is stored as, None = as the model computes. Raises ValueError when there is no room for a block.
    """
    cache_dtype = cache_dtype or decoder.dtype
    bytes_per_block = KVCache.bytes_per_block(decoder.config, block_size, cache_dtype)
    if decoder.device.type == "cuda":
        step_bytes = _measure_step_bytes(
            decoder,
            block_size=block_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            cache_dtype=cache_dtype,
            enforce_eager=enforce_eager,
            batch_invariant=batch_invariant,
        )
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(decoder.device)
        available = int(total * gpu_memory_utilization) - (total - free) - step_bytes
    else:
        available = min(int(_free_cpu_memory() * CPU_MEMORY_SHARE), CPU_MEMORY_LIMIT)
    num_groups = len(group_layers(decoder.config.layer_windows).windows)
    num_wanted = max_num_seqs * -(-max_model_len // block_size) * num_groups
    num_blocks = min(num_wanted, available // bytes_per_block)
    if num_blocks < 1:
        raise ValueError(
            f"no memory for the KV cache: {max(available, 0) / 2**20:.0f} MiB available, a block takes "
            f"{bytes_per_block / 2**20:.1f} MiB"
        )
    return num_blocks


def _free_cpu_memory() -> int:
    names = os.sysconf_names
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _measure_step_bytes(
    decoder: Decoder,
    *,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    cache_dtype: torch.dtype,
    enforce_eager: bool,
    batch_invariant: bool = False,
) -> int:
    """Peak bytes of a step of ``max_num_batched_tokens`` tokens and as many sampled rows as it can have; and what
    graphs keep for themselves: the peak of the largest, and what the driver has of each."""
    cache = KVCache(decoder.config, 1, block_size, cache_dtype, decoder.device)
    runner = ModelRunner(
        decoder,
        cache,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        block_size=block_size,
        device=decoder.device,
        batch_invariant=batch_invariant,
    )

    def peak(num_seqs: int, max_num_tokens: int) -> int:
        torch.cuda.synchronize(decoder.device)
        before = torch.cuda.memory_allocated(decoder.device)
        torch.cuda.reset_peak_memory_stats(decoder.device)
        runner.rehearse(num_seqs, max(1, min(max_num_tokens // num_seqs, max_model_len - 1)))
        return torch.cuda.max_memory_allocated(decoder.device) - before

    step_bytes = peak(min(max_num_seqs, max_num_batched_tokens), max_num_batched_tokens)
    if not enforce_eager:
        mixtures = mixture_sizes(max_num_batched_tokens, decoder.flops_per_token)
        num_graphs = len(decode_batch_sizes(max_num_seqs)) + len(mixtures)
        step_bytes += peak(max_num_seqs, max([max_num_seqs, *mixtures[-1:]])) + num_graphs * GRAPH_BYTES
    return step_bytes
