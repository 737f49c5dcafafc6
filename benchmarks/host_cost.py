"""Host cost of one eager op call, checks and launches included: what a decode loop without CUDA graphs pays per layer.

    python -m benchmarks.host_cost [--json OUT]

On CUDA calls are enqueued on shapes whose kernels are shorter than their launch, and the clock stops before the
device does. On a CPU the calls carry no tokens, so that what is timed is the wrapper, the dispatcher and the checks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pagedattn

CALLS, ROUNDS = 200, 15


def microseconds(call: Callable[[], object]) -> float:
    """Median over rounds of the mean host time of a call."""
    start = time.perf_counter()
    while time.perf_counter() - start < 0.3:  # compile, and let the clocks rise
        call()
    times = []
    for _ in range(ROUNDS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times)


def measure() -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = 4 if device.type == "cuda" else 0
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query = torch.randn(batch, 32, 128, device=device, dtype=dtype)
    key, value = torch.randn(2, batch, 8, 128, device=device, dtype=dtype).unbind()
    key_cache, value_cache = torch.randn(2, 64, 16, 8, 128, device=device, dtype=dtype).unbind()
    table = torch.arange(64, dtype=torch.int32, device=device).view(4, 16)[:batch]
    seq_lens = torch.full((batch,), 40, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    slots = torch.arange(batch, device=device) * 256 + 39
    positions = torch.full((batch,), 39, device=device)
    cos_sin = torch.randn(256, 128, device=device)
    geometry: dict[str, Any] = {
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_size": 128,
        "block_size": 16,
        "max_query_len": 1,
    }
    plan = pagedattn.plan_attention(seq_lens, starts, max_seq_len=256, **geometry)
    out = torch.empty_like(query)
    attention = (query, key_cache, value_cache, table, seq_lens, starts)
    calls: dict[str, Callable[[], object]] = {
        "paged_attention": lambda: pagedattn.paged_attention(*attention, max_query_len=1, plan=plan),
        "paged_attention out=": lambda: pagedattn.paged_attention(*attention, max_query_len=1, plan=plan, out=out),
        "paged_attention, no plan": lambda: pagedattn.paged_attention(*attention, max_query_len=1),
        "append_kv": lambda: pagedattn.append_kv(key, value, key_cache, value_cache, slots),
        "rope_append_kv": lambda: pagedattn.rope_append_kv(
            query, key, value, cos_sin, positions, key_cache, value_cache, slots
        ),
    }
    return {name: round(microseconds(call), 2) for name, call in calls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    with torch.inference_mode():
        figures = measure()
    for name, value in figures.items():
        print(f"{name:28}{value:8.2f} us")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {"benchmark": "host_cost", "device": name, "torch": torch.__version__, "microseconds": figures}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
