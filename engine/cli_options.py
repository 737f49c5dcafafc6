"""What the commands share: model and sampling options, and how they become an ``LLM`` and ``SamplingParams``.

Option defaults are those of ``LLM`` and ``SamplingParams``: an option that was not given is not passed on, so that each
default is written in one place. The exception is ``--max-tokens``, for a person expects more than SamplingParams' 16.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pagedattn.engine.model_store import DEFAULT_MODEL

if TYPE_CHECKING:
    from pagedattn.engine.llm import LLM
    from pagedattn.engine.sampling_params import SamplingParams
    from pagedattn.engine.weights import LoadedModel

LOAD_OPTIONS = ("dtype", "device", "max_model_len")
ENGINE_OPTIONS = (
    "block_size",
    "num_blocks",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "enable_prefix_caching",
    "swap_space",
    "policy",
    "order",
    "batch_invariant",
    "kv_cache_dtype",
    "seed",
)
SAMPLING_OPTIONS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "max_tokens",
    "min_tokens",
    "logprobs",
    "sampling_seed",
)
# What a user can bring about, and so gets as the exception worded it; anything else is ours and is named as such.
_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError)


def describe_error(error: BaseException) -> str:
    """One line that says what went wrong, for stderr or a JSONL result."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, _USER_ERRORS) else f"internal error, {type(error).__name__}: {text}"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose and size the engine."""
    group = parser.add_argument_group("model and engine")
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="a name from `pagedattn models`, a directory, a GGUF file or a hub id (default: %(default)s)",
    )
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    group.add_argument("--dtype", help="float32, float16, bfloat16 or auto (default: auto)")
    group.add_argument("--block-size", type=int, metavar="N", help="tokens in a KV cache block")
    group.add_argument("--num-blocks", type=int, metavar="N", help="KV cache blocks (default: what memory allows)")
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="sequences in a batch")
    group.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="tokens in a step")
    group.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt and answer together, in tokens")
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="requests that begin alike compute that once",
    )
    group.add_argument("--swap-space", type=float, metavar="GIB", help="host memory for preempted requests")
    group.add_argument("--policy", help="how batches are formed: default, static, vllm, ... (docs/batching.md)")
    group.add_argument("--order", help="who joins a batch first: fcfs, priority, sjf, fair, ... (docs/batching.md)")
    group.add_argument(
        "--batch-invariant",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the same bits for a request alone and in any batch; slower",
    )
    group.add_argument(
        "--kv-cache-dtype",
        metavar="FORMAT",
        help="what keys and values are stored as: auto, fp8 (fp8_e4m3), fp8_e5m2, int8 or int4 (default: auto)",
    )
    group.add_argument("--seed", type=int, help="where requests without a seed get theirs from")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Adds one option for each field of ``SamplingParams`` that a shell can express."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--n", type=int, metavar="N", help="answers to each prompt")
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P", help="smallest set of tokens with this probability")
    group.add_argument("--top-k", type=int, metavar="K", help="the K likeliest tokens; 0 is all")
    group.add_argument("--min-p", type=float, metavar="P", help="tokens at least P times as likely as the likeliest")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be repeated")
    group.add_argument(
        "--stop-token-id",
        type=int,
        action="append",
        dest="stop_token_ids",
        metavar="ID",
        help="end at this token; may be repeated",
    )
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on past the end-of-text token")
    group.add_argument("--max-tokens", type=int, metavar="N", default=256, help="longest answer (default: %(default)s)")
    group.add_argument("--min-tokens", type=int, metavar="N", help="shortest answer")
    group.add_argument("--logprobs", type=int, metavar="N", help="log probabilities of the N likeliest tokens (JSONL)")
    group.add_argument("--sampling-seed", type=int, metavar="SEED", help="the same answer in any batch")


def _given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(arguments, name, None)) is not None}


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """The sampling parameters of the command line; ValueError or TypeError as ``SamplingParams`` words it."""
    from pagedattn.engine.sampling_params import SamplingParams

    fields = _given(arguments, SAMPLING_OPTIONS)
    if "sampling_seed" in fields:
        fields["seed"] = fields.pop("sampling_seed")
    return SamplingParams(**fields)


def load_named_model(arguments: argparse.Namespace) -> LoadedModel:
    """Loads the model of the command line, fetched first if need be; says on stderr how far it is."""
    from pagedattn.engine.config import EngineConfig
    from pagedattn.engine.weights import load_model

    # Bad sizes are found before a model is fetched and loaded; the ones stand for sizes that are decided later.
    EngineConfig(**{"num_blocks": 1, "max_model_len": 1, **_given(arguments, ENGINE_OPTIONS)})
    status(f"loading {arguments.model}")
    start = time.monotonic()
    options = _given(arguments, LOAD_OPTIONS)
    loaded = load_model(arguments.model, progress=download_progress(arguments.model), **options)
    status(f"loaded in {time.monotonic() - start:.1f} s")
    return loaded


def make_llm(arguments: argparse.Namespace, loaded: LoadedModel, **overrides: Any) -> LLM:
    """An engine with the sizes of the command line around a model that is loaded."""
    from pagedattn.engine.llm import LLM

    return LLM(loaded, **{**_given(arguments, ENGINE_OPTIONS), **overrides})


def load_llm(arguments: argparse.Namespace) -> LLM:
    """The model and the engine of the command line."""
    return make_llm(arguments, load_named_model(arguments))


def download_progress(name: str) -> Callable[[int, int], None]:
    """Reports (bytes done, bytes in total) on stderr: in place in a terminal, elsewhere at every tenth."""
    last_text, last_tenth = "", -1

    def report(num_done: int, num_total: int) -> None:
        nonlocal last_text, last_tenth
        line = f"fetching {name}: {num_done / 2**20:.0f} of {num_total / 2**20:.0f} MiB"
        if sys.stderr.isatty():
            text = f"\r{line}" + ("\n" if num_done >= num_total else "")
            if text != last_text:
                print(text, end="", file=sys.stderr, flush=True)
                last_text = text
        elif 10 * num_done // max(num_total, 1) > last_tenth:
            last_tenth = 10 * num_done // max(num_total, 1)
            status(line)

    return report


def status(text: str) -> None:
    """A line about progress, kept off stdout."""
    print(text, file=sys.stderr, flush=True)
