"""Where the time of a decode step goes, on the host and on the device, before and after the decode loop: a picture.

    python -m benchmarks.step_timeline [--model random-135m] [--running 256] [--context 256] [--output PNG] [--json OUT]

"Before" launches kernel by kernel and waits for each step (``enforce_eager``, no ``async_scheduling``); "after" is the
default. Both are profiled over the same decodes, in which nobody joins or leaves, by torch's profiler: it slows the
host down, most of all where many kernels are launched, so times of steps are taken without it. What bounds a step is
the device's work; what this shows is how much of the time the device waits for the host. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pagedattn.engine.llm import LLM
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.timeline import new_figure
from pagedattn.engine.weights import LoadedModel, load_model

WARM_UP_STEPS, TIMED_STEPS, PROFILED_STEPS = 24, 64, 12
HOST = "host: "
PARTS = ("schedule", "launch", "wait", "finish")
LAST_KERNEL = "accept_tokens"  # of a step
MODES: dict[str, dict[str, Any]] = {
    "before": {"enforce_eager": True, "async_scheduling": False},
    "after": {},
}
COLOURS = {"schedule": "tab:blue", "launch": "tab:orange", "wait": "lightgrey", "finish": "tab:green"}

Span = tuple[float, float]  # start and end, microseconds


@dataclass(frozen=True)
class Profile:
    """Spans of the host by part, and of kernels and copies by name; ``step_ms`` is without the profiler."""

    step_ms: float
    host: dict[str, list[Span]]
    device: list[tuple[str, float, float]]

    @property
    def window(self) -> Span | None:
        """Two steps from the middle, from one's last kernel to the last of the one after the next."""
        ends = sorted(end for name, _, end in self.device if LAST_KERNEL in name)
        return (ends[len(ends) // 2 - 1], ends[len(ends) // 2 + 1]) if len(ends) > 3 else None

    @property
    def idle_share(self) -> float | None:
        """Of the time between the first and the last step's end, that in which the device has nothing to do."""
        ends = sorted(end for name, _, end in self.device if LAST_KERNEL in name)
        if len(ends) < 2:
            return None
        busy = sum(end - start for start, end in merged((s, e) for _, s, e in self.device if ends[0] < e <= ends[-1]))
        return max(0.0, 1 - busy / (ends[-1] - ends[0]))


def merged(spans: Iterable[Span]) -> list[Span]:
    """The time that the spans cover, each moment once."""
    covered: list[Span] = []
    for start, end in sorted(spans):
        if covered and start <= covered[-1][1]:
            covered[-1] = (covered[-1][0], max(end, covered[-1][1]))
        else:
            covered.append((start, end))
    return covered


@contextmanager
def host_spans(llm: LLM) -> Iterator[None]:
    """Let the profiler see the parts of a step."""
    engine = llm.engine
    parts = {"schedule": (engine.scheduler, "schedule"), "launch": (engine.runner, "launch")}
    parts["finish"] = (engine, "_finish_next")

    def marked(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            with record_function(HOST + name):
                result = call(*args, **options)
            if name == "launch":
                result.wait = marked(result.wait, "wait")
            return result

        return run

    for name, (owner, attribute) in parts.items():
        setattr(owner, attribute, marked(getattr(owner, attribute), name))
    try:
        yield
    finally:
        for owner, attribute in parts.values():
            delattr(owner, attribute)


def profile_mode(loaded: LoadedModel, options: dict[str, Any], num_running: int, context: int) -> Profile:
    num_steps = WARM_UP_STEPS + TIMED_STEPS + PROFILED_STEPS + 8
    llm = LLM(
        loaded,
        num_blocks=num_running * (-(-(context + num_steps) // 16) + 2),
        max_num_seqs=num_running,
        max_model_len=context + num_steps + 8,
        enable_prefix_caching=False,
        **options,
    )
    engine = llm.engine
    for index in range(num_running):
        params = SamplingParams(temperature=0.6, max_tokens=num_steps, ignore_eos=True, detokenize=False)
        engine.add_request([index % 256] * context, params, is_streamed=False)
    while any(request.num_uncomputed_tokens > 1 for request in (*engine.scheduler.running, *engine.scheduler.waiting)):
        engine.step(with_usage=False)
    for _ in range(WARM_UP_STEPS):
        engine.step(with_usage=False)
    times = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        engine.step(with_usage=False)
        times.append((time.perf_counter() - start) * 1e3)
    activities = [ProfilerActivity.CPU]
    if llm.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with host_spans(llm), profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            engine.step(with_usage=False)
        if llm.device.type == "cuda":
            torch.cuda.synchronize()
    host: dict[str, list[Span]] = {part: [] for part in PARTS}
    device = []
    for event in profiler.events() or ():
        span = (event.time_range.start, event.time_range.end)
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if not event.name.startswith(HOST):
                device.append((event.name, *span))
        elif event.name.startswith(HOST):
            host[event.name.removeprefix(HOST)].append(span)
    return Profile(statistics.median(times), host, device)


def draw(profiles: dict[str, Profile], title: str, path: Path) -> None:
    """Two steps of each mode: the host's parts above, the device below."""
    figure = new_figure(11, 1.0 + 1.5 * len(profiles))
    panels = figure.subplots(len(profiles), 1, squeeze=False)[:, 0]
    for panel, (name, found) in zip(panels, profiles.items(), strict=True):
        first, last = found.window or (min(found.host["schedule"])[0], max(found.host["finish"])[1])
        for part, spans in found.host.items():
            shown = [(start - first, end - start) for start, end in spans if end > first and start < last]
            level = 0.75 if part == "wait" else 0.6  # a wait lies within a finish
            panel.broken_barh(shown, (1.0, level), facecolors=COLOURS[part], label=part)
        busy = merged((start, end) for _, start, end in found.device if end > first and start < last)
        panel.broken_barh([(start - first, end - start) for start, end in busy], (0.1, 0.6), facecolors="black")
        idle = "" if found.idle_share is None else f", device idle {found.idle_share:.0%}"
        panel.set_title(f"{name}: {found.step_ms:.2f} ms a step without the profiler{idle}", loc="left", fontsize=9)
        panel.set_yticks([0.4, 1.3], ["device", "host"])
        panel.set_xlim(0, last - first)
    panels[-1].set_xlabel(f"microseconds, profiled; {title}")
    panels[0].legend(ncols=len(PARTS), fontsize=8, loc="upper right")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def summary(found: Profile) -> dict[str, Any]:
    ends = sorted(end for name, _, end in found.device if LAST_KERNEL in name)
    profiled = [after - before for before, after in pairwise(ends)]
    return {
        "step_ms": round(found.step_ms, 4),
        "profiled_step_ms": round(statistics.median(profiled) / 1e3, 4) if profiled else None,
        "device_idle_share": None if found.idle_share is None else round(found.idle_share, 4),
        "device_launches_per_step": round(len(found.device) / PROFILED_STEPS, 1),
        "host_us": {
            part: round(statistics.median([end - start for start, end in spans]), 1) if spans else None
            for part, spans in found.host.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random-135m")
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the picture to this PNG file (needs matplotlib)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    loaded = load_model(options.model, device=options.device)
    profiles = {name: profile_mode(loaded, mode, options.running, options.context) for name, mode in MODES.items()}
    device = torch.cuda.get_device_name() if loaded.decoder.device.type == "cuda" else "cpu"
    title = f"{options.model}, {options.running} sequences of {options.context} tokens, {device}"
    document = {"benchmark": "step_timeline", "about": title} | {name: summary(one) for name, one in profiles.items()}
    if options.output:
        draw(profiles, title, options.output)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
