"""What it costs on this device to lose a request's tokens, and what to keep them in host memory: measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from pagedattn.engine.block_manager import BlockManager, BlockTransfers
from pagedattn.engine.config import EngineConfig
from pagedattn.engine.kv_cache import KVCache
from pagedattn.engine.model import Decoder
from pagedattn.engine.model_runner import ModelRunner
from pagedattn.engine.request import Request
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.step_plan import ScheduledRequest, StepPlan
from pagedattn.engine.swap_space import PreemptionCosts

# Short, middling and long; what lies between is interpolated, what is longer goes on as between the last two.
LENGTHS = (16, 128, 512, 2048)
LONGEST_ON_CPU = 128  # computing more would hold up the start for seconds


@torch.inference_mode()
def measure_preemption_costs(
    decoder: Decoder, cache: KVCache, config: EngineConfig, *, lengths: Sequence[int] = (), repeats: int = 3
) -> PreemptionCosts:
    """Medians over ``repeats`` runs with an idle cache, which has host blocks; what it holds is overwritten.

    ``lengths``: by default those of ``LENGTHS`` that the sizes allow. Computing tokens again is charged with what it
    adds to a step that runs anyway.
    """
    manager = BlockManager(cache.num_blocks, cache.block_size, windows=cache.windows)
    longest = min(config.max_model_len, cache.num_host_blocks // manager.num_groups * cache.block_size)
    if cache.device.type == "cpu":
        longest = min(longest, LONGEST_ON_CPU)
    measured = tuple(lengths) or tuple(length for length in LENGTHS if length <= longest)
    if len(measured) < 2:
        measured = (1, max(2, longest))

    def seconds(work: Callable[[], None]) -> float:
        work()  # whatever is compiled or allocated at the first time
        times = []
        for _ in range(repeats):
            _synchronize(cache.device)
            start = time.perf_counter()
            work()
            _synchronize(cache.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    runner = ModelRunner(
        decoder,
        cache,
        max_num_seqs=1,
        max_model_len=config.max_model_len,
        block_size=cache.block_size,
        device=cache.device,
        batch_invariant=config.batch_invariant,
    )
    compute = partial(_compute, runner, manager, config.max_num_batched_tokens)
    step = seconds(partial(compute, 1))
    recompute = [max(0.0, seconds(partial(compute, length)) - step) for length in measured]
    swap = []
    for length in measured:
        num_blocks = min(manager.blocks_for(length), cache.num_blocks, cache.num_host_blocks)
        pairs = tuple((index, index) for index in range(num_blocks))
        swap.append(seconds(partial(cache.transfer, BlockTransfers(swap_out=pairs, swap_in=pairs))))
    return PreemptionCosts(measured, tuple(recompute), tuple(swap))


def _compute(runner: ModelRunner, manager: BlockManager, max_step_tokens: int, num_tokens: int) -> None:
    """The steps that compute so many tokens of one request."""
    request = Request("costs", [0] * num_tokens, SamplingParams(), max_num_tokens=num_tokens + 1)
    while request.num_uncomputed_tokens:
        start = request.num_computed_tokens
        count = min(request.num_uncomputed_tokens, max_step_tokens)
        fits = manager.ensure(request, start + count)
        assert fits, f"{manager.num_blocks} blocks do not hold {num_tokens} tokens"
        plan = StepPlan.of([ScheduledRequest(request, start, count, count == request.num_uncomputed_tokens)])
        runner.launch(plan).wait()
        request.num_computed_tokens += count
        manager.commit(request)
    manager.free(request)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
