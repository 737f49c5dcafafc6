"""One decode step on a GPU, all of it in one CUDA graph: plan, every layer, sampling. No engine, no host.

    python -m benchmarks.decode_step [--model 135m,8b] [--case 256x256,1x1024] [--profile] [--json OUT]

What bounds it: a step reads every weight once, and the keys and values of its sequences; the embedding is read by rows,
unless it is the output projection too. Beside each time stands what these bytes take at the bandwidth that a reading
kernel reaches on the same device in the same process. The KV cache is larger than the L2, and blocks are shuffled.
``--profile`` prints where a step's time goes, by kernel. On a CPU it runs without a graph, to try the code.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.device_timing import measure_ceilings, scratch_elements, time_launches
from benchmarks.engine import about_machine
from pagedattn import layer_ops
from pagedattn.engine.batch import BatchTensors
from pagedattn.engine.kv_cache import KVCache
from pagedattn.engine.model import Decoder, ModelConfig
from pagedattn.engine.sampler import SamplingTensors
from pagedattn.engine.weights import load_model

BLOCK_SIZE = 16
SHORT_NAMES = {"135m": "random-135m", "8b": "random-8b"}
DEFAULT_CASES = "256x256,64x1024,4x1024,1x1024"
SECONDS = 0.5  # that a case is timed for


@dataclass(frozen=True)
class StepTime:
    """A measured decode step. ``limit_ms``: its bytes at the measured bandwidth."""

    model: str
    batch: int
    context: int
    milliseconds: float
    limit_ms: float
    num_bytes: int

    @property
    def over_limit(self) -> float:
        return self.milliseconds / self.limit_ms


def step_bytes(config: ModelConfig, dtype: torch.dtype, batch: int, context: int) -> int:
    """What a decode step has to read: weights, keys and values, embeddings of the batch; and its logits, written."""
    hidden, head_size = config.hidden_size, config.head_size
    attention = (
        config.num_heads + 2 * config.num_kv_heads
    ) * head_size * hidden + config.num_heads * head_size * hidden
    layer = attention + 3 * config.intermediate_size * hidden
    cached = 2 * config.num_kv_heads * head_size * context * batch
    rows = batch * (hidden + config.vocab_size)
    elements = config.num_layers * (layer + cached) + config.vocab_size * hidden + rows
    return elements * dtype.itemsize


def decode_batch(cache: KVCache, batch: int, context: int, vocab_size: int) -> BatchTensors:
    """A step of ``batch`` sequences that have ``context`` tokens, its own included, in shuffled blocks."""
    device, blocks = cache.device, -(-context // cache.block_size)
    table = torch.randperm(cache.num_blocks, device=device)[: batch * blocks].view(1, batch, blocks)
    position = context - 1
    return BatchTensors(
        input_ids=torch.randint(0, vocab_size, (batch,), device=device),
        positions=torch.full((batch,), position, dtype=torch.int64, device=device),
        slot_mapping=table[:, :, -1] * cache.block_size + position % cache.block_size,
        block_table=table.int(),
        seq_lens=torch.full((batch,), context, dtype=torch.int32, device=device),
        query_start_loc=torch.arange(batch + 1, dtype=torch.int32, device=device),
        logits_indices=torch.arange(batch, device=device),
        max_query_len=1,
        max_seq_len=blocks * cache.block_size,
    )


def sampling_of(batch: int, device: torch.device, temperature: float = 0.6) -> SamplingTensors:
    def full(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((batch,), value, dtype=dtype, device=device)

    numbers = torch.arange(batch, device=device)
    off = full(0.0, torch.float32)
    return SamplingTensors(
        full(temperature, torch.float32), full(0, torch.int32), full(1.0, torch.float32), off, numbers, numbers + 7
    )


@torch.inference_mode()
def make_step(decoder: Decoder, batch: int, context: int) -> Callable[[int], Tensor]:
    """A decode step with random keys and values behind it; returns its tokens."""
    blocks = batch * -(-context // BLOCK_SIZE)
    cache = KVCache(decoder.config, blocks, BLOCK_SIZE, decoder.dtype, decoder.device)
    for layer in cache.layers:
        layer.key.normal_()
        layer.value.normal_()
    tensors = decode_batch(cache, batch, context, decoder.config.vocab_size)
    sampling = sampling_of(batch, decoder.device)

    def step(_: int) -> Tensor:
        return layer_ops.sample_tokens(decoder.forward(tensors, cache), *sampling)

    return step


@torch.inference_mode()
def time_step(decoder: Decoder, name: str, batch: int, context: int, read_bytes: float) -> StepTime:
    step = make_step(decoder, batch, context)
    tokens = step(0)
    if not bool((tokens >= 0).all()):
        raise RuntimeError(f"{name}, {batch} x {context}: a row of logits is not finite")
    num_bytes = step_bytes(decoder.config, decoder.dtype, batch, context)
    limit = num_bytes / read_bytes
    seconds = time_launches(step, 1, limit, SECONDS, decoder.device)
    return StepTime(name, batch, context, seconds * 1e3, limit * 1e3, num_bytes)


@torch.inference_mode()
def profile_step(decoder: Decoder, batch: int, context: int, replays: int = 3) -> list[tuple[str, int, float]]:
    """Kernels of a step by time: name, launches, microseconds a step. Starts of graph replays are not counted."""
    from torch.profiler import ProfilerActivity, profile

    step = make_step(decoder, batch, context)
    step(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(0)
    graph.replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            totals[short_name(event.name)].append(event.device_time)
    rows = [(name, len(times) // replays, sum(times) / replays) for name, times in totals.items()]
    return sorted(rows, key=lambda row: -row[2])


def short_name(kernel: str) -> str:
    """A kernel's name without its types and arguments."""
    return re.sub(r"^void |[<(].*", "", kernel)[:70]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="135m,8b", help="135m, 8b, or names from `pagedattn models`, with commas")
    parser.add_argument(
        "--case", default=DEFAULT_CASES, help=f"batch x context, with commas (default: {DEFAULT_CASES})"
    )
    parser.add_argument("--profile", action="store_true", help="also print each case's kernels by time")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    device = torch.device(parsed.device)
    scratch = torch.randn(scratch_elements(device), device=device, dtype=torch.bfloat16)
    ceilings = measure_ceilings(scratch)
    del scratch
    print(f"read {ceilings.read_bytes / 1e9:.0f} GB/s", flush=True)
    rows: list[dict[str, Any]] = []
    for name in parsed.model.split(","):
        decoder = load_model(SHORT_NAMES.get(name, name), device=device).decoder
        for case in parsed.case.split(","):
            batch, context = map(int, case.split("x"))
            found = time_step(decoder, name, batch, context, ceilings.read_bytes)
            row = {**asdict(found), "over_limit": found.over_limit}
            print(
                f"{name:>6} {batch:>4} x {context:<5} {found.milliseconds:8.3f} ms, bytes {found.limit_ms:.3f} ms, "
                f"{found.over_limit:.2f}x",
                flush=True,
            )
            if parsed.profile:
                row["kernels"] = profile_step(decoder, batch, context)
                for kernel, launches, microseconds in row["kernels"][:14]:
                    print(f"{microseconds:10.1f} us {launches:5} {kernel}", flush=True)
            rows.append(row)
        del decoder
    document = {"benchmark": "decode_step", **about_machine(device), "read_bytes": ceilings.read_bytes, "rows": rows}
    if parsed.json:
        parsed.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({**document, "rows": [{**row, "kernels": None} for row in rows]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
