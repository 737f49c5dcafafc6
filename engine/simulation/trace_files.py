"""Public traces as ``TraceRequest``: Azure's, BurstGPT's and Mooncake's formats, told apart by their first line.

- Azure LLM inference (AzurePublicDataset, 2023 and 2024): CSV, ``TIMESTAMP,ContextTokens,GeneratedTokens``; a date and
  time with fractions of a second.
- BurstGPT (1 to 3): CSV with ``Timestamp`` in seconds, ``Request tokens``, ``Response tokens`` and others; a response
  of 0 tokens is a request that failed. Where there is a ``Session ID`` it becomes the client.
- Mooncake: JSON lines with ``timestamp`` in milliseconds, ``input_length``, ``output_length``, ``hash_ids``: the prompt
  in chunks of 512 tokens, equal ids for equal prefixes.

Times count from the first request. Requests without a prompt or an answer are left out and counted.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pagedattn.engine.simulation.traces import PREFIX_CHUNK_TOKENS, TraceRequest

MAX_TOKENS = 2**31 - 1  # of a prompt or an answer; what has more is no trace


@dataclass(frozen=True)
class TraceFile:
    """``num_skipped``: requests of the file that had no prompt or no answer."""

    format: str
    requests: list[TraceRequest]
    num_skipped: int


@dataclass(frozen=True)
class _Row:
    """One request of a file, as it stands there."""

    seconds: float
    num_prompt_tokens: int
    num_output_tokens: int
    client_id: str = ""
    prefix_ids: tuple[int, ...] = ()


def read_trace(path: Path, *, limit: int | None = None, max_tokens: int | None = None) -> TraceFile:
    """The first ``limit`` requests of a trace file, sorted by arrival.

    ``max_tokens``: what every client allows, at least its answer; None: exactly the answer. Raises ValueError with the
    line for what is no trace, OSError for a file that cannot be read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} is not allowed: it must be >= 1")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} is not allowed: it must be >= 1")
    rows: list[_Row] = []
    num_skipped = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            name, parse = _format_of(path, next(lines, ""))
            lines.seek(0)
            for number, fields in _records(path, name, lines):
                try:
                    row = parse(fields)
                    if not math.isfinite(row.seconds):
                        raise ValueError(f"{row.seconds} is no time")
                except (ValueError, TypeError, KeyError, OverflowError) as error:
                    reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                    raise ValueError(f"{path}: line {number}: {reason}") from None
                if row.num_prompt_tokens < 1 or row.num_output_tokens < 1:
                    num_skipped += 1
                    continue
                rows.append(row)
                if len(rows) == limit:
                    break
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV: {error}") from None
    if not rows:
        raise ValueError(f"{path} has no request with a prompt and an answer")
    rows.sort(key=lambda row: row.seconds)
    numbers: dict[int, int] = {}  # ids may be hashes of any size: what counts is which are equal
    for prefix_id in itertools.chain.from_iterable(row.prefix_ids for row in rows):
        numbers.setdefault(prefix_id, len(numbers))
    requests = [_as_request(row, rows[0].seconds, max_tokens, numbers) for row in rows]
    return TraceFile(name, requests, num_skipped)


def _as_request(row: _Row, origin: float, max_tokens: int | None, numbers: dict[int, int]) -> TraceRequest:
    prefix_ids = row.prefix_ids[: -(-row.num_prompt_tokens // PREFIX_CHUNK_TOKENS)]
    return TraceRequest(
        row.seconds - origin,
        row.num_prompt_tokens,
        row.num_output_tokens,
        row.num_output_tokens if max_tokens is None else max(max_tokens, row.num_output_tokens),
        row.client_id,
        tuple(numbers[prefix_id] for prefix_id in prefix_ids),
    )


def _format_of(path: Path, first_line: str) -> tuple[str, Callable[[dict[str, Any]], _Row]]:
    columns = {column.strip() for column in first_line.split(",")}
    if first_line.lstrip().startswith("{"):
        return "mooncake", _parse_mooncake
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
        return "azure", _parse_azure
    if {"Timestamp", "Request tokens", "Response tokens"} <= columns:
        return "burstgpt", _parse_burstgpt
    raise ValueError(
        f"{path} is no trace: its first line is neither a JSON object (Mooncake) nor has it the columns "
        "TIMESTAMP, ContextTokens, GeneratedTokens (Azure) or Timestamp, Request tokens, Response tokens (BurstGPT)"
    )


def _records(path: Path, name: str, lines: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and fields."""
    if name == "mooncake":
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _json_object(line, f"{path}: line {number}")
    else:
        reader = csv.DictReader(lines, skipinitialspace=True, restval="")
        for fields in reader:
            yield reader.line_num, fields


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, lists in lists in lists
        raise ValueError(f"{place}: not JSON that can be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{place}: a request must be an object, not {type(found).__name__}")
    return found


def _parse_azure(fields: dict[str, Any]) -> _Row:
    # Some releases have more digits than microseconds, or a time zone.
    moment, _, fraction = fields["TIMESTAMP"].partition(".")
    digits = fraction.partition("+")[0].partition("Z")[0]
    seconds = datetime.fromisoformat(f"{moment.partition('+')[0]}+00:00").timestamp()
    return _Row(seconds + float(f"0.{digits or 0}"), _count(fields["ContextTokens"]), _count(fields["GeneratedTokens"]))


def _parse_burstgpt(fields: dict[str, Any]) -> _Row:
    return _Row(
        float(fields["Timestamp"]),
        _count(fields["Request tokens"]),
        _count(fields["Response tokens"]),
        client_id=(fields.get("Session ID") or "").strip(),
    )


def _parse_mooncake(fields: dict[str, Any]) -> _Row:
    prefix_ids = tuple(fields.get("hash_ids", ()))
    if not all(isinstance(prefix_id, int) and prefix_id >= 0 for prefix_id in prefix_ids):
        raise ValueError("hash_ids must be a list of ints >= 0")
    return _Row(
        float(fields["timestamp"]) / 1000.0,
        _count(fields["input_length"]),
        _count(fields["output_length"]),
        prefix_ids=prefix_ids,
    )


def _count(value: Any) -> int:
    """Some files have their counts as 12.0."""
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not number.is_integer() or not 0 <= number <= MAX_TOKENS:
        raise ValueError(f"{value!r} is no number of tokens")
    return int(number)
