"""What sharing prefixes saves, and from which length on a preempted request is better kept in host memory.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.kv_memory --device cpu [--json OUT]

What bounds it. Prefix sharing: 32 questions behind one system prompt of 600 tokens are 32 x 600 tokens of prefill
without it and 600 with it; what is left are the questions, the answers and one read of the weights a step. The time to
first token shrinks with the prefill, throughput by as much as prefill was of the whole. Preemption: copying a request
out and back moves its keys and values twice over the link to the host (46 KB a token for SmolLM2 in fp32, from memory
to memory on a CPU), computing it again costs 0.27 GFLOP a token. Both grow with the length, and each has a constant, so
that there is a length from which on one is cheaper for good, or the other always is.

All runs are greedy, and interleaved. Tokens must be the same with and without, or the benchmark exits with status 1 and
reports nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import DEFAULT_MODELS, DifferentTokensError, about_machine
from pagedattn.engine.config import EngineConfig
from pagedattn.engine.kv_cache import KVCache
from pagedattn.engine.llm import DEFAULT_BATCHED_TOKENS, LLM
from pagedattn.engine.policy import POLICIES
from pagedattn.engine.preemption_costs import measure_preemption_costs
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.swap_space import PreemptionCosts
from pagedattn.engine.weights import LoadedModel, load_model

BLOCK_SIZE = 16
LENGTHS = {"cpu": (1, 4, 16, 64, 128, 256, 512), "cuda": (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)}
RULE = "Rule {}: answer in one short sentence, say so when you do not know, and never mention rule {}. "


def make_questions(loaded: LoadedModel, num_system_tokens: int, count: int) -> list[list[int]]:
    """The demo's prompts, each behind the same ``num_system_tokens`` tokens."""
    encode = loaded.tokenizer.encode
    system = encode("".join(RULE.format(index, index + 1) for index in range(num_system_tokens)))[:num_system_tokens]
    lines = resources.files("pagedattn.engine").joinpath("data/demo_prompts.jsonl").read_text(encoding="utf-8")
    questions = [json.loads(line)["prompt"] for line in lines.splitlines()][:count]
    return [system + encode(question, add_special_tokens=False) for question in questions]


def run(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams) -> tuple[list[list[int]], dict[str, float]]:
    """All prompts at once, on an empty cache: their tokens, and what it took."""
    engine = llm.engine
    engine.block_manager.reset_prefix_cache()
    before = engine.stats()
    start = engine.clock()
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    seconds = engine.clock() - start
    for output in outputs:
        if output.error is not None:
            raise RuntimeError(output.error)
    after = engine.stats()
    tokens = [output.outputs[0].token_ids for output in outputs]
    ttfts = sorted(output.metrics.ttft or 0.0 for output in outputs)
    queries = after.prefix_cache_queries - before.prefix_cache_queries
    return tokens, {
        "seconds": seconds,
        "tokens_per_second": sum(map(len, tokens)) / seconds,
        "ttft_mean": statistics.mean(ttfts),
        "ttft_median": statistics.median(ttfts),
        "ttft_last": ttfts[-1],
        "hit_share": (after.prefix_cache_hits - before.prefix_cache_hits) / queries,
        "num_computed_tokens": after.num_computed_tokens - before.num_computed_tokens,
        "num_preemptions": after.num_preemptions - before.num_preemptions,
        "num_swaps": after.num_swaps - before.num_swaps,
    }


def interleave(
    llms: dict[str, LLM], prompts: Sequence[list[int]], params: SamplingParams, num_rounds: int
) -> list[dict[str, Any]]:
    """A row of medians for each engine. Raises DifferentTokensError."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in llms}
    expected: list[list[int]] | None = None
    for index in range(num_rounds + 1):
        for name, llm in llms.items():
            # The first round is a short one, so that memory, threads and kernels are there.
            warms_up = index == 0
            tokens, figures = run(llm, prompts, replace(params, max_tokens=2) if warms_up else params)
            if warms_up:
                continue
            expected = expected or tokens
            if tokens != expected:
                raise DifferentTokensError(f"{name}: other tokens than {next(iter(llms))}'s")
            rounds[name].append(figures)
            print(f"{name}, round {index}: {figures['seconds']:.1f} s", file=sys.stderr, flush=True)
    return [
        {"name": name, "rounds": runs, **{key: statistics.median(one[key] for one in runs) for key in runs[0]}}
        for name, runs in rounds.items()
    ]


def sharing(loaded: LoadedModel, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Prefix caching off and on."""
    prompts = make_questions(loaded, arguments.system_tokens, arguments.num_questions)
    num_blocks = sum(-(-(len(prompt) + arguments.max_tokens) // BLOCK_SIZE) for prompt in prompts) + len(prompts)
    params = SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens, ignore_eos=True)
    llms = {
        name: LLM(loaded, block_size=BLOCK_SIZE, num_blocks=num_blocks, enable_prefix_caching=enabled)
        for name, enabled in (("sharing off", False), ("sharing on", True))
    }
    return interleave(llms, prompts, params, arguments.rounds)


def preempting(loaded: LoadedModel, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The same requests in too few blocks: victims are computed again, kept, or what was measured as cheaper."""
    questions = make_questions(loaded, 0, arguments.num_questions)
    prompts = [(question * 64)[: 40 + 8 * index] for index, question in enumerate(questions)]
    longest = max(map(len, prompts)) + arguments.max_tokens
    num_blocks = max(len(prompts) * longest // (4 * BLOCK_SIZE), -(-longest // BLOCK_SIZE) + 1)
    params = SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens, ignore_eos=True)
    # Without headroom requests join as soon as they fit, and many are preempted: what this is about.
    eager = replace(POLICIES["default"], headroom_blocks=0)
    llms = {
        kind: LLM(
            loaded,
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            enable_prefix_caching=False,
            policy=replace(eager, preempt_by=kind),
            swap_space=0.0 if kind == "recompute" else arguments.swap_space,
        )
        for kind in ("recompute", "swap", "cheapest")
    }
    return interleave(llms, prompts, params, arguments.rounds)


def costs(loaded: LoadedModel, arguments: argparse.Namespace) -> PreemptionCosts:
    """Seconds to compute again and to copy out and back, by length."""
    lengths = LENGTHS[loaded.decoder.device.type]
    num_blocks = -(-lengths[-1] // BLOCK_SIZE) + 1
    decoder = loaded.decoder
    cache = KVCache(loaded.config, num_blocks, BLOCK_SIZE, decoder.dtype, decoder.device, num_host_blocks=num_blocks)
    config = EngineConfig(
        num_blocks=num_blocks,
        max_model_len=lengths[-1] + 1,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=DEFAULT_BATCHED_TOKENS[decoder.device.type],
    )
    return measure_preemption_costs(decoder, cache, config, lengths=lengths, repeats=arguments.rounds)


def crossover_text(document: dict[str, Any]) -> str:
    crossover = document["crossover"]
    if crossover is None:
        return "computing again is cheaper at every length"
    if crossover == 1:
        return "copying is cheaper at every length"
    return f"copying is cheaper from {crossover} tokens on"


def tables(document: dict[str, Any]) -> str:
    """Markdown: sharing, the costs of a preemption, and the runs in too few blocks."""
    rows = [
        "| | prompt tokens from cache | TTFT mean / median / last, s | tokens/s | wall, s |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in document["sharing"]:
        ttft = " / ".join(f"{row[f'ttft_{name}']:.2f}" for name in ("mean", "median", "last"))
        figures = f"{row['hit_share']:.1%} | {ttft} | {row['tokens_per_second']:.1f} | {row['seconds']:.1f}"
        rows.append(f"| {row['name']} | {figures} |")
    measured = document["preemption_costs"]
    rows += ["", "| tokens of the victim | compute again, ms | copy out and back, ms |", "|---:|---:|---:|"]
    for length, recompute, swap in zip(
        measured["lengths"], measured["recompute_seconds"], measured["swap_seconds"], strict=True
    ):
        rows.append(f"| {length} | {recompute * 1e3:.2f} | {swap * 1e3:.2f} |")
    rows += [
        "",
        f"Crossover: {crossover_text(document)}.",
        "",
        "| victims are | preemptions | of them swapped | tokens computed | tokens/s | wall, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in document["preempting"]:
        counts = f"{row['num_preemptions']:.0f} | {row['num_swaps']:.0f} | {row['num_computed_tokens']:.0f}"
        rows.append(f"| {row['name']} | {counts} | {row['tokens_per_second']:.1f} | {row['seconds']:.1f} |")
    return "\n".join(rows) + "\n"


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    about = about_machine(device)
    loaded = load_model(arguments.model or DEFAULT_MODELS[device.type], "auto", device)
    measured = costs(loaded, arguments)
    return {
        "benchmark": "kv_memory",
        **about,
        "model": loaded.name,
        "dtype": str(loaded.decoder.dtype).removeprefix("torch."),
        "num_system_tokens": arguments.system_tokens,
        "num_questions": arguments.num_questions,
        "max_tokens": arguments.max_tokens,
        "num_rounds": arguments.rounds,
        "sharing": sharing(loaded, arguments),
        "preemption_costs": {
            "lengths": measured.lengths,
            "recompute_seconds": measured.recompute_seconds,
            "swap_seconds": measured.swap_seconds,
        },
        "crossover": measured.crossover(measured.lengths[-1]),
        "preempting": preempting(loaded, arguments),
    }


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--model", help="default: smollm2-135m-instruct on cpu, random-135m on cuda")
    parser.add_argument("--system-tokens", type=int, default=600)
    parser.add_argument("--num-questions", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--swap-space", type=float, default=0.5, help="GiB of host memory")
    parser.add_argument("--json", type=Path, help="also write the results, every round of them, to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    try:
        document = benchmark(parsed)
    except DifferentTokensError as error:
        print(f"benchmarks.kv_memory: {error}", file=sys.stderr)
        return 1
    print(tables(document))
    if parsed.json:
        parsed.json.parent.mkdir(parents=True, exist_ok=True)
        parsed.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
