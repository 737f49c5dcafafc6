"""The commands ``generate``, ``chat``, ``info`` and ``models``. Each takes its options, returns an exit status."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pagedattn._version import __version__
from pagedattn.engine.cli_options import download_progress, load_llm, sampling_params, status
from pagedattn.ops import INTERPRETED

if TYPE_CHECKING:
    from pagedattn.engine.batch_file import BatchSummary
    from pagedattn.engine.llm import LLM
    from pagedattn.engine.sampling_params import SamplingParams

PROGRESS_SECONDS = 2.0


def run_generate(arguments: argparse.Namespace) -> int:
    params = sampling_params(arguments)
    if arguments.input is not None:
        if arguments.prompts:
            raise ValueError("give prompts as arguments or as --input, not both")
        return _generate_file(arguments, params)
    if arguments.output is not None or arguments.resume:
        raise ValueError("--output and --resume go with --input")
    prompts = arguments.prompts or [_stdin_prompt()]
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("the prompt is empty: give at least one character")
    llm = load_llm(arguments)
    if arguments.chat:
        inputs = [chat_prompt(llm, [{"role": "user", "content": prompt}]) for prompt in prompts]
    else:
        inputs = prompts
    if len(inputs) == params.n == 1:
        stream_answer(llm, inputs[0], params)
        return 0
    failures = []
    for prompt, output in zip(prompts, llm.generate(inputs, params), strict=True):
        print(f"> {prompt}")
        for choice in output.outputs:
            print(f"{choice.text}\n")
        if output.error is not None:
            failures.append(output.error)
    if failures:
        raise ValueError(f"{len(failures)} of {len(prompts)} prompts failed; the first: {failures[0]}")
    return 0


def _stdin_prompt() -> str:
    if sys.stdin.isatty():
        raise ValueError("no prompt: give one as an argument, on stdin, or a file of them with --input")
    return sys.stdin.read().removesuffix("\n")


def chat_prompt(llm: LLM, messages: list[dict[str, str]]) -> list[int]:
    """The token ids that ask ``llm`` for the next message of a conversation."""
    return llm.tokenizer.encode(llm.tokenizer.apply_chat_template(messages), add_special_tokens=False)


def stream_answer(llm: LLM, prompt: str | list[int], params: SamplingParams) -> str:
    """Prints one answer as it comes; returns it. Ctrl-C leaves the engine without the request."""
    printed, num_tokens, finish_reason = "", 0, None
    start = time.monotonic()
    with contextlib.closing(llm.stream(prompt, params)) as outputs:
        for output in outputs:
            if output.error is not None:
                raise ValueError(output.error)
            choice = output.outputs[0]
            sys.stdout.write(choice.text[len(printed) :])
            sys.stdout.flush()
            printed, num_tokens, finish_reason = choice.text, len(choice.token_ids), choice.finish_reason
    sys.stdout.write("\n")
    sys.stdout.flush()
    seconds = time.monotonic() - start
    status(f"[{num_tokens} tokens in {seconds:.1f} s, {num_tokens / seconds:.1f} tokens/s, {finish_reason}]")
    return printed


def _generate_file(arguments: argparse.Namespace, params: SamplingParams) -> int:
    from pagedattn.engine.batch_file import finished_ids, run_batch

    skip_ids: set[str] = set()
    if arguments.resume:
        if arguments.output is None:
            raise ValueError("--resume needs --output")
        skip_ids = finished_ids(Path(arguments.output))
    elif arguments.output is not None and Path(arguments.output).exists():
        raise ValueError(f"--output {arguments.output} exists: choose another name, or continue it with --resume")
    with _open_input(arguments.input) as lines:
        llm = load_llm(arguments)
        with _open_output(arguments.output) as output:
            start = time.monotonic()
            try:
                summary = run_batch(llm, lines, output, params, skip_ids=skip_ids, on_step=_batch_progress(start))
            except UnicodeDecodeError as error:
                raise ValueError(f"{arguments.input} is not UTF-8 text: {error}") from None
    seconds = max(time.monotonic() - start, 1e-9)
    skipped = f", {summary.num_skipped} were there already" if summary.num_skipped else ""
    rate = summary.num_generated_tokens / seconds
    status(f"[{summary.num_done} results{skipped}, {summary.num_generated_tokens} tokens, {rate:.1f} tokens/s]")
    if summary.num_failed:
        raise ValueError(f"{summary.num_failed} of {summary.num_done} requests failed: see the errors in the results")
    return 0


def _open_input(name: str) -> contextlib.AbstractContextManager[IO[str]]:
    return contextlib.nullcontext(sys.stdin) if name == "-" else Path(name).open(encoding="utf-8")


def _open_output(name: str | None) -> contextlib.AbstractContextManager[IO[str]]:
    return contextlib.nullcontext(sys.stdout) if name is None else Path(name).open("a", encoding="utf-8")


def _batch_progress(start: float) -> Callable[[BatchSummary], None]:
    """A line on stderr every few seconds."""
    last = start

    def report(summary: BatchSummary) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS:
            last = now
            rate = summary.num_generated_tokens / (now - start)
            status(f"[{summary.num_done} results, {summary.num_failed} failed, {rate:.1f} tokens/s]")

    return report


def run_chat(arguments: argparse.Namespace) -> int:
    params = sampling_params(arguments)
    with contextlib.suppress(ImportError):  # line editing and history where Python has it
        importlib.import_module("readline")
    llm = load_llm(arguments)
    if not llm.tokenizer.has_chat_template:
        raise ValueError(f"model {arguments.model!r} has no chat template: use `pagedattn generate`")
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = list(opening)
    for line in _read_lines():
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            messages = list(opening)
            status("the conversation starts anew")
        elif line.startswith("/"):
            status(f"no command {line!r}: there are /reset and /exit")
        elif line:
            messages = _take_turn(llm, messages, line, params)
    return 0


def _read_lines() -> Iterator[str]:
    """What the user types, until the end of the input."""
    prompt = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError):
        while True:
            yield input(prompt).strip()


def _take_turn(llm: LLM, messages: list[dict[str, str]], line: str, params: SamplingParams) -> list[dict[str, str]]:
    """Asks for an answer; returns the conversation with it, or as it was where there is none to keep."""
    asked = [*messages, {"role": "user", "content": line}]
    try:
        answer = stream_answer(llm, chat_prompt(llm, asked), params)
    except KeyboardInterrupt:
        status("\n[cancelled]")
        return messages
    except ValueError as error:
        status(f"{error}; /reset starts anew")
        return messages
    return [*asked, {"role": "assistant", "content": answer}]


def run_info(arguments: argparse.Namespace) -> int:
    facts = collect_info()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        rows = value if isinstance(value, list) else [value]
        for row, text in enumerate(rows or ["none"]):
            print(f"{name if row == 0 else '':<{width}}  {text}")
    return 0


def collect_info() -> dict[str, Any]:
    """What a bug report needs: versions, devices, which backend the ops take, the cache and its models."""
    import torch

    from pagedattn.engine.model_store import MODELS, cache_folder, cached_path

    has_triton = importlib.util.find_spec("triton") is not None
    try:
        cache = str(cache_folder())
        models = {name: cached_path(name) for name, entry in MODELS.items() if entry.file is not None}
    except ImportError as error:  # who uses the ops alone needs no cache
        cache, models = str(error), {}
    return {
        "pagedattn": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "packages": [_package_version(name) for name in ("triton", "numpy", "tokenizers", "safetensors", "gguf")],
        "default device": "cuda" if torch.cuda.is_available() else "cpu",
        "cpu threads": torch.get_num_threads(),
        "cuda devices": [_describe_cuda_device(index) for index in range(torch.cuda.device_count())],
        "ops on cpu": "Triton under its interpreter" if INTERPRETED else "torch reference",
        "ops on cuda": "Triton" if has_triton else "unavailable: triton is not installed",
        "cache": cache,
        "cached models": [
            f"{name} ({path.stat().st_size / 2**20:.0f} MiB)" for name, path in models.items() if path is not None
        ],
    }


def _package_version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} not installed"


def _describe_cuda_device(index: int) -> str:
    import torch

    device = torch.cuda.get_device_properties(index)
    return f"{device.name}, capability {device.major}.{device.minor}, {device.total_memory / 2**30:.0f} GiB"


def run_models(arguments: argparse.Namespace) -> int:
    from pagedattn.engine import model_store

    if arguments.action == "pull":
        print(model_store.pull(arguments.name, progress=download_progress(arguments.name)))
        return 0
    for name, entry in model_store.MODELS.items():
        state = "built in" if entry.file is None else "cached" if model_store.cached_path(name) else "to pull"
        print(f"{name:<24} {state:<10} {entry.description}")
    return 0
