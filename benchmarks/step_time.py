"""Fits the simulator's step-time model to a real engine: how long a step takes, from what is in it.

    OMP_NUM_THREADS=1 python -m benchmarks.step_time --output engine/data/machines/smollm2-cpu.json

Several batch sizes, padded and not, run offline, so that every round has the very same steps: each step counts with the
median of the rounds, which takes the machine's other work out. The coefficients are the non-negative ones with the
least squared relative error. One step of four is held back from the fit; the error on those is the one reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.engine import about_machine
from benchmarks.real_engine import TimedStep, run_real
from pagedattn.engine.llm import LLM
from pagedattn.engine.simulation.recorder import Recorder
from pagedattn.engine.simulation.step_time import Fitted, StepWork, locate
from pagedattn.engine.simulation.traces import TraceRequest
from pagedattn.engine.weights import LoadedModel, load_model

ROW_KNOTS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256)
SIZES = {"num_blocks": 1024, "block_size": 16, "max_num_seqs": 16, "max_num_batched_tokens": 256}
# Policy, sequences in a batch, requests, shortest and longest prompt, shortest and longest output.
RUNS = (
    ("default", 1, 2, (16, 256), (10, 20)),
    ("default", 3, 6, (16, 256), (10, 40)),
    ("default", 6, 12, (16, 256), (10, 40)),
    ("default", 16, 32, (16, 256), (10, 60)),
    ("default", 16, 16, (16, 64), (40, 60)),
    ("default", 4, 6, (512, 1024), (4, 12)),
    ("static", 8, 8, (16, 64), (4, 30)),
)
EVERY_HELD_OUT = 4


def calibration_trace(num: int, prompt: tuple[int, int], output: tuple[int, int], seed: int) -> list[TraceRequest]:
    """Uniform lengths, all at once."""
    random = np.random.default_rng(seed)
    lengths = zip(random.integers(*prompt, num).tolist(), random.integers(*output, num).tolist(), strict=True)
    return [TraceRequest(0.0, num_prompt, num_output, num_output) for num_prompt, num_output in lengths]


def measure_once(loaded: LoadedModel) -> list[TimedStep]:
    """The steps of all runs, one after the other; the same ones each time."""
    steps = []
    for seed, (policy, max_num_seqs, num, prompt, output) in enumerate(RUNS):
        sizes: dict[str, Any] = {**SIZES, "max_num_seqs": max_num_seqs}
        # Without prefix caching: the prompts of the round before are not to be found.
        llm = LLM(loaded, policy=policy, enable_prefix_caching=False, async_scheduling=False, **sizes)
        steps += run_real(llm, calibration_trace(num, prompt, output, seed), Recorder())
    return steps


def medians(rounds: Sequence[Sequence[TimedStep]]) -> list[TimedStep]:
    """Each step with the median of its rounds. Raises RuntimeError when the rounds differ in their steps."""
    if any([step.work for step in one] != [step.work for step in rounds[0]] for one in rounds):
        raise RuntimeError("the rounds have different steps: something but the trace decides what is scheduled")
    return [
        replace(same[0], seconds=statistics.median(step.seconds for step in same)) for same in zip(*rounds, strict=True)
    ]


def features(work: StepWork) -> list[float]:
    """The columns of the fit: the four prices, then what each row knot counts with."""
    knots = [0.0] * len(ROW_KNOTS)
    index, share = locate(work.num_rows, ROW_KNOTS)
    knots[index], knots[index + 1] = 1.0 - share, share
    return [work.num_seqs, work.num_sampled, work.num_context_tokens, work.num_pairs, *knots]


def fit(steps: Sequence[TimedStep]) -> Fitted:
    """The non-negative coefficients with the least squared relative error."""
    seconds = np.array([step.seconds for step in steps])
    matrix = np.array([features(step.work) for step in steps]) / seconds[:, None]
    found = non_negative_least_squares(matrix, np.ones(len(steps))).tolist()
    per_seq, per_sample, per_context_token, per_pair, *at_knots = found
    return Fitted(per_seq, per_sample, per_context_token, per_pair, ROW_KNOTS, tuple(at_knots))


def non_negative_least_squares(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """x >= 0 that minimizes |matrix x - target|, by the active sets of Lawson and Hanson (1974)."""
    scale = np.linalg.norm(matrix, axis=0)
    scaled = matrix / np.where(scale > 0, scale, 1.0)
    x = np.zeros(matrix.shape[1])
    is_free = np.zeros(matrix.shape[1], dtype=bool)
    for _ in range(10 * matrix.shape[1]):
        gradient = scaled.T @ (target - scaled @ x)
        if is_free.all() or gradient[~is_free].max() <= 1e-10:
            break
        is_free[np.where(is_free, -np.inf, gradient).argmax()] = True
        while True:
            solution = np.zeros_like(x)
            solution[is_free] = np.linalg.lstsq(scaled[:, is_free], target, rcond=None)[0]
            negative = is_free & (solution <= 0)
            if not negative.any():
                break
            step = (x[negative] / (x[negative] - solution[negative])).min()
            x += step * (solution - x)
            is_free &= x > 1e-15
        x = solution
    return np.asarray(x / np.where(scale > 0, scale, 1.0))


def errors(model: Fitted, steps: Sequence[TimedStep]) -> dict[str, float]:
    """Of ``model`` on ``steps``: each step's relative error, and that of all their time together."""
    predicted = np.array([model.seconds(step.work) for step in steps])
    seconds = np.array([step.seconds for step in steps])
    relative = np.abs(predicted / seconds - 1)
    return {
        "num_steps": len(steps),
        "median_relative": float(np.median(relative)),
        "p95_relative": float(np.percentile(relative, 95)),
        "total_relative": float(predicted.sum() / seconds.sum() - 1),
    }


def as_document(rounds: Sequence[Sequence[TimedStep]], loaded: LoadedModel) -> dict[str, Any]:
    """The machine that the rounds give, and how well it predicts the steps that were held back."""
    steps = medians(rounds)
    model = fit([step for number, step in enumerate(steps) if number % EVERY_HELD_OUT])
    held_out = errors(model, steps[::EVERY_HELD_OUT])
    about = about_machine(loaded.decoder.device)
    dtype = str(loaded.decoder.dtype).removeprefix("torch.")
    return {
        "about": f"Fitted to {loaded.name} in {dtype} on one thread of {about['device']} (CPU time), {about['date']}: "
        f"median error of a step {held_out['median_relative']:.1%}, of all together {held_out['total_relative']:+.1%}.",
        "kind": "fitted",
        "step_time": asdict(model),
        **SIZES,
        "fit": {"held_out_steps": held_out, "num_rounds": len(rounds), **about},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the machine to this file")
    parsed = parser.parse_args(arguments)
    loaded = load_model(parsed.model, device="cpu")
    measure_once(loaded)  # memory and threads are there
    text = json.dumps(as_document([measure_once(loaded) for _ in range(parsed.rounds)], loaded), indent=1)
    if parsed.output:
        parsed.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
