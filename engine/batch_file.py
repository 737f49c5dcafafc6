"""Batch jobs: JSONL requests in, JSONL results out, through one engine.

A request line is an object with one of ``prompt`` (text), ``prompt_token_ids`` (ids) and ``messages`` (a chat), and
optionally ``custom_id`` (unique text; ``line-N`` without one) and ``params`` (fields of ``SamplingParams``; what is not
given there comes from the job's defaults). Unknown keys are errors. Result lines are written and flushed as requests
end, in that order. A line that is no good, or a request that fails, gives a result with ``error``; the others go on.

Only so many lines are read ahead as keep the batch full: a file may be longer than memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pagedattn.engine.cli_options import describe_error
from pagedattn.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pagedattn.engine.llm import LLM
    from pagedattn.engine.outputs import CompletionOutput, RequestOutput

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
LINE_KEYS = ("custom_id", *PROMPT_KEYS, "params")
RESULT_START = b'{"custom_id": '
PARAMETER_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))


@dataclass(frozen=True)
class BatchRequest:
    """One line: a prompt (text or token ids) or the messages of a chat."""

    line_number: int
    custom_id: str
    prompt: str | list[int] | None
    messages: list[dict[str, str]] | None
    params: SamplingParams


class BatchLineError(ValueError):
    """A line that is no request; ``custom_id`` is the line's own where it could be read."""

    def __init__(self, custom_id: str, message: str) -> None:
        super().__init__(message)
        self.custom_id = custom_id


@dataclass
class BatchSummary:
    """Counts of a job so far. ``num_skipped`` lines had a result already."""

    num_done: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    num_generated_tokens: int = 0


def parse_line(text: str, line_number: int, defaults: SamplingParams) -> BatchRequest:
    """Reads one line (numbered from 1). Raises BatchLineError naming the line and what is wrong with it."""
    custom_id = f"line-{line_number}"
    try:
        line = json.loads(text.removeprefix("\ufeff") if line_number == 1 else text)  # a byte order mark
        if not isinstance(line, dict):
            raise TypeError(f"a request must be an object, not {type(line).__name__}")
        given_id = line.get("custom_id", custom_id)
        if not isinstance(given_id, str) or not given_id:
            raise TypeError(f"custom_id must be a non-empty string, not {given_id!r}")
        custom_id = given_id
        _reject_unknown("key", line, LINE_KEYS)
        key = _validated_prompt_key(line)
        messages = line[key] if key == "messages" else None
        prompt = line[key] if key != "messages" else None
        return BatchRequest(line_number, custom_id, prompt, messages, _params_of(line, defaults))
    except json.JSONDecodeError as error:
        raise BatchLineError(custom_id, f"line {line_number}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise BatchLineError(custom_id, f"line {line_number}: {describe_error(error)}") from None


def _reject_unknown(what: str, given: dict[str, Any], allowed: tuple[str, ...]) -> None:
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise ValueError(f"unknown {what} {unknown[0]!r}; allowed: {', '.join(allowed)}")


def _validated_prompt_key(line: dict[str, Any]) -> str:
    """Which of PROMPT_KEYS the line has. The engine and the chat template check what is inside."""
    given = [key for key in PROMPT_KEYS if key in line]
    if len(given) != 1:
        raise ValueError(f"a request needs exactly one of {', '.join(PROMPT_KEYS)}, not {len(given)}")
    key = given[0]
    wanted = str if key == "prompt" else list
    if not isinstance(line[key], wanted):
        raise TypeError(f"{key} must be a {'string' if wanted is str else 'list'}, not {line[key]!r:.80}")
    if not line[key]:
        raise ValueError(f"{key} is empty")
    return key


def _params_of(line: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    params = line.get("params", {})
    if not isinstance(params, dict):
        raise TypeError(f"params must be an object, not {params!r}")
    _reject_unknown("sampling parameter", params, PARAMETER_NAMES)
    return dataclasses.replace(defaults, **params)


def finished_ids(output: Path) -> set[str]:
    """The ids that have a result in ``output``, which may not exist yet.

    A last line without its newline is the trace of a job that was killed in mid-write: it is cut off.
    """
    if not output.exists():
        return set()
    ids = set()
    with output.open("rb+") as file:
        complete = 0
        for number, line in enumerate(file, start=1):
            try:
                if line.endswith(b"\n"):
                    ids.add(json.loads(line)["custom_id"])
                elif RESULT_START.startswith(line[: len(RESULT_START)]):
                    file.truncate(complete)
                else:
                    raise ValueError
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{output}: line {number} is no result of this command: nothing to resume") from None
            complete += len(line)
    return ids


def run_batch(
    llm: LLM,
    lines: Iterable[str],
    output: IO[str],
    defaults: SamplingParams,
    *,
    skip_ids: Iterable[str] = (),
    on_step: Callable[[BatchSummary], None] | None = None,
) -> BatchSummary:
    """Runs every request of ``lines`` and writes its result to ``output``; returns the counts.

    ``skip_ids`` have a result already. ``on_step`` is called after each step, for progress.
    """
    summary = BatchSummary()
    requests = _read_requests(lines, defaults, set(skip_ids), summary)
    # Two batches' worth in the engine: the queue never runs dry while a batch is computed.
    read_ahead = 2 * llm.engine.config.max_num_seqs
    in_flight: dict[str, str] = {}  # the engine's id: custom_id

    def write(result: dict[str, Any]) -> None:
        summary.num_done += 1
        summary.num_failed += result["error"] is not None
        output.write(json.dumps(result, ensure_ascii=False) + "\n")
        output.flush()

    try:
        while True:
            while len(in_flight) < read_ahead and (request := next(requests, None)) is not None:
                if isinstance(request, BatchLineError):
                    write(_failure(request.custom_id, str(request)))
                    continue
                try:
                    in_flight[_add(llm, request)] = request.custom_id
                except (ValueError, TypeError) as error:
                    write(_failure(request.custom_id, f"line {request.line_number}: {describe_error(error)}"))
            if not llm.engine.has_unfinished:
                return summary
            for finished in llm.engine.step(with_usage=False).outputs:
                if not finished.finished or finished.request_id not in in_flight:
                    continue
                summary.num_generated_tokens += sum(len(choice.token_ids) for choice in finished.outputs)
                write(_result(in_flight.pop(finished.request_id), finished))
            if on_step is not None:
                on_step(summary)
    finally:
        for request_id in in_flight:
            llm.engine.abort(request_id)


def _read_requests(
    lines: Iterable[str], defaults: SamplingParams, done_ids: set[str], summary: BatchSummary
) -> Iterator[BatchRequest | BatchLineError]:
    """The requests still to run, in the file's order, and in their places the lines that are none."""
    seen: dict[str, int] = {}
    for line_number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            request = parse_line(text, line_number, defaults)
            if request.custom_id in seen:
                first = seen[request.custom_id]
                message = f"line {line_number}: custom_id {request.custom_id!r} is line {first}'s already"
                raise BatchLineError(f"line-{line_number}", message)
        except BatchLineError as error:
            seen.setdefault(error.custom_id, line_number)
            if error.custom_id in done_ids:
                summary.num_skipped += 1
            else:
                yield error
            continue
        seen[request.custom_id] = line_number
        if request.custom_id in done_ids:
            summary.num_skipped += 1
        else:
            yield request


def _add(llm: LLM, request: BatchRequest) -> str:
    """Queues the request; returns the engine's id of it."""
    prompt = request.prompt
    if request.messages is not None:
        prompt = llm.tokenizer.encode(llm.tokenizer.apply_chat_template(request.messages), add_special_tokens=False)
    assert prompt is not None
    return llm.engine.add_request(prompt, request.params, is_streamed=False)


def _result(custom_id: str, output: RequestOutput) -> dict[str, Any]:
    choices = [_choice(choice) for choice in output.outputs]
    num_prompt_tokens = len(output.prompt_token_ids)
    num_completion_tokens = sum(len(choice.token_ids) for choice in output.outputs)
    result: dict[str, Any] = {
        "custom_id": custom_id,
        **choices[0],
        "usage": {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_completion_tokens,
            "total_tokens": num_prompt_tokens + num_completion_tokens,
        },
        "error": output.error,
    }
    if len(choices) > 1:
        result["choices"] = choices
    return result


def _choice(choice: CompletionOutput) -> dict[str, Any]:
    fields: dict[str, Any] = {"text": choice.text, "finish_reason": choice.finish_reason}
    if choice.logprobs is not None:
        fields["logprobs"] = [
            {str(token_id): entry.logprob for token_id, entry in position.items()} for position in choice.logprobs
        ]
    return fields


def _failure(custom_id: str, message: str) -> dict[str, Any]:
    return {"custom_id": custom_id, "text": None, "finish_reason": "error", "usage": None, "error": message}
