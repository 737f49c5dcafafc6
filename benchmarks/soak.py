"""A long run of short requests with random aborts: memory of host and device must stay flat, and every block come back.

    python -m benchmarks.soak [--requests 100000] [--device cuda] [--json OUT]

A model of four layers with random weights answers requests of 1 to 64 prompt tokens and 32 output tokens in the mean,
a few of them sampled, streamed, with log probabilities or several answers; one in twenty is aborted at a random moment.
Memory is looked at a hundred times. It fails if the last quarter's mean is higher than the second quarter's by more
than ``--tolerance`` MiB, on the host or on the device. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pagedattn.engine.llm import LLM
from pagedattn.engine.model import Decoder
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.tokenizer import Tokenizer
from pagedattn.engine.weights import RANDOM_MODELS, LoadedModel, fill_with_random_weights

NUM_SAMPLES = 100
MEAN_OUTPUT, MAX_OUTPUT, MAX_PROMPT = 32, 256, 64
ABORTED_SHARE = 0.05


def small_model(device: torch.device) -> LoadedModel:
    config = replace(RANDOM_MODELS["random"], num_layers=4)
    tokenizer = Tokenizer.byte_level(config.vocab_size)
    config = replace(config, eos_token_ids=tokenizer.eos_token_ids, bos_token_id=tokenizer.bos_token_id)
    decoder = Decoder(config, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    fill_with_random_weights(decoder, seed=0)
    return LoadedModel(config, decoder, tokenizer, "soak")


def host_bytes() -> int:
    """Of this process, resident."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def draw_params(generator: random.Random) -> SamplingParams:
    length = min(max(round(generator.expovariate(1 / MEAN_OUTPUT)), 1), MAX_OUTPUT)
    kind = generator.random()
    more: dict[str, Any] = {"temperature": 0.0}
    if kind < 0.3:
        more = {"temperature": 0.8, "top_p": 0.9}
    elif kind < 0.35:
        more = {"logprobs": 2}
    elif kind < 0.4:
        more = {"n": 2}
    return SamplingParams(max_tokens=length, ignore_eos=generator.random() < 0.5, **more)


def soak(llm: LLM, num_requests: int, seed: int) -> list[tuple[int, int]]:
    """Answers so many requests; (host, device) bytes as they went."""
    generator = random.Random(seed)
    engine = llm.engine
    unfinished: dict[str, None] = {}
    memory: list[tuple[int, int]] = []
    num_added = num_ended = 0
    most_unfinished = 2 * engine.config.max_num_seqs
    while num_ended < num_requests:
        while num_added < num_requests and len(unfinished) < most_unfinished:
            prompt = [generator.randrange(256) for _ in range(generator.randint(1, MAX_PROMPT))]
            unfinished[engine.add_request(prompt, draw_params(generator), is_streamed=generator.random() < 0.1)] = None
            num_added += 1
        if generator.random() < ABORTED_SHARE * most_unfinished / MEAN_OUTPUT:
            engine.abort(generator.choice(list(unfinished)))
        for output in engine.step(with_usage=False).outputs:
            if not output.finished:
                continue
            if output.error is not None:
                raise RuntimeError(f"request {output.request_id} failed: {output.error}")
            del unfinished[output.request_id]
            num_ended += 1
            if num_ended % max(1, num_requests // NUM_SAMPLES) == 0:
                on_device = torch.cuda.memory_allocated() if llm.device.type == "cuda" else 0
                memory.append((host_bytes(), on_device))
    engine.step()
    engine.check_integrity()
    return memory


def growth_mib(values: list[int]) -> float:
    """From the second quarter of a run to its last."""
    quarter = len(values) // 4
    return (statistics.mean(values[-quarter:]) - statistics.mean(values[quarter : 2 * quarter])) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=8.0, help="MiB (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    device = torch.device(options.device)
    llm = LLM(
        small_model(device),
        num_blocks=options.max_num_seqs * 3,  # too few for all at their longest: some wait for blocks
        max_num_seqs=options.max_num_seqs,
        max_model_len=MAX_PROMPT + MAX_OUTPUT,
    )
    gc.collect()
    start = time.perf_counter()
    memory = soak(llm, options.requests, options.seed)
    stats = llm.engine.stats()
    host, on_device = ([sample[index] for sample in memory] for index in (0, 1))
    result = {
        "benchmark": "soak",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "num_requests": options.requests,
        "num_aborted": stats.num_aborted,
        "num_preemptions": stats.num_preemptions,
        "num_generated_tokens": stats.num_generated_tokens,
        "num_used_blocks": stats.num_used_blocks,
        "seconds": round(time.perf_counter() - start, 1),
        "host_growth_mib": round(growth_mib(host), 2),
        "device_growth_mib": round(growth_mib(on_device), 2),
        "host_mib": [round(value / 2**20, 1) for value in host[:: max(1, len(host) // 10)]],
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    if stats.num_used_blocks or max(growth_mib(host), growth_mib(on_device)) > options.tolerance:
        raise SystemExit("memory is not flat")


if __name__ == "__main__":
    main()
