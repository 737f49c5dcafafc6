"""The ``pagedattn`` command: its options, and what happens when something goes wrong.

Contract with the shell: results go to stdout, everything else to stderr. Exit status 0 on success, 2 when the request
could not be carried out (one line ``pagedattn: error: ...``, no traceback unless ``--debug``), 130 after Ctrl-C, 141
when the reader of stdout went away.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from pagedattn._version import __version__
from pagedattn.engine.cli_options import add_model_options, add_sampling_options, describe_error

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage text in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"pagedattn: error: {message}\n")


def _debug_option() -> OneLineParser:
    """The option that every command takes, before or after the command's name."""
    parent = OneLineParser(add_help=False)
    parent.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    return parent


def _add_generate(commands: argparse._SubParsersAction[OneLineParser], parent: OneLineParser) -> None:
    parser = commands.add_parser(
        "generate",
        parents=[parent],
        help="complete prompts: from arguments, from stdin, or from a JSONL file",
        description="Completes prompts. One prompt streams to the terminal. With --input every line of a JSONL file is "
        "a request, and its result is written when it is done; docs/command-line.md describes both formats.",
    )
    parser.set_defaults(run="pagedattn.engine.commands:run_generate")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; without one, stdin is the prompt")
    parser.add_argument("--chat", action="store_true", help="put each prompt through the model's chat template")
    parser.add_argument("--input", metavar="FILE", help="JSONL requests; - is stdin")
    parser.add_argument("--output", metavar="FILE", help="JSONL results of --input (default: stdout)")
    parser.add_argument("--resume", action="store_true", help="continue --output: skip the ids that are already in it")
    add_model_options(parser)
    add_sampling_options(parser)


def _add_chat(commands: argparse._SubParsersAction[OneLineParser], parent: OneLineParser) -> None:
    parser = commands.add_parser(
        "chat",
        parents=[parent],
        help="talk with the model",
        description="An interactive chat. /reset forgets the conversation, /exit or Ctrl-D leaves; Ctrl-C cancels the "
        "answer, or leaves where none is being given.",
    )
    parser.set_defaults(run="pagedattn.engine.commands:run_chat")
    parser.add_argument("--system", metavar="TEXT", help="a system message to start the conversation with")
    add_model_options(parser)
    add_sampling_options(parser)


def _add_demo(commands: argparse._SubParsersAction[OneLineParser], parent: OneLineParser) -> None:
    parser = commands.add_parser(
        "demo",
        parents=[parent],
        help="chat prompts arriving over time: continuous against static batching, live",
        description="Replays the same arrivals under each policy, shows them live, and compares: throughput, time to "
        "first token, latency, slot and KV utilization. Writes timeline.png and results.json.",
    )
    parser.set_defaults(run="pagedattn.engine.demo:run_demo")
    parser.add_argument("--policies", default="static,default", help="comma-separated, in order (default: %(default)s)")
    parser.add_argument("--num-requests", type=int, default=32, metavar="N", help="arrivals (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1.6, help="mean arrivals a second (default: %(default)s)")
    parser.add_argument("--output-dir", default="demo", metavar="DIR", help="for the results (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON on stdout, nothing else there")
    add_model_options(parser)
    # Small enough that arrivals have to queue, on any machine.
    parser.set_defaults(max_num_seqs=8, num_blocks=256)


def _add_simulate(commands: argparse._SubParsersAction[OneLineParser], parent: OneLineParser) -> None:
    parser = commands.add_parser(
        "simulate",
        parents=[parent],
        help="batching policies compared on a trace, in simulated time",
        description="Runs a trace through the engine's scheduler with a model of how long a step takes, for "
        "every combination of policy, order and load. docs/simulator.md describes traces, machines and figures.",
    )
    parser.set_defaults(run="pagedattn.engine.simulation.command:run_simulate")
    group = parser.add_argument_group("trace")
    group.add_argument("--trace", metavar="FILE", help="an Azure, BurstGPT or Mooncake trace (default: generate one)")
    group.add_argument("--workload", default="exp", help="lengths of a generated trace (default: %(default)s)")
    group.add_argument(
        "--arrivals", default="poisson", help="at-once, poisson, bursty or on-off (default: %(default)s)"
    )
    group.add_argument("--rate", type=float, default=10.0, help="mean arrivals a second (default: %(default)s)")
    group.add_argument("--burstiness", type=float, default=4.0, help="of bursty and on-off (default: %(default)s)")
    group.add_argument("--num-requests", type=int, metavar="N", help="so many (default: 1000, or the whole file)")
    group.add_argument("--seed", type=int, default=0, help="of a generated trace (default: %(default)s)")
    limit = group.add_mutually_exclusive_group()
    limit.add_argument("--max-tokens", type=int, metavar="N", help="what each client allows")
    limit.add_argument("--exact-max-tokens", action="store_true", help="each client allows exactly what it gets")
    group.add_argument("--load", default="1", help="arrive so many times as fast; several with commas (default: 1)")
    group = parser.add_argument_group("engines")
    group.add_argument("--policy", default="default", help="policies, with commas between them (default: %(default)s)")
    group.add_argument("--order", default="fcfs", help="who joins first, with commas (default: %(default)s)")
    group.add_argument("--machine", default="h100-8b", help="a name or a JSON file (default: %(default)s)")
    group.add_argument("--replicas", type=int, default=1, metavar="N", help="engines (default: %(default)s)")
    group.add_argument(
        "--router",
        default="least-loaded",
        help="round-robin, least-loaded or prefix-affinity (default: %(default)s)",
    )
    for name, text in (
        ("--block-size", "tokens in a KV cache block"),
        ("--num-blocks", "KV cache blocks of each engine"),
        ("--max-num-seqs", "sequences in a batch"),
        ("--max-num-batched-tokens", "tokens in a step"),
    ):
        group.add_argument(name, type=int, metavar="N", help=f"{text} (default: the machine's)")
    group = parser.add_argument_group("results")
    group.add_argument("--ttft-slo", type=float, default=1.0, metavar="SECONDS", help="goodput: first token in this")
    group.add_argument("--token-slo", type=float, default=0.05, metavar="SECONDS", help="goodput: a token in this")
    group.add_argument("--output-dir", metavar="DIR", help="write results.json and pictures there")
    group.add_argument("--json", action="store_true", help="print the results as JSON on stdout, nothing else there")


def _add_info(commands: argparse._SubParsersAction[OneLineParser], parent: OneLineParser) -> None:
    parser = commands.add_parser("info", parents=[parent], help="device, versions, backends, cached models")
    parser.set_defaults(run="pagedattn.engine.commands:run_info")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_models(commands: argparse._SubParsersAction[OneLineParser], parent: OneLineParser) -> None:
    parser = commands.add_parser("models", parents=[parent], help="list the models known by name, or fetch one")
    parser.set_defaults(run="pagedattn.engine.commands:run_models")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", parents=[parent], help="names, sizes, whether cached (the default)")
    pull = actions.add_parser("pull", parents=[parent], help="download a model into the cache")
    pull.add_argument("name", metavar="NAME")


def build_parser() -> OneLineParser:
    parent = _debug_option()
    parser = OneLineParser(
        prog="pagedattn",
        description="Language models served through continuous batching over a paged KV cache.",
        parents=[parent],
    )
    parser.set_defaults(debug=False)
    parser.add_argument("--version", action="version", version=f"pagedattn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=OneLineParser)
    for add in (_add_generate, _add_chat, _add_demo, _add_simulate, _add_info, _add_models):
        add(commands, parent)
    return parser


def _report_unraisable(unraisable: Any) -> None:
    """A Ctrl-C that arrives inside a finalizer or a callback is dropped by Python there: it comes again."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, _thread.interrupt_main).start()  # not at once: this runs inside the finalizer
    else:
        sys.__unraisablehook__(unraisable)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status that the module docstring describes."""
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as exit_request:  # argparse has printed its line, or the help
        return int(exit_request.code or 0)
    module, _, function = arguments.run.partition(":")
    previous_hook, sys.unraisablehook = sys.unraisablehook, _report_unraisable
    try:
        status: int = getattr(importlib.import_module(module), function)(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("pagedattn: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit: give it somewhere to write.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as error:
        # The last resort of a command: one line, whatever it was.
        if arguments.debug:
            raise
        print(f"pagedattn: error: {describe_error(error)}", file=sys.stderr)
        return EXIT_ERROR
    finally:
        sys.unraisablehook = previous_hook
    return status


if __name__ == "__main__":
    sys.exit(main())
