"""Writes the tables of results in the README and docs from the committed JSON, so that no figure is typed.

    python -m benchmarks.report [--check]

Each block of a page between ``<!-- results:NAME -->`` and ``<!-- /results -->`` is made from
``benchmarks/results/NAME.json``. With ``--check`` nothing is written, and the exit status is 1 when a block is not what
its file gives.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine import table

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


def kv_quantization_block(document: dict[str, Any]) -> str:
    """The accuracy of quantized caches in Markdown."""
    lines = ["| cache | scales | perplexity | greedy agreement |", "|---|---|---:|---:|"]
    lines += [
        f"| {row['cache']} | {row['scales']} | {row['perplexity']:.3f} | {row['agreement']:.2%} |"
        for row in document["rows"]
    ]
    return "\n".join(lines) + "\n"


MAKERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "engine-cpu": engine_block,
    "kv-quantization": kv_quantization_block,
}
PAGES = ("README.md", "docs/kernel-notes.md")


def updated(readme: str, results: Path) -> str:
    """``readme`` with every block made anew. Raises ValueError for a block that no maker or file is known for."""

    def replace(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        path = results / f"{name}.json"
        if name not in MAKERS or not path.exists():
            raise ValueError(
                f"results:{name} is not known: it must be one of {', '.join(MAKERS)}, with its file {path}"
            )
        return opening + MAKERS[name](json.loads(path.read_text(encoding="utf-8"))) + closing

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
