"""``pagedattn demo``: the same chat prompts, arriving over time, under static and under continuous batching.

Every policy gets the same prompts, lengths and arrival times, the same model and the same greedy sampling. The lengths
are those of a chat: most answers short, a few long, which is what static batching pays for. At every step the demo
checks that on-demand allocation wastes less than a block per sequence, and fails if it does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pagedattn._version import __version__
from pagedattn.engine.cli_options import ENGINE_OPTIONS, LOAD_OPTIONS, load_named_model, make_llm, status
from pagedattn.engine.commands import chat_prompt
from pagedattn.engine.live_view import make_view
from pagedattn.engine.policy import resolve_policy
from pagedattn.engine.replay import Arrival, Replay, Summary, replay, summarize
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.stats import Distribution
from pagedattn.engine.timeline import draw_timeline, require_matplotlib

if TYPE_CHECKING:
    from pagedattn.engine.llm import LLM

MEAN_ANSWER_TOKENS = 36.0
MIN_ANSWER_TOKENS, MAX_ANSWER_TOKENS = 8, 128
NUM_SHOWN_ANSWERS = 3
MAX_REQUESTS = 100_000


def run_demo(arguments: argparse.Namespace) -> int:
    policies = [arguments.policy] if arguments.policy else [name.strip() for name in arguments.policies.split(",")]
    for name in policies:
        resolve_policy(name)
    if not 1 <= arguments.num_requests <= MAX_REQUESTS:
        raise ValueError(f"--num-requests {arguments.num_requests} is not allowed: it must be 1 to {MAX_REQUESTS}")
    if not (math.isfinite(arguments.rate) and arguments.rate > 0):
        raise ValueError(f"--rate {arguments.rate} is not allowed: it must be a finite number > 0")
    require_matplotlib()  # now, rather than after minutes
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    runs = []
    loaded = load_named_model(arguments)
    for name in policies:
        # A step's picture is taken when it ends: the next one must not have begun.
        llm = make_llm(arguments, loaded, policy=name, async_scheduling=False)
        arrivals = make_arrivals(llm, arguments.num_requests, arguments.rate, arguments.seed or 0)
        _warm_up(llm, arrivals)
        status(f"policy {name}: {len(arrivals)} requests over {arrivals[-1].time:.0f} s")
        with make_view() as view:
            runs.append(replay(llm.engine, name, arrivals, view))
        llm.engine.check_integrity()
        device = str(llm.device)
    summaries = [summarize(run) for run in runs]

    draw_timeline(runs, output_dir / "timeline.png")
    document = json.dumps(as_document(arguments, device, runs, summaries), indent=2, ensure_ascii=False)
    (output_dir / "results.json").write_text(document + "\n", encoding="utf-8")
    if arguments.json:
        print(document)
    else:
        print(report(runs, summaries))
        print(f"timeline: {output_dir / 'timeline.png'}   results: {output_dir / 'results.json'}")
    num_failed = sum(summary.num_failed for summary in summaries)
    if num_failed:
        raise ValueError(f"{num_failed} requests failed; {output_dir / 'results.json'} says how")
    return 0


def load_questions() -> list[str]:
    """The prompts that come with the package."""
    text = resources.files("pagedattn.engine").joinpath("data", "demo_prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["prompt"] for line in text.splitlines()]


def make_arrivals(llm: LLM, num_requests: int, rate: float, seed: int) -> list[Arrival]:
    """Seeded Poisson arrivals, ``rate`` a second on average, the first at 0, with exponential answer lengths.

    The i-th arrival does not depend on ``num_requests``.
    """
    random = np.random.default_rng(seed)
    questions = load_questions()
    arrivals = []
    now = 0.0
    for index in range(num_requests):
        question = questions[index % len(questions)]
        length = min(max(round(random.exponential(MEAN_ANSWER_TOKENS)), MIN_ANSWER_TOKENS), MAX_ANSWER_TOKENS)
        prompt = chat_prompt(llm, [{"role": "user", "content": question}])
        arrivals.append(Arrival(now, question, prompt, SamplingParams(temperature=0.0, max_tokens=length)))
        now += random.exponential(1.0 / rate)
    return arrivals


def _warm_up(llm: LLM, arrivals: Sequence[Arrival]) -> None:
    """What only the first steps pay for (memory, kernels) happens before the clock starts."""
    prompts = [arrival.prompt_token_ids for arrival in arrivals[:2]]
    for output in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=2), use_tqdm=False):
        if output.error is not None:
            raise RuntimeError(output.error)


def as_document(
    arguments: argparse.Namespace, device: str, runs: Sequence[Replay], summaries: Sequence[Summary]
) -> dict[str, object]:
    """The results as plain data: how it was run, the figures, and every request's times in seconds."""
    options = {name: getattr(arguments, name, None) for name in LOAD_OPTIONS + ENGINE_OPTIONS}
    return {
        "pagedattn": __version__,
        "model": arguments.model,
        "options": {name: value for name, value in options.items() if value is not None},
        "device": device,
        "num_requests": arguments.num_requests,
        "rate": arguments.rate,
        "max_num_seqs": runs[0].max_num_seqs,
        "num_blocks": runs[0].num_blocks,
        "policies": [dataclasses.asdict(summary) for summary in summaries],
        "requests": {
            run.policy: [
                {
                    "question": answer.arrival.question,
                    "num_prompt_tokens": len(answer.arrival.prompt_token_ids),
                    "arrival_time": answer.arrival.time,
                    "first_token_time": answer.first_token_time,
                    "finished_time": answer.finished_time,
                    "num_tokens": answer.num_tokens,
                    "finish_reason": answer.finish_reason,
                    "error": answer.error,
                    "text": answer.text,
                }
                for answer in run.answers
            ]
            for run in runs
        },
    }


def report(runs: Sequence[Replay], summaries: Sequence[Summary]) -> str:
    """The closing page: a few answers, the table, and what was checked."""
    last = runs[-1]
    shown = sorted(last.answers, key=lambda answer: answer.num_tokens)[
        :: max(1, len(last.answers) // NUM_SHOWN_ANSWERS)
    ]
    lines = [""]
    for answer in shown[:NUM_SHOWN_ANSWERS]:
        question, text = (" ".join(text.split()) for text in (answer.arrival.question, answer.text))
        lines += [f"> {_shortened(question)}", f"  {_shortened(text)}", ""]
    lines += [*_table(summaries), ""]
    if len(runs) > 1:
        same = sum(len({run.answers[index].text for run in runs}) == 1 for index in range(len(last.answers)))
        lines.append(f"answers that are the same under every policy: {same} of {len(last.answers)}")
    for summary in summaries:
        if resolve_policy(summary.policy).reserve == "step":
            lines.append(
                f"policy {summary.policy}: at each of {summary.num_steps} steps a sequence wasted at most "
                f"{summary.max_wasted_slots} KV slots, fewer than the {summary.block_size} of a block"
            )
    return "\n".join(lines)


def _shortened(text: str, width: int = 110) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _table(summaries: Sequence[Summary]) -> list[str]:
    """One row per figure, one column per policy; with two policies a column of second over first."""
    with_ratio = len(summaries) == 2
    heading = f"{'':<28}" + "".join(f"{summary.policy:>12}" for summary in summaries)
    lines = [heading + (f"{'ratio':>9}" if with_ratio else "")]
    for row in zip(*(_figures(summary) for summary in summaries), strict=True):
        line = f"{row[0][0]:<28}" + "".join(f"{layout.format(value):>12}" for _, value, layout in row)
        if with_ratio and row[0][1]:
            line += f"{row[1][1] / row[0][1]:>8.2f}x"
        lines.append(line)
    return lines


def _figures(summary: Summary) -> list[tuple[str, float, str]]:
    """What the table shows: name, value, how to print it."""
    return [
        ("output tokens/s", summary.tokens_per_second, "{:.1f}"),
        ("seconds to the last answer", summary.seconds, "{:.1f}"),
        *_times("time to first token", summary.ttft),
        *_times("latency", summary.latency),
        ("slot utilization", summary.slot_utilization, "{:.1%}"),
        ("KV utilization", summary.kv_utilization, "{:.1%}"),
        ("rows computed for padding", summary.padding_share, "{:.1%}"),
        ("preemptions", summary.num_preemptions, "{:.0f}"),
        ("steps", summary.num_steps, "{:.0f}"),
    ]


def _times(name: str, times: Distribution) -> list[tuple[str, float, str]]:
    return [(f"{name} {figure}, s", getattr(times, figure), "{:.2f}") for figure in ("mean", "p50", "p95", "p99")]


if __name__ == "__main__":
    from pagedattn.engine.cli import main

    sys.exit(main(["demo", *sys.argv[1:]]))
