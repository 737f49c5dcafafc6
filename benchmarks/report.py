"""Writes the tables of results in the README and docs from the committed JSON, so that no figure is typed.

    python -m benchmarks.report [--check]

Each block of a page between ``<!-- results:NAME -->`` and ``<!-- /results -->`` is made from the file in
``benchmarks/results/`` that ``MAKERS`` names for it. With ``--check`` nothing is written, and the exit status is 1 when
a block is not what its file gives.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import kv_memory, scheduling_report
from benchmarks.attention_systems import OURS
from benchmarks.engine import table
from benchmarks.kernel_summary import SECTIONS
from benchmarks.kernel_summary import table as kernel_table

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = {"exp": "exponential", "uniform": "uniform"}
BLOCK = re.compile(r"(<!-- results:([a-z0-9-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def engine_block(document: dict[str, Any]) -> str:
    """The comparison of ``benchmarks.engine`` in Markdown."""
    trace, versions, trials = document["trace"], document["versions"], document["trials"]
    headings, rows = table(document)
    scale = f", lengths scaled by {trace['output_scale']:g}" if trace["output_scale"] != 1 else ""
    caption = (
        f"{document['model']} in {document['dtype']}, {document['device']}, {document['cores']} cores, "
        f"{document['date']}; torch {versions['torch']}, transformers {versions['transformers']}. "
        f"{trace['num_requests']} requests at once: {trace['num_prompt_tokens']} prompt tokens, "
        f"{trace['num_output_tokens']} output tokens ({LENGTHS[trace['workload']]} lengths{scale}, the longest "
        f"{trace['longest_output']}; trace `{trace['digest']}`). Median of {document['num_rounds']} interleaved "
        f"rounds; greedy, EOS ignored. Baselines run with the best of several batch sizes (tried on outputs scaled by "
        f"{trials['output_scale']:g}) and with ours. [How to read it](docs/benchmarks.md)."
    )
    lines = [
        caption,
        "",
        "| " + " | ".join(headings) + " |",
        "|" + "|".join(["---"] + ["---:"] * (len(headings) - 1)) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def loop_cost_block(document: dict[str, Any]) -> str:
    """The host's part of a decode step in Markdown."""
    parts = ("step", "schedule", "launch", "finish", "p99")
    headings = ("", "sequences", "tokens of each", *parts)
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    lines += [
        f"| {'turnover' if row['has_turnover'] else 'steady'} | {row['num_running']} | {row['context']} | "
        + " | ".join(f"{row[part]:.0f}" for part in parts)
        + " |"
        for row in document["microseconds"]
    ]
    return "\n".join(lines) + "\n"


def throughput_block(document: dict[str, Any]) -> str:
    """Output tokens per second of ``benchmarks.engine --device cuda`` in Markdown."""
    versions = document["versions"]
    caption = (
        f"{document['device']}, {document['date']}; torch {versions['torch']}, Triton {versions['triton']}. "
        f"256 requests at once, bf16, random weights, temperature {document['temperature']:g}, EOS ignored. "
        "Steps and idle share are from a profile of the decodes of the same requests with short outputs."
    )
    lines = [
        caption,
        "",
        "| model | trace | output tokens/s | vLLM 0.23.0 | ratio | decode step, ms | device idle |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in document["rows"]:
        known = sorted({*row["vllm"]})
        ratios = "-".join(f"{row['tokens_per_second'] / rate:.2f}" for rate in reversed(known))
        rates = "-".join(f"{rate:,.0f}" for rate in known)
        lines.append(
            f"| {row['model']} | {row['trace']} (`{row['digest']}`) | {row['tokens_per_second']:,.0f} | {rates}, "
            f"{row['vllm_source']} | {ratios}x | {row['decode']['step_ms']:.2f} | {row['decode']['idle_share']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def kv_quantization_block(document: dict[str, Any]) -> str:
    """The accuracy of quantized caches in Markdown."""
    lines = ["| cache | scales | perplexity | greedy agreement |", "|---|---|---:|---:|"]
    lines += [
        f"| {row['cache']} | {row['scales']} | {row['perplexity']:.3f} | {row['agreement']:.2%} |"
        for row in document["rows"]
    ]
    return "\n".join(lines) + "\n"


def kernels_block(document: dict[str, Any]) -> str:
    """Every shape of ``benchmarks.kernels`` in Markdown, a table for each kind."""
    lines = [kernels_caption(document)]
    for kinds in SECTIONS:
        headings, rows = kernel_table(document, kinds)
        if rows:
            lines += ["", "| " + " | ".join(headings) + " |"]
            lines.append("|" + "|".join(["---"] * 2 + ["---:"] * (len(headings) - 2)) + "|")
            lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def kernels_summary_block(document: dict[str, Any]) -> str:
    """How ours stands against the peers of ``benchmarks.kernels``, over the shapes of each file and kind."""
    groups = {name: found for name, found in document["summary"]["against_peers"].items() if found["ratio"] is not None}
    prefix = "ratio to "
    peers = sorted({key.removeprefix(prefix) for found in groups.values() for key in found if key.startswith(prefix)})
    headings = ["shapes", "count", "of limit", "to the best peer", "worst", *(f"to {peer}" for peer in peers)]
    lines = [kernels_caption(document), "", "| " + " | ".join(headings) + " |"]
    lines.append("|---|" + "---:|" * (len(headings) - 1))
    for name, found in groups.items():
        ratios = [found["ratio"], found["worst_ratio"], *(found.get(prefix + peer) for peer in peers)]
        cells = [name.replace("_", " "), str(found["shapes"]), f"{found['of_limit']:.0%}"]
        cells += ["-" if value is None else f"{value:.2f}x" for value in ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def kernels_caption(document: dict[str, Any]) -> str:
    versions, ceilings = document["versions"], document["ceilings"]
    peers = [f"{name} ({version})" for name, version in document["systems"].items() if not name.startswith(OURS)]
    return (
        f"{document['device']}, {document['date']}; torch {versions['torch']}, Triton {versions['triton']}. Measured "
        f"there: {ceilings['read_bytes'] / 1e9:.0f} GB/s read, {ceilings['copy_bytes'] / 1e9:.0f} GB/s copied, "
        f"{ceilings['matmul_flops'] / 1e12:.0f} TFLOP/s in a large bf16 product. Peers: {', '.join(peers) or 'none'}. "
        "Medians of device time with a cold L2 cache, plans and metadata made before; above 1x ours is faster."
    )


def kv_memory_block(document: dict[str, Any]) -> str:
    """The tables of ``benchmarks.kv_memory``."""
    versions = document["versions"]
    caption = (
        f"{document['model']} in {document['dtype']}, {document['device']}, {document['threads']} threads, "
        f"{document['date']}; torch {versions['torch']}. {document['num_questions']} requests, "
        f"{document['max_tokens']} tokens each; medians of {document['num_rounds']} interleaved rounds, load average "
        f"before {document['load_average_before']:.1f}."
    )
    return f"{caption}\n\n{kv_memory.tables(document)}"


# Of each block: the file of results that it is made from, and how.
MAKERS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "engine-cpu": ("engine-cpu", engine_block),
    "kv-memory-cpu": ("kv-memory-cpu", kv_memory_block),
    "throughput-h100": ("h100-throughput", throughput_block),
    "throughput-h200": ("h200-throughput", throughput_block),
    "loop-cost": ("loop-cost-cpu", loop_cost_block),
    "kv-quantization": ("kv-quantization", kv_quantization_block),
    "h100-kernels": ("h100-kernels", kernels_block),
    "h100-kernels-summary": ("h100-kernels", kernels_summary_block),
    "h200-kernels": ("h200-kernels", kernels_block),
    "h200-kernels-summary": ("h200-kernels", kernels_summary_block),
    "scheduling": ("scheduling-h100", scheduling_report.summary),
    "scheduling-h100": ("scheduling-h100", scheduling_report.tables),
    "scheduling-cpu": ("scheduling-cpu", scheduling_report.tables),
    "textbook": ("scheduling-h100", scheduling_report.textbook),
    "simulator-accuracy": ("simulator-accuracy", scheduling_report.accuracy),
    "simulator-speed": ("simulator-speed", scheduling_report.speed),
}
PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/decode-loop.md",
    "docs/kernel-notes.md",
    "docs/scheduling.md",
    "docs/simulator.md",
)


def updated(readme: str, results: Path) -> str:
    """``readme`` with every block made anew. Raises ValueError for a block that no maker or file is known for."""

    def replace(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        file, make = MAKERS.get(name, (name, None))
        path = results / f"{file}.json"
        if make is None or not path.exists():
            raise ValueError(
                f"results:{name} is not known: it must be one of {', '.join(MAKERS)}, with its file {path}"
            )
        return opening + make(json.loads(path.read_text(encoding="utf-8"))) + closing

    return BLOCK.sub(replace, readme)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is stale")
    parsed = parser.parse_args(arguments)
    stale = False
    for page in (ROOT / name for name in PAGES):
        before = page.read_text(encoding="utf-8")
        after = updated(before, ROOT / "benchmarks" / "results")
        if parsed.check and before != after:
            print(f"{page} is stale: run python -m benchmarks.report", file=sys.stderr)
            stale = True
        elif not parsed.check:
            page.write_text(after, encoding="utf-8")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
