"""The throughput benchmark and the decode step's, on a tiny model and a stand-in for vLLM."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decode_step, engine, throughput
from benchmarks.traces import digest, make_trace
from pagedattn.engine.llm import LLM
from pagedattn.engine.weights import RANDOM_MODELS, load_model

SMALL = "--device cpu --model random --num-requests 4 --output-scale 0.02 --rounds 1"

FAKE_VLLM = """
import json, pathlib, types
class SamplingParams:
    def __init__(self, **options):
        self.options = options
class LLM:
    def __init__(self, model, **options):
        assert json.loads((pathlib.Path(model) / "config.json").read_text())["hidden_size"] == 64
        assert options["load_format"] == "dummy" and options["max_num_seqs"] == 256
    def generate(self, prompts, params, use_tqdm):
        counts = [one.options["max_tokens"] - MISSING for one in params]
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[0] * n)]) for n in counts]
"""


def test_traces_are_those_of_the_published_figures() -> None:
    for vocab_size in (49_152, 128_256):
        assert digest(make_trace("uniform", 256, vocab_size)) == throughput.UNIFORM
        assert digest(make_trace("exp", 256, vocab_size)) == throughput.EXP
    traces = {"exp": make_trace("exp", 256, 49_152), "uniform": make_trace("uniform", 4, 49_152)}
    rates, source = throughput.rival_rates("8b", RANDOM_MODELS["random-8b"], traces, torch.device("cpu"))
    assert rates == {"exp": (5_370, 5_370)}  # of other requests nothing is known
    assert source == "published for an H100"


def test_every_trace_is_run_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "throughput.json"
    assert engine.main([*SMALL.split(), "--trace", "exp,uniform", "--json", str(path)]) == 0
    document = json.loads(path.read_text(encoding="utf-8"))
    assert [row["trace"] for row in document["rows"]] == ["exp", "uniform"]
    for row in document["rows"]:
        assert row["tokens_per_second"] == row["rounds"][0] > 0
        assert row["vllm"] is None
        lengths = [max(1, round(length * 0.02)) for _, length in make_trace(row["trace"], 4, 259)]
        assert row["num_output_tokens"] == sum(lengths)
    assert document["startup"][0]["ready_seconds"] >= 0
    assert "ready in" in capsys.readouterr().out


def test_unknown_models_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert engine.main(["--device", "cpu", "--trace", "exp", "--model", "70b"]) == 2
    assert "model '70b' is not allowed" in capsys.readouterr().err


def test_a_wrong_count_is_no_result() -> None:
    llm = LLM(load_model("random", device="cpu", max_model_len=16), max_num_seqs=2)
    with pytest.raises(throughput.WrongCountError, match="request 0 has 12 tokens, not 100"):
        throughput.generate(llm, [([1, 2, 3, 4], 100)])


def test_the_decode_phase_is_when_all_decode() -> None:
    """Kernels may overlap; steps with prompts do not count, nor those after a request has ended."""
    num_prompt_steps, num_tokens, num_steps = 3, 9, 4
    spans, now = [("load", -500.0, -1.0)], 0.0
    for number in range(num_prompt_steps - 1 + num_tokens):
        all_decode = num_prompt_steps <= number < num_tokens - 1
        spans += [("gemm", now, now + 30), ("attention", now + 20, now + (60 if all_decode else 70))]
        spans.append(("choose_tokens_kernel", now + 70, now + 80))
        now += 100 if all_decode else 1000
    phase = throughput.decode_phase(spans, num_tokens, num_steps)
    assert phase.step_ms == pytest.approx(0.1)
    assert phase.idle_share == pytest.approx(0.3)
    with pytest.raises(RuntimeError, match="11 steps for 9 tokens a request: not 6 in which all decode"):
        throughput.decode_phase(spans, num_tokens, 6)
    with pytest.raises(RuntimeError, match="1 steps for 9 tokens"):
        throughput.decode_phase(spans[:4], num_tokens, num_steps)


@pytest.mark.parametrize("missing", [0, 1])
def test_vllm_runs_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int) -> None:
    (tmp_path / "vllm.py").write_text(f"MISSING = {missing}\n{FAKE_VLLM}", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    traces = {"exp": make_trace("exp", 3, 259)}
    if missing:
        with pytest.raises(RuntimeError, match="another number of tokens"):
            throughput.measure_vllm(RANDOM_MODELS["random"], traces)
    else:
        assert throughput.measure_vllm(RANDOM_MODELS["random"], traces)["exp"] > 0


def test_decode_steps_are_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_step, "SECONDS", 0.01)
    assert decode_step.main(["--device", "cpu", "--model", "random", "--case", "3x20,1x17"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out.strip().rpartition("\n")[2])
    assert [(row["batch"], row["context"]) for row in document["rows"]] == [(3, 20), (1, 17)]
    assert all(row["milliseconds"] > 0 for row in document["rows"])


def test_bytes_of_a_step() -> None:
    """SmolLM2's shape: 134.5 million weights (its output projection is its embedding), 23040 bytes a cached token."""
    config = RANDOM_MODELS["random-135m"]
    alone = decode_step.step_bytes(config, torch.bfloat16, 1, 1)
    assert alone == pytest.approx(2 * 134.5e6, rel=0.002)
    assert decode_step.step_bytes(config, torch.bfloat16, 1, 1001) - alone == 1000 * 23040
