"""Output tokens per second of the whole engine on a GPU, on the traces that other engines were measured on.

    python -m benchmarks.engine --device cuda --trace uniform,exp --model 135m,8b [--json OUT]

256 requests at once, temperature 0.6, EOS ignored, no prefix caching, random weights; after a warm-up, the median of
``--rounds``. Every request's number of tokens is checked. What bounds it: a step reads every weight, and the keys and
values of all that run; for the small model that is little, so that whatever the host does between two steps shows. So
beside the rate stand how long a decode step takes on the device and how much of the decode phase the device is idle,
from a profile of the same requests with short outputs, and how long the engine takes to be ready, weights excluded.

vLLM runs the same requests on the same shape in a process of its own, where it can be imported; else its column holds
what was published for one H100, and says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.traces import Trace, digest, make_trace
from pagedattn.engine.llm import LLM
from pagedattn.engine.model import ModelConfig
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.weights import RANDOM_MODELS, random_model

SHORT_NAMES = {"135m": "random-135m", "8b": "random-8b"}
# Output tokens per second of vLLM 0.23.0 (compiled, CUDA graphs, FlashAttention-3, asynchronous scheduling) on one
# H100 80GB in bf16, as given with the task of this benchmark: lowest and highest of its runs, by model and trace.
UNIFORM, EXP = "13dc93723634019c", "0301713e78dc4be1"
PUBLISHED = {
    ("135m", UNIFORM): (22_500, 27_700),
    ("135m", EXP): (11_500, 11_500),
    ("8b", UNIFORM): (8_450, 8_450),
    ("8b", EXP): (5_370, 5_370),
}
TEMPERATURE = 0.6
MAX_NUM_SEQS = 256
PROFILED_TOKENS = 120  # of each request, when a profile is taken: more than there are steps with prompts
PROFILED_STEPS = 32  # of these, between the last prompt and the first request's end: all requests decode
STEP_ENDS_WITH = "choose_tokens_kernel"


class WrongCountError(RuntimeError):
    """A request has another number of tokens than it asked for."""


@dataclass(frozen=True)
class DecodePhase:
    """What a profile says of decode steps on the device."""

    step_ms: float  # from one step's end to the next one's, median
    idle_share: float  # of the time in which no kernel and no copy runs


@dataclass(frozen=True)
class Throughput:
    """One model on one trace. Rates are output tokens per second; ``vllm`` is the lowest and the highest known."""

    model: str
    trace: str
    digest: str
    num_requests: int
    num_output_tokens: int
    tokens_per_second: float
    rounds: list[float]
    decode: DecodePhase | None  # None: no GPU
    vllm: tuple[float, float] | None
    vllm_source: str


def max_model_len(traces: Sequence[Trace]) -> int:
    """Tokens of the longest request, a profiled one too, rounded up to whole blocks of any size."""
    longest = max(len(prompt) + max(length, PROFILED_TOKENS) for trace in traces for prompt, length in trace)
    return -(-longest // 256) * 256


def generate(llm: LLM, trace: Trace) -> float:
    """Answer the whole trace; seconds. Raises WrongCountError."""
    params = [
        SamplingParams(temperature=TEMPERATURE, max_tokens=length, ignore_eos=True, detokenize=False, seed=index)
        for index, (_, length) in enumerate(trace)
    ]
    start = time.perf_counter()
    outputs = llm.generate([prompt for prompt, _ in trace], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    for index, (output, (_, length)) in enumerate(zip(outputs, trace, strict=True)):
        count = len(output.outputs[0].token_ids)
        if count != length or output.outputs[0].finish_reason != "length":
            reason = output.error or output.outputs[0].finish_reason
            raise WrongCountError(f"request {index} has {count} tokens, not {length} ({reason})")
    return seconds


def profile_decode(llm: LLM, trace: Trace) -> DecodePhase:
    """Profile all prompts of a trace with outputs of equal length, and in it the steps in which all decode."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        generate(llm, [(prompt, PROFILED_TOKENS) for prompt, _ in trace])
        torch.cuda.synchronize()
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return decode_phase(spans, PROFILED_TOKENS, PROFILED_STEPS)


def decode_phase(spans: Sequence[tuple[str, float, float]], num_tokens: int, num_steps: int) -> DecodePhase:
    """Of what ran on the device, as (name, start, end) in microseconds: the steps before the first request ends.

    Steps end with a choice of tokens. All requests, of ``num_tokens`` each, have to decode in the ``num_steps`` steps.
    Raises RuntimeError when one still had a prompt to compute.
    """
    all_ends = sorted(end for name, _, end in spans if STEP_ENDS_WITH in name)
    ends = all_ends[num_tokens - num_steps - 2 : num_tokens - 1]
    num_prompt_steps = len(all_ends) - num_tokens + 1
    if len(ends) <= num_steps or num_prompt_steps > num_tokens - num_steps - 1:
        raise RuntimeError(
            f"the profile has {len(all_ends)} steps for {num_tokens} tokens a request: "
            f"not {num_steps} in which all decode"
        )
    first, last = ends[0], ends[-1]
    busy, reached = 0.0, first
    for _, start, end in sorted(spans, key=lambda span: span[1]):
        start, end = max(start, reached), min(end, last)
        if end > start:
            busy += end - start
            reached = end
    gaps = [after - before for before, after in itertools.pairwise(ends)]
    return DecodePhase(statistics.median(gaps) / 1e3, 1 - busy / (last - first))


def measure_vllm(config: ModelConfig, traces: dict[str, Trace], seconds_allowed: float = 900) -> dict[str, float]:
    """vLLM's output tokens per second on each trace, in a process of its own; RuntimeError if it does not end well."""
    request = {
        "shape": {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_size,
            "tie_word_embeddings": config.tie_word_embeddings,
        },
        "max_model_len": max_model_len(list(traces.values())),
        "max_num_seqs": MAX_NUM_SEQS,
        "temperature": TEMPERATURE,
        "traces": traces,
    }
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.vllm_throughput"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=seconds_allowed,
        check=False,
    )
    if found.returncode:
        raise RuntimeError(f"vLLM: {found.stderr.strip().rpartition(chr(10))[2]}")
    rates: dict[str, float] = json.loads(found.stdout.strip().rpartition("\n")[2])
    return rates


def rival_rates(
    model: str, config: ModelConfig, traces: dict[str, Trace], device: torch.device
) -> tuple[dict[str, tuple[float, float]], str]:
    """vLLM's lowest and highest rate by trace, as far as known, and where they are from."""
    source = "published for an H100"
    if device.type == "cuda" and importlib.util.find_spec("vllm") is not None:
        try:
            return {name: (rate, rate) for name, rate in measure_vllm(config, traces).items()}, "measured here"
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            source += f"; here it failed: {error}"
    keys = {name: (model, digest(trace)) for name, trace in traces.items()}
    return {name: PUBLISHED[key] for name, key in keys.items() if key in PUBLISHED}, source


def measure_model(
    model: str, traces: dict[str, Trace], device: torch.device, num_rounds: int
) -> tuple[list[Throughput], dict[str, Any]]:
    """One model on all traces, and how long it took to be ready."""
    name = SHORT_NAMES.get(model, model)
    rivals, source = rival_rates(model, RANDOM_MODELS[name], traces, device)
    begin = time.perf_counter()
    longest = max_model_len(list(traces.values()))
    loaded = random_model(RANDOM_MODELS[name], device=device, max_model_len=longest, name=name)
    if device.type == "cuda":
        torch.cuda.synchronize()
    loaded_at = time.perf_counter()
    llm = LLM(loaded, max_num_seqs=MAX_NUM_SEQS, enable_prefix_caching=False)
    ready_at = time.perf_counter()
    rows = []
    for trace_name, trace in traces.items():
        generate(llm, [(prompt, min(length, 8)) for prompt, length in trace])
        num_tokens = sum(length for _, length in trace)
        rates = [num_tokens / generate(llm, trace) for _ in range(num_rounds)]
        rows.append(
            Throughput(
                model=model,
                trace=trace_name,
                digest=digest(trace),
                num_requests=len(trace),
                num_output_tokens=num_tokens,
                tokens_per_second=statistics.median(rates),
                rounds=rates,
                decode=profile_decode(llm, trace) if device.type == "cuda" else None,
                vllm=rivals.get(trace_name),
                vllm_source=source if trace_name in rivals else "-",
            )
        )
    startup = {"model": model, "weights_seconds": loaded_at - begin, "ready_seconds": ready_at - loaded_at}
    return rows, startup


def print_rows(rows: Sequence[Throughput]) -> None:
    headings = ("model", "trace", "tokens/s", "vLLM", "ratio", "step, ms", "idle")
    widths = (6, 8, 9, 15, 11, 9, 6)
    print(" ".join(heading.rjust(width) for heading, width in zip(headings, widths, strict=True)), " vLLM's figure")
    for row in rows:
        known, ratio = "-", "-"
        if row.vllm is not None:
            ends = sorted({*row.vllm})
            known = "-".join(f"{rate:.0f}" for rate in ends)
            ratio = "-".join(f"{row.tokens_per_second / rate:.2f}" for rate in reversed(ends)) + "x"
        step, idle = "-", "-"
        if row.decode is not None:
            step, idle = f"{row.decode.step_ms:.3f}", f"{row.decode.idle_share:.1%}"
        cells = (row.model, row.trace, f"{row.tokens_per_second:.0f}", known, ratio, step, idle)
        print(" ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), "", row.vllm_source)


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all models on all traces and return the document. Raises WrongCountError, ValueError, RuntimeError."""
    device = torch.device(arguments.device)
    rows: list[Throughput] = []
    startups = []
    for model in (arguments.model or "135m,8b").split(","):
        if SHORT_NAMES.get(model, model) not in RANDOM_MODELS:
            allowed = ", ".join([*SHORT_NAMES, *RANDOM_MODELS])
            raise ValueError(f"model {model!r} is not allowed: it must be one of {allowed}")
        traces = {
            name: [
                (prompt, max(1, round(length * arguments.output_scale)))
                for prompt, length in make_trace(
                    name,
                    arguments.num_requests,
                    RANDOM_MODELS[SHORT_NAMES.get(model, model)].vocab_size,
                    arguments.seed,
                )
            ]
            for name in arguments.trace.split(",")
        }
        found, startup = measure_model(model, traces, device, arguments.rounds)
        print_rows(found)
        seconds = f"{startup['ready_seconds']:.1f} s, weights before that {startup['weights_seconds']:.1f} s"
        print(f"{model}: ready in {seconds}", flush=True)
        rows += found
        startups.append(startup)
    return {
        "benchmark": "throughput",
        "temperature": TEMPERATURE,
        "max_num_seqs": MAX_NUM_SEQS,
        "output_scale": arguments.output_scale,
        "startup": startups,
        "rows": [asdict(row) for row in rows],
    }
