"""How long a million requests take to simulate: the `exp` trace's lengths through one replica, step by step.

    python -m benchmarks.simulator_speed [--num-requests 1000000] [--prefix-caching] [--json OUT]

What bounds it: every token of every answer goes through the real scheduler once, 128 million of them; nothing is
skipped. Lengths are drawn beforehand. CPU seconds of this process are counted, which is one core's time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine import about_machine
from benchmarks.traces import draw_requests
from pagedattn.engine.config import EngineConfig
from pagedattn.engine.simulation.machine import load_machine
from pagedattn.engine.simulation.recorder import Recorder, ServiceLevel
from pagedattn.engine.simulation.router import RoundRobin
from pagedattn.engine.simulation.simulator import simulate
from pagedattn.engine.simulation.traces import TraceRequest

ARRIVALS_PER_SECOND = 105.0  # the rate of benchmarks.scheduling
MAX_TOKENS = 1024


def requests_of(lengths: Sequence[tuple[int, int]]) -> Iterator[TraceRequest]:
    """Poisson arrivals of prompts and answers of these lengths."""
    random = np.random.default_rng(0)
    now = 0.0
    for num_prompt_tokens, num_output_tokens in lengths:
        yield TraceRequest(now, num_prompt_tokens, num_output_tokens, MAX_TOKENS)
        now += float(random.exponential(1.0 / ARRIVALS_PER_SECOND))


def measure(num_requests: int, with_prefix_caching: bool) -> dict[str, Any]:
    import torch

    drawn = itertools.islice(draw_requests("exp", 49_152), num_requests)
    lengths = [(len(token_ids), num_output_tokens) for token_ids, num_output_tokens in drawn]
    machine = load_machine("h100-8b")
    config = EngineConfig(
        machine.num_blocks,
        1 << 20,
        machine.block_size,
        machine.max_num_seqs,
        machine.max_num_batched_tokens,
        enable_prefix_caching=with_prefix_caching,
    )
    recorder = Recorder(usage_every=16)
    wall, cpu = time.perf_counter(), time.process_time()
    simulate(requests_of(lengths), config, machine.step_time, recorder=recorder, router=RoundRobin())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    result = recorder.result(ServiceLevel(1.0, 0.05))
    if result.num_finished != num_requests or result.num_output_tokens != sum(length for _, length in lengths):
        raise RuntimeError(f"{result.num_finished} requests ended with {result.num_output_tokens} tokens")
    return {
        "benchmark": "simulator-speed",
        **about_machine(torch.device("cpu")),
        "prefix_caching": with_prefix_caching,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "max_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "tokens_per_cpu_second": result.num_output_tokens / cpu,
        "result": asdict(result),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-requests", type=int, default=1_000_000)
    parser.add_argument("--prefix-caching", action="store_true", help="though no two prompts are alike")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parsed = parser.parse_args(arguments)
    document = measure(parsed.num_requests, parsed.prefix_caching)
    if parsed.json:
        parsed.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{parsed.num_requests} requests, {document['result']['num_output_tokens']} tokens: ", end="")
    print(f"{document['cpu_seconds']:.0f} s of CPU time, {document['wall_seconds']:.0f} s, ", end="")
    print(f"{document['max_resident_mib']:.0f} MiB")
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
