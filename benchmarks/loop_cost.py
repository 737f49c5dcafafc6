"""Host time of one decode step of the engine, in microseconds: all that Python does while the device computes.

    python -m benchmarks.loop_cost [--running 1,16,64,256] [--context 128,4096] [--streamed] [--profile] [--json OUT]

The model is replaced by tokens that are there at once, so that what is left is the host's: schedule, stage (what the
device is told), finish (tokens to requests, stops, outputs), and the rest of ``Engine.step``. Each sequence begins a
block every 16 steps. "steady": nobody joins or leaves; "turnover": at each step one ends, with its text made, and
another joins with a prompt of 128 tokens. Pure Python on one core: what bounds it is the number of sequences. It must
not depend on their lengths. Medians over the steps; ends with one JSON line.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagedattn.engine.config import EngineConfig
from pagedattn.engine.engine import Engine
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.tokenizer import Tokenizer

WARM_UP_STEPS, TIMED_STEPS = 40, 200
VOCAB_SIZE = 49152
TURNOVER_CONTEXT = 128  # what joins at each step has to fit in one
PARTS = ("schedule", "launch", "finish")


class NoCache:
    """Blocks that hold nothing."""

    windows = (None,)
    null_block = 0

    def transfer(self, transfers: Any) -> None:
        raise AssertionError("nothing is to be copied")


class NoModel:
    """Never asked: the samples are there already."""

    def forward(self, batch: Any, cache: Any) -> Tensor:
        raise AssertionError("the model is not to be run")


@dataclass(frozen=True)
class Cost:
    """Medians in microseconds; ``step`` is the whole, ``p99`` of it."""

    num_running: int
    context: int
    is_streamed: bool
    has_turnover: bool
    step: float
    p99: float
    schedule: float
    launch: float
    finish: float


def make_engine(num_running: int, context: int) -> Engine:
    num_tokens = context + max(WARM_UP_STEPS + TIMED_STEPS, num_running) + 20
    config = EngineConfig(
        num_blocks=num_running * (-(-num_tokens // 16) + 2),
        max_model_len=num_tokens,
        max_num_seqs=num_running,
        max_num_batched_tokens=num_running * context,
        enable_prefix_caching=False,
        async_scheduling=True,
    )
    no_cache: Any = NoCache()
    tokenizer = Tokenizer.byte_level(VOCAB_SIZE)
    engine = Engine(NoModel(), no_cache, tokenizer, config, vocab_size=VOCAB_SIZE)
    samples = torch.randint(32, 127, (num_running,))  # each a character, so that streams have text at each step

    def compute(staged: Any) -> tuple[Tensor, Tensor, None]:
        return samples, samples[: len(staged.sample_indices)], None

    engine.runner._compute = compute  # type: ignore[method-assign, assignment]
    return engine


def timed(owner: Any, name: str, times: list[float]) -> None:
    """Let ``owner.name`` note how long it takes."""
    call: Callable[..., Any] = getattr(owner, name)

    def measured(*args: Any, **options: Any) -> Any:
        start = time.perf_counter_ns()
        result = call(*args, **options)
        times.append((time.perf_counter_ns() - start) / 1e3)
        return result

    setattr(owner, name, measured)


def measure(
    num_running: int, context: int, is_streamed: bool, has_turnover: bool, profile: cProfile.Profile | None = None
) -> Cost:
    engine = make_engine(num_running, context)

    def add(max_tokens: int) -> None:
        params = SamplingParams(temperature=0.6, max_tokens=max_tokens, ignore_eos=True)
        engine.add_request([max_tokens % 256] * context, params, is_streamed=is_streamed)

    for index in range(num_running):
        add(index + 1 if has_turnover else WARM_UP_STEPS + TIMED_STEPS + 10)
    if has_turnover:
        for _ in range(WARM_UP_STEPS + TIMED_STEPS):
            add(num_running)
    for _ in range(WARM_UP_STEPS):
        engine.step(with_usage=False)
    parts: dict[str, list[float]] = {name: [] for name in PARTS}
    if profile is not None:
        profile.enable()
    else:
        timed(engine.scheduler, "schedule", parts["schedule"])
        timed(engine, "_launch", parts["launch"])
        timed(engine, "_finish_next", parts["finish"])
    steps = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter_ns()
        result = engine.step(with_usage=False)
        steps.append((time.perf_counter_ns() - start) / 1e3)
        # Whose last token is to come is in no step, and who takes its place joins when it has come.
        assert num_running - has_turnover <= result.num_seqs <= num_running, f"{result.num_seqs} in a step"
    if profile is not None:
        profile.disable()
    return Cost(
        num_running,
        context,
        is_streamed,
        has_turnover,
        statistics.median(steps),
        statistics.quantiles(steps, n=100)[98],
        *(statistics.median(parts[name] or [0.0]) for name in PARTS),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", default="1,16,64,256", help="sequences (default: %(default)s)")
    parser.add_argument("--context", default="128,4096", help="tokens of each at first (default: %(default)s)")
    parser.add_argument("--streamed", action="store_true", help="build an output for each request in each step")
    parser.add_argument("--profile", action="store_true", help="print what the time goes to, by function")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    all_running, contexts = ([int(one) for one in value.split(",")] for value in (options.running, options.context))
    cases = [(running, context, False) for running in all_running for context in contexts]
    cases += [(running, TURNOVER_CONTEXT, True) for running in all_running]
    profile = cProfile.Profile() if options.profile else None
    print(f"{'case':<8}{'running':>8}{'context':>8}{'step':>9}{'p99':>9}{'schedule':>10}{'launch':>9}{'finish':>9}  us")
    costs = []
    for running, context, has_turnover in cases:
        cost = measure(running, context, options.streamed, has_turnover, profile)
        costs.append(cost)
        case = "turnover" if has_turnover else "steady"
        print(
            f"{case:<8}{running:8}{context:8}{cost.step:9.0f}{cost.p99:9.0f}{cost.schedule:10.0f}{cost.launch:9.0f}"
            f"{cost.finish:9.0f}"
        )
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    document = {"benchmark": "loop_cost", "microseconds": [asdict(cost) for cost in costs]}
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
