"""``pagedattn simulate``: what it prints and writes, and what each bad input gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from pagedattn.engine import cli
from pagedattn.engine.simulation.traces import generate

ROOT = Path(__file__).resolve().parents[3]
SMALL = ("simulate", "--num-requests", "40", "--rate", "20", "--max-num-seqs", "4")
TRACE = "Timestamp,Request tokens,Response tokens\n0,20,5\n1,30,0\n2,40,7\n"


def test_policies_orders_and_loads_are_combined(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--policy", "default,static", "--order", "fcfs,sjf", "--load", "0.5,2", "--json"]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    names = ["default, fcfs", "default, sjf", "static, fcfs", "static, sjf"]
    assert [(run["name"], run["load"]) for run in document["runs"]] == [
        (name, load) for load in (0.5, 2.0) for name in names
    ]
    trace = generate("exp", 40, rate=20.0)
    assert document["trace"]["num_output_tokens"] == sum(one.num_output_tokens for one in trace)
    for run in document["runs"]:
        assert run["num_finished"] == 40
        assert run["num_output_tokens"] == document["trace"]["num_output_tokens"]
    assert document["machine"]["max_num_seqs"] == 4
    assert len(captured.err.splitlines()) == 8
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == document, "the same seed gives the same results"


def test_the_table_has_a_row_for_each_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SMALL, "--policy", "default,static", "--load", "1,3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("h100-8b: Analytic, not measured")
    assert [line.split("  ")[0] for line in lines[3:]] == [
        "default at 1",
        "static at 1",
        "default at 3",
        "static at 3",
    ]
    assert len({len(line) for line in lines[2:]}) == 1, "columns line up"


def test_pictures_and_results_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    arguments = [*SMALL, "--workload", "multi-tenant", "--policy", "default,static", "--load", "1,2"]
    assert cli.main([*arguments, "--output-dir", str(folder)]) == 0
    names = ("latency.png", "slots.png", "blocks.png", "service.png")
    assert sorted(path.name for path in folder.iterdir()) == sorted(("results.json", *names))
    for name in names:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert (folder / name).stat().st_size > 10_000
    with_pictures = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    capsys.readouterr()
    assert cli.main([*arguments, "--json"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert with_pictures == without, "drawing changes no result"


def test_one_load_has_no_latency_against_load(tmp_path: Path) -> None:
    assert cli.main([*SMALL, "--arrivals", "at-once", "--output-dir", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "blocks.png",
        "results.json",
        "service.png",
        "slots.png",
    ]


def test_a_trace_file_on_many_replicas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE, encoding="utf-8")
    arguments = ["simulate", "--trace", str(path), "--replicas", "64", "--router", "round-robin", "--json"]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert "burstgpt format, 2 requests, 1 without a prompt or an answer left out" in captured.err
    document = json.loads(captured.out)
    assert (document["trace"]["num_requests"], document["num_replicas"]) == (2, 64)
    assert document["runs"][0]["num_output_tokens"] == 12


def test_what_can_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SMALL, "--num-blocks", "70"]) == 0
    assert "requests rejected: they can never fit" in capsys.readouterr().out


# docs/errors.md has the same lines.
BAD_INPUTS: dict[str, tuple[Sequence[str], str]] = {
    "no such trace": (["--trace", "nowhere.csv"], "nowhere.csv: No such file or directory"),
    "no trace": (["--trace", "notes.txt"], "notes.txt is no trace: its first line is neither a JSON object (Mooncake)"),
    "a bad line": (["--trace", "bad.csv"], "bad.csv: line 3: 'many' is no number of tokens"),
    "unknown workload": (
        ["--workload", "chat"],
        "workload='chat' is not known: it must be one of low-variance, exp, heavy-tailed, shared-prefix,",
    ),
    "unknown arrivals": (
        ["--arrivals", "regular"],
        "arrivals='regular' is not known: it must be one of at-once, poisson, bursty, on-off",
    ),
    "no rate": (["--rate", "0"], "rate=0.0 is not allowed: it must be a finite number > 0"),
    "no requests": (["--num-requests", "0"], "num_requests=0 is not allowed: it must be >= 1"),
    "bad load": (["--load", "1,fast"], "--load 1,fast is not allowed: it must be numbers with commas between them"),
    "no load": (["--load", "0"], "--load 0 is not allowed: each must be a finite number > 0"),
    "unknown policy": (
        ["--policy", "vllm,dynamic"],
        "policy='dynamic' is not known: it must be one of default, static,",
    ),
    "unknown order": (["--order", "lifo"], "order='lifo' is not known: it must be one of fcfs,"),
    "unknown machine": (["--machine", "tpu"], "machine 'tpu' is not known: it must be a .json file or one of h100-8b,"),
    "no replicas": (["--replicas", "0"], "--replicas 0 is not allowed: it must be >= 1"),
    "unknown router": (
        ["--router", "random"],
        "router='random' is not known: it must be one of round-robin, least-loaded, prefix-affinity",
    ),
    "no service level": (["--ttft-slo", "0"], "ttft=0.0 is not allowed: it must be > 0"),
    "no batch": (["--max-num-seqs", "0"], "max_num_seqs=0 is not allowed: it must be an int >= 1"),
    "two limits": (
        ["--max-tokens", "5", "--exact-max-tokens"],
        "argument --exact-max-tokens: not allowed with argument --max-tokens",
    ),
    "output that is a file": (["--output-dir", "notes.txt"], "notes.txt: File exists"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_gives_one_line(
    arguments: Sequence[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("what somebody wrote\n")
    (tmp_path / "bad.csv").write_text(TRACE.replace("30", "many"))
    assert cli.main(["simulate", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pagedattn: error: {message}")


def test_the_page_of_errors_has_every_message() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    missing = [message for _, message in BAD_INPUTS.values() if message not in page]
    assert not missing


def test_drawing_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert cli.main([*SMALL, "--output-dir", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()  # before anything is simulated
    assert line.endswith("drawing needs matplotlib: pip install 'pagedattn[demo]'")
