"""The command: what it prints, where, and with which exit status; and what each bad input gives."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pagedattn._version import __version__
from pagedattn.engine import cli, model_store

ROOT = Path(__file__).resolve().parents[2]
RANDOM = ("--model", "random")
PROGRESS = ("loading ", "loaded in ", "fetching ", "policy ", "[")


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that are not progress, nor the empty one that ends it."""
        return [line for line in self.err.splitlines() if line and not line.startswith(PROGRESS)]


Command = Callable[..., Outcome]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs the command in this process, in an empty folder, with an empty stdin."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        status = cli.main(arguments)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


# What a user may get wrong, and how the one line that says so begins; docs/errors.md has the same lines.
BAD_INPUTS: dict[str, tuple[Sequence[str], str]] = {
    "no command": ([], "the following arguments are required: COMMAND"),
    "unknown command": (["serv"], "argument COMMAND: invalid choice: 'serv'"),
    "unknown option": (["generate", "--colour", "hi"], "unrecognized arguments: --colour"),
    "negative swap space": (
        ["generate", "--swap-space=-1", *RANDOM, "hi"],
        "swap_space=-1.0 is not allowed: it must be a finite number of GiB >= 0",
    ),
    "more blocks than there is memory for": (
        ["generate", "--num-blocks", "9999999999999999999999", *RANDOM, "hi"],
        "1.000e+22 blocks of the KV cache cannot be allocated: one takes 8192 bytes",
    ),
    "more blocks than this machine has memory for": (
        ["generate", "--num-blocks", "99999999999", *RANDOM, "hi"],
        "there is too little memory for a KV cache of 99999999999 blocks: lower num_blocks or swap_space",
    ),
    "more swap space than there is memory": (
        ["generate", "--swap-space", "1e300", *RANDOM, "hi"],
        "1.311e+305 blocks of swap space cannot be allocated: one takes 8192 bytes",
    ),
    "unknown format of the cache": (
        ["generate", "--kv-cache-dtype", "fp4", *RANDOM, "hi"],
        "kv_cache_dtype='fp4' is not allowed: it must be one of auto, fp8, fp8_e4m3, fp8_e5m2, int8, int4",
    ),
    "no answers": (["generate", "--n", "0", *RANDOM, "hi"], "n=0 is not allowed: it must be an int >= 1"),
    "empty prompt": (["generate", ""], "the prompt is empty: give at least one character"),
    "empty stdin": (["generate"], "the prompt is empty: give at least one character"),
    "unknown model": (
        ["generate", "--model", "smollm2", "hi"],
        "unknown model 'smollm2': did you mean 'smollm2-135m-instruct'? known: smollm2-135m-instruct, random,",
    ),
    "model path that is not there": (
        ["generate", "--model", "./nowhere", "hi"],
        "no such file or directory: ./nowhere",
    ),
    "corrupt model file": (
        ["generate", "--model", "corrupt.gguf", "hi"],
        "corrupt.gguf is not a GGUF file: it starts with b'not ', not b'GGUF'",
    ),
    "empty model file": (["generate", "--model", "empty.gguf", "hi"], "empty.gguf is empty; expected a GGUF file"),
    "folder without a model": (
        ["generate", "--model", "folder", "hi"],
        "folder/config.json cannot be read: No such file or directory",
    ),
    "nothing to pull": (["models", "pull", "random"], "random has random weights: there is nothing to fetch"),
    "negative temperature": (
        ["generate", "--temperature=-1", "hi"],
        "temperature=-1.0 is not allowed: it must be a finite number >= 0",
    ),
    "temperature NaN": (
        ["generate", "--temperature", "nan", "hi"],
        "temperature=nan is not allowed: it must be a finite number >= 0",
    ),
    "temperature infinite": (
        ["generate", "--temperature", "inf", "hi"],
        "temperature=inf is not allowed: it must be a finite number >= 0",
    ),
    "temperature that is no number": (
        ["generate", "--temperature", "warm", "hi"],
        "argument --temperature: invalid float value: 'warm'",
    ),
    "top_p zero": (["generate", "--top-p", "0", "hi"], "top_p=0.0 is not allowed: it must be a number in (0, 1]"),
    "top_p NaN": (["generate", "--top-p", "nan", "hi"], "top_p=nan is not allowed: it must be a number in (0, 1]"),
    "negative top_k": (
        ["generate", "--top-k=-2", "hi"],
        "top_k=-2 is not allowed: it must be an int >= 1, or 0 or -1 for off",
    ),
    "min_p above one": (
        ["generate", "--min-p", "1.5", "hi"],
        "min_p=1.5 is not allowed: it must be a number in [0, 1]",
    ),
    "no tokens": (
        ["generate", "--max-tokens", "0", "hi"],
        "max_tokens=0 is not allowed: it must be an int >= 1 or None",
    ),
    "min_tokens above max_tokens": (
        ["generate", "--max-tokens", "4", "--min-tokens", "5", "hi"],
        "min_tokens=5 is not allowed: it must be <= max_tokens=4",
    ),
    "too many logprobs": (
        ["generate", "--logprobs", "21", "hi"],
        "logprobs=21 is not allowed: it must be an int in [0, 20] or None",
    ),
    "empty stop string": (
        ["generate", "--stop", "", "hi"],
        "stop=[''] is not allowed: a stop string must not be empty",
    ),
    "stop token out of the vocabulary": (
        ["generate", *RANDOM, "--stop-token-id", "999", "hi"],
        "stop_token_ids has 999: ids must be in [0, 259)",
    ),
    "prompt longer than the model": (
        ["generate", *RANDOM, "hi" * 2500],
        "the prompt has 5000 tokens: it must have fewer than max_model_len=4096, so that one more fits",
    ),
    "too few blocks": (
        ["generate", *RANDOM, "--num-blocks", "4", "hi" * 50],
        "the prompt has 100 tokens: it must have fewer than max_model_len=64, so that one more fits",
    ),
    "no blocks": (["generate", "--num-blocks", "0", "hi"], "num_blocks=0 is not allowed: it must be an int >= 1"),
    "empty blocks": (["generate", "--block-size", "0", "hi"], "block_size=0 is not allowed: it must be an int >= 1"),
    "negative batch": (
        ["generate", "--max-num-seqs=-1", "hi"],
        "max_num_seqs=-1 is not allowed: it must be an int >= 1",
    ),
    "longer than the model's positions": (
        ["generate", *RANDOM, "--max-model-len", "100000", "hi"],
        "max_model_len is 100000; it must be between 1 and the model's max_position_embeddings, 4096",
    ),
    "unknown policy": (
        ["generate", "--policy", "dynamic", "hi"],
        "policy='dynamic' is not known: it must be one of default, static, orca,",
    ),
    "unknown order": (
        ["generate", "--order", "lifo", "hi"],
        "order='lifo' is not known: it must be one of fcfs, priority,",
    ),
    "unknown device": (
        ["generate", *RANDOM, "--device", "tpu", "hi"],
        "device is 'tpu'; it must be 'cpu', 'cuda' or 'cuda:<index>'",
    ),
    "unknown dtype": (["generate", *RANDOM, "--dtype", "int8", "hi"], "dtype is 'int8'; it must be 'auto', 'float32',"),
    "no such input file": (["generate", "--input", "nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
    "input that is not text": (["generate", *RANDOM, "--input", "corrupt.gguf"], "corrupt.gguf is not UTF-8 text"),
    "bad lines of JSONL": (
        ["generate", *RANDOM, "--max-tokens", "2", "--input", "bad.jsonl"],
        "2 of 3 requests failed: see the errors in the results",
    ),
    "output that is there": (
        ["generate", *RANDOM, "--input", "bad.jsonl", "--output", "there.txt"],
        "--output there.txt exists: choose another name, or continue it with --resume",
    ),
    "resume of another file": (
        ["generate", *RANDOM, "--input", "bad.jsonl", "--output", "there.txt", "--resume"],
        "there.txt: line 1 is no result of this command: nothing to resume",
    ),
    "two kinds of input": (
        ["generate", "--input", "bad.jsonl", "hi"],
        "give prompts as arguments or as --input, not both",
    ),
    "output without input": (["generate", "--output", "out.jsonl", "hi"], "--output and --resume go with --input"),
    "demo without requests": (
        ["demo", "--num-requests", "0"],
        "--num-requests 0 is not allowed: it must be 1 to 100000",
    ),
    "demo at no rate": (["demo", "--rate", "nan"], "--rate nan is not allowed: it must be a finite number > 0"),
    "demo into a file": (["demo", "--output-dir", "there.txt"], "there.txt: File exists"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_gives_one_line(arguments: Sequence[str], message: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "corrupt.gguf").write_bytes(b"not a model \xff\xfe" * 50)
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "there.txt").write_text("what somebody wrote\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": \n{"prompt": "hi", "max_tokens": 3}\n{"prompt": "ok"}\n')
    outcome = command(*arguments)
    assert outcome.status == 2
    assert len(outcome.errors) == 1, outcome.err
    assert outcome.errors[0].startswith(f"pagedattn: error: {message}")


def test_the_page_of_errors_has_every_message() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    missing = [message for _, message in BAD_INPUTS.values() if message not in page]
    assert not missing


def test_full_disk_gives_one_line(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PAGEDATTN_CACHE", str(tmp_path / "cache"))
    usage = type("Usage", (), {"total": 1 << 40, "used": 1 << 40, "free": 1 << 20})
    monkeypatch.setattr(model_store.shutil, "disk_usage", lambda folder: usage)
    for arguments in (["models", "pull", model_store.DEFAULT_MODEL], ["generate", "hi"]):
        outcome = command(*arguments)
        assert outcome.status == 2
        assert len(outcome.errors) == 1
        assert outcome.errors[0].startswith(f"pagedattn: error: the disk is full at {tmp_path / 'cache'}")
        assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_cache_that_is_a_file_gives_one_line(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("PAGEDATTN_CACHE", str(tmp_path / "cache"))
    outcome = command("models", "pull", model_store.DEFAULT_MODEL)
    assert outcome.status == 2
    message = "(Not a directory): set PAGEDATTN_CACHE to a writable folder"
    folder = f"{tmp_path}/cache/models/{model_store.DEFAULT_MODEL}"
    assert outcome.errors == [f"pagedattn: error: cannot write the model cache {folder} {message}"]


def test_debug_shows_the_traceback(command: Command) -> None:
    with pytest.raises(ValueError, match="top_p=2"):
        command("generate", "--debug", "--top-p", "2", "hi")


def test_our_own_mistakes_are_named_as_such(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: object) -> int:
        raise KeyError("slot\nmapping")

    monkeypatch.setattr("pagedattn.engine.commands.run_info", broken)
    outcome = command("info")
    assert outcome.status == 2
    assert outcome.errors == [r"pagedattn: error: internal error, KeyError: 'slot\nmapping'"]


def test_version(command: Command) -> None:
    assert command("--version") == Outcome(0, f"pagedattn {__version__}\n", "")


def test_info_as_json(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PAGEDATTN_CACHE", str(tmp_path / "cache"))
    facts = json.loads(command("info", "--json").out)
    assert facts["pagedattn"] == __version__
    assert facts["cache"].startswith(str(tmp_path))
    assert facts["cached models"] == []
    lines = command("info").out.splitlines()
    assert [line.split("  ")[0] for line in lines if not line.startswith(" ")] == list(facts)


def test_info_without_the_library_that_finds_the_cache(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAGEDATTN_CACHE", raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    facts = json.loads(command("info", "--json").out)
    assert "needs platformdirs" in facts["cache"]
    assert facts["cached models"] == []


def test_models_are_listed_with_their_state(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PAGEDATTN_CACHE", str(tmp_path / "cache"))
    rows = [line.split()[:2] for line in command("models").out.splitlines()]
    assert ["smollm2-135m-instruct", "to"] in rows
    assert ["random", "built"] in rows
    assert command("models", "list").out == command("models").out


def test_one_prompt_streams_and_is_repeatable(command: Command) -> None:
    arguments = ("generate", *RANDOM, "--max-tokens", "12", "--ignore-eos", "--sampling-seed", "3", "hello")
    first = command(*arguments)
    assert first.status == 0
    assert "[12 tokens in " in first.err
    assert first.out == command(*arguments).out
    assert first.out == command(*arguments[:-1], stdin="hello\n").out


def test_several_prompts_are_answered_in_order(command: Command) -> None:
    outcome = command("generate", *RANDOM, "--max-tokens", "3", "--temperature", "0", "one", "two")
    assert outcome.status == 0
    assert outcome.out.index("> one\n") < outcome.out.index("> two\n")


def test_one_of_several_prompts_fails_alone(command: Command) -> None:
    outcome = command("generate", *RANDOM, "--max-tokens", "3", "--num-blocks", "4", "one", "hi" * 50)
    assert outcome.status == 2
    assert "> one\n" in outcome.out
    assert outcome.errors[-1].startswith(
        "pagedattn: error: 1 of 2 prompts failed; the first: the prompt has 100 tokens"
    )


def test_stop_string_ends_the_answer(command: Command) -> None:
    arguments = ("generate", *RANDOM, "--max-tokens", "20", "--temperature", "0", "--ignore-eos", "hello")
    whole = command(*arguments).out.removesuffix("\n")
    assert len(whole) > 4
    outcome = command(*arguments[:-1], "--stop", whole[2:4], "hello")
    assert outcome.out == whole[: whole.index(whole[2:4])] + "\n"
    assert outcome.err.splitlines()[-1].endswith(", stop]")


def test_chat_keeps_the_conversation_until_reset(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from pagedattn.engine.tokenizer import Tokenizer

    asked: list[list[str]] = []
    apply = Tokenizer.apply_chat_template

    def spy(self: Tokenizer, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        asked.append([message["role"] for message in messages])
        return apply(self, messages, add_generation_prompt)

    monkeypatch.setattr(Tokenizer, "apply_chat_template", spy)
    lines = "hello\nand now?\n/reset\n\n/unknown\nagain\n/exit\nnever asked\n"
    outcome = command("chat", *RANDOM, "--system", "be brief", "--max-tokens", "3", stdin=lines)
    assert outcome.status == 0
    first = ["system", "user"]
    assert asked == [first, [*first, "assistant", "user"], first]
    assert "the conversation starts anew" in outcome.errors
    assert "no command '/unknown': there are /reset and /exit" in outcome.errors


def test_ctrl_c_in_chat_cancels_only_the_answer(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from pagedattn.engine.engine import Engine
    from pagedattn.engine.step_result import StepResult

    step = Engine.step
    engines: list[Engine] = []

    def interrupted(self: Engine, **options: bool) -> StepResult:
        if not engines:
            engines.append(self)
            raise KeyboardInterrupt
        return step(self, **options)

    monkeypatch.setattr(Engine, "step", interrupted)
    outcome = command("chat", *RANDOM, "--max-tokens", "3", stdin="hello\nonce more\n")
    assert outcome.status == 0
    assert "[cancelled]" in outcome.err
    assert "[3 tokens in " in outcome.err or ", stop]" in outcome.err
    engines[0].check_integrity()
    assert engines[0].block_manager.num_used == 0


def test_interrupt_ends_with_130(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from pagedattn.engine.engine import Engine

    def interrupted(self: Engine, **options: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", interrupted)
    outcome = command("generate", *RANDOM, "hello")
    assert outcome.status == 130
    assert outcome.errors == ["pagedattn: interrupted"]


def test_sigint_ends_a_process_with_130_and_no_traceback() -> None:
    process = _start("generate", *RANDOM, "--ignore-eos", "--max-tokens", "4000", "hello")
    assert process.stderr is not None
    assert process.stdout is not None
    process.stdout.read(1)  # it generates
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_interrupt_in_a_finalizer_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python drops what a finalizer raises; the command ends all the same."""

    class Interrupts:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def command(_: object) -> int:
        del [Interrupts()][0]
        time.sleep(10)
        return 0

    monkeypatch.setattr("pagedattn.engine.commands.run_info", command)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "pagedattn: interrupted\n"


def test_reader_that_leaves_is_no_error() -> None:
    process = _start("generate", *RANDOM, "--ignore-eos", "--max-tokens", "4000", "hello")
    assert process.stderr is not None
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 141
    assert b"rror" not in errors


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pagedattn.engine.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
