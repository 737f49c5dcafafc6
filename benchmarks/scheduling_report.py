"""The results of ``benchmarks.scheduling`` and of the simulator's benchmarks in Markdown, for ``benchmarks.report``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

OURS, BASELINE = "default", "static"
PERCENTILES = ("p50", "p95", "p99")
SHARES = ("slot_utilization", "kv_usage", "kv_utilization", "prefix_hit_share")
TIMES = {"ttft": "TTFT", "inter_token_latency": "between tokens", "latency": "latency"}


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    rule = ["---"] * num_left + ["---:"] * (len(headings) - num_left)
    return "".join("| " + " | ".join(row) + " |\n" for row in (headings, rule, *rows))


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"


def _times(row: dict[str, Any], field: str) -> str:
    return "-" if row[field] is None else " / ".join(_seconds(row[field][name]) for name in PERCENTILES)


def _level(document: dict[str, Any]) -> str:
    level = document["service_level"]
    return (
        f"goodput counts requests with their first token within {level['ttft']:g} s and the others "
        f"{level['seconds_per_token'] * 1000:g} ms apart on average"
    )


def summary(document: dict[str, Any]) -> str:
    """Ours, the best other preset and the baseline on every workload."""

    def three(rows: dict[str, dict[str, Any]], of: Callable[[dict[str, Any]], float], larger: bool, text: str) -> str:
        others = [row for name, row in rows.items() if name not in (OURS, BASELINE)]
        best = max(others, key=of) if larger else min(others, key=of)
        cells = [text.format(of(row)) for row in (rows[OURS], best, rows[BASELINE])]
        return " / ".join(cells)

    grid = []
    for workload in document["workloads"]:
        rows = {row["policy"]: row for row in workload["rows"]}
        grid.append(
            [
                workload["name"],
                three(rows, lambda row: row["tokens_per_second"], True, "{:.0f}"),
                three(rows, lambda row: row["goodput"], True, "{:.1f}"),
                three(rows, lambda row: row["ttft"]["p99"], False, "{:.2f}"),
                three(rows, lambda row: row["inter_token_latency"]["p99"], False, "{:.3f}"),
                three(rows, lambda row: row["latency"]["p99"], False, "{:.1f}"),
            ]
        )
    headings = ["workload", "tokens/s", "goodput/s", "TTFT p99, s", "between tokens p99, s", "latency p99, s"]
    caption = (
        f"Simulated. {document['machine']} In each cell `{OURS}` / the best other preset / `{BASELINE}`; "
        f"{_level(document)}. All presets, and where `default` loses: [docs/scheduling.md](docs/scheduling.md).\n\n"
    )
    return caption + _grid(headings, grid)


def tables(document: dict[str, Any]) -> str:
    """A table for each workload, every preset a row, and below it where ours is not the best."""
    sizes = document["sizes"]
    caption = (
        f"{document['machine']} Batches of at most {sizes['max_num_seqs']} sequences and "
        f"{sizes['max_num_batched_tokens']} tokens; {sizes['num_blocks']} KV blocks of {sizes['block_size']} tokens; "
        f"{_level(document)}.\n"
    )
    parts = [caption]
    headings = ["preset", "tokens/s", "goodput/s", *(f"{title} p50 / p95 / p99, s" for title in TIMES.values())]
    headings += ["slots", "KV used", "KV filled", "prefix hits", "preempted"]
    for workload in document["workloads"]:
        rows = [
            [
                f"`{row['policy']}`",
                f"{row['tokens_per_second']:.0f}",
                f"{row['goodput']:.2f}",
                *(_times(row, field) for field in TIMES),
                *(f"{row[name]:.0%}" for name in SHARES),
                str(row["num_preemptions"]),
            ]
            for row in workload["rows"]
        ]
        mean_prompt = workload["num_prompt_tokens"] / workload["num_requests"]
        mean_output = workload["num_output_tokens"] / workload["num_requests"]
        parts.append(
            f"**{workload['name'].capitalize()}**: {workload['num_requests']} requests, {workload['rate']:g} a second "
            f"({workload['arrivals']}), {mean_prompt:.0f} prompt and {mean_output:.0f} output tokens on average, "
            f"max_tokens {workload['lengths']['max_tokens']}.\n\n{_grid(headings, rows)}\n"
            f"{losses(workload['rows'], document['noise'])}\n"
        )
    return "\n".join(parts)


def losses(rows: Sequence[dict[str, Any]], noise: float) -> str:
    """Where another preset is better than ours by more than ``noise``, and by how much the best one is."""
    figures: list[tuple[str, Callable[[dict[str, Any]], float], bool]] = [
        ("tokens/s", lambda row: float(row["tokens_per_second"]), True),
        ("goodput", lambda row: float(row["goodput"]), True),
    ]
    figures += [
        (f"{title} {percentile}", _time_of(field, percentile), False)
        for field, title in TIMES.items()
        for percentile in PERCENTILES
    ]
    (ours,) = [row for row in rows if row["policy"] == OURS]
    found = []
    for title, of, larger in figures:
        best = max(rows, key=of) if larger else min(rows, key=of)
        ahead = (of(best) / max(of(ours), 1e-12) if larger else of(ours) / max(of(best), 1e-12)) - 1
        if ahead > noise:
            value = f"{of(best):.2f}" if larger else f"{_seconds(of(best))} s"
            found.append(f"{title} (`{best['policy']}`: {value}, {ahead:.0%} better)")
    if not found:
        return f"`{OURS}` is the best, or within {noise:.0%} of it, in every column."
    return f"`{OURS}` loses in " + ", ".join(found) + "."


def _time_of(field: str, percentile: str) -> Callable[[dict[str, Any]], float]:
    return lambda row: float(row[field][percentile]) if row[field] else float("inf")


def textbook(document: dict[str, Any]) -> str:
    rows = [
        [
            str(row["batch_size"]),
            f"{row['static']:.0f}",
            f"{row['default']:.0f}",
            f"{row['ratio']:.2f}x",
            f"{row['harmonic_number']:.2f}",
        ]
        for row in document["textbook"]
    ]
    headings = ["batch", "static, tokens/s", "continuous, tokens/s", "ratio", "H_B"]
    return _grid(headings, rows, num_left=0)


def accuracy(document: dict[str, Any]) -> str:
    fields = ("tokens_per_second", "latency_p50", "latency_p99", "ttft_p50", "ttft_p99")
    rows = []
    for row in document["rows"]:
        cells = [
            f"{row['simulated'][name]:.2f} / {row['real'][name]:.2f} ({row['relative_errors'][name]:+.1%})"
            for name in fields
        ]
        rows.append([row["workload"]["name"], f"`{row['workload']['policy']}`", *cells])
    headings = ["workload", "preset", "tokens/s", "latency p50, s", "latency p99, s", "TTFT p50, s", "TTFT p99, s"]
    caption = (
        f"{document['model']} on one thread of {document['device']}, {document['date']}, load average before it "
        f"{document['load_average_before']:.1f}; simulated / real (error), the real engine's figures the median of "
        f"{document['num_rounds']} rounds.\n\n"
    )
    return caption + _grid(headings, rows, num_left=2)


def speed(document: dict[str, Any]) -> str:
    result = document["result"]
    with_caching = " with prefix caching" if document["prefix_caching"] else " without prefix caching"
    cpu = f"{document['cpu_seconds']:.0f} s of CPU time on one core of {document['device']} ({document['date']})"
    return (
        f"{result['num_requests']:,} requests, {result['num_output_tokens']:,} tokens and {result['num_steps']:,} "
        f"steps through one replica{with_caching}: {cpu}, {document['max_resident_mib']:.0f} MiB.\n"
    )
