"""The engine benchmark and the report made from it, on the random model: what it counts and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import engine, kv_memory, report
from benchmarks.systems import Paged, Run, as_transformers
from benchmarks.traces import Trace, digest, make_trace
from pagedattn.engine.weights import LoadedModel, load_model

SMALL = "--device cpu --model random --num-requests 5 --output-scale 0.06 --max-num-seqs 3 --batch-sizes 2 --rounds 2"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("random", device="cpu")


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("benchmark") / "engine.json"
    assert engine.main([*SMALL.split(), "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def trace_of(loaded: LoadedModel) -> Trace:
    return engine.shortened(make_trace("exp", 4, loaded.config.vocab_size), 0.06)


def test_traces_are_the_published_ones() -> None:
    trace = make_trace("exp", 32, 49_152)
    assert digest(trace) == "549c3e895038a39f"
    assert make_trace("exp", 8, 49_152) == trace[:8]
    assert digest(make_trace("uniform", 32, 49_152)) != digest(trace)
    with pytest.raises(ValueError, match="'gaussian'"):
        make_trace("gaussian", 1, 100)


def test_every_system_is_measured_in_every_round(document: dict[str, Any]) -> None:
    names = [row["system"] for row in document["systems"]]
    assert names[0] == "pagedattn, default policy"
    assert names[-1] == "transformers continuous batching"
    assert {name.split(",")[0] for name in names} == {"pagedattn", "transformers generate", names[-1]}
    sizes = {(row["system"], row["batch_size"]) for row in document["systems"]}
    for name in set(names):
        assert (name, 3) in sizes, f"{name} was not measured with our batch size"
    for row in document["systems"]:
        assert "failure" not in row, row
        assert len(row["rounds"]) == document["num_rounds"] == 2
        assert row["num_same_tokens"] == document["trace"]["num_requests"] == 5
        for one_round in row["rounds"]:
            assert max(one_round["latencies"]) <= one_round["seconds"]


def test_rates_follow_from_the_rounds(document: dict[str, Any]) -> None:
    num_tokens = document["trace"]["num_output_tokens"]
    ours = document["systems"][0]
    assert ours["ratio"] == 1.0
    for row in document["systems"]:
        rates = [num_tokens / one_round["seconds"] for one_round in row["rounds"]]
        assert row["tokens_per_second"]["min"] == pytest.approx(min(rates))
        assert row["tokens_per_second"]["median"] == pytest.approx(sum(rates) / 2)
        assert row["ratio"] == pytest.approx(ours["tokens_per_second"]["median"] / row["tokens_per_second"]["median"])


def test_utilization(document: dict[str, Any]) -> None:
    """A padded batch's shares follow from its lengths alone."""
    trace = engine.shortened(make_trace("exp", 5, 259), 0.06)
    row = next(r for r in document["systems"] if "arrival" in r["system"] and r["batch_size"] == 3)
    lengths = [length for _, length in trace]
    assert row["slot_utilization"] == pytest.approx(sum(lengths) / (3 * max(lengths[:3]) + 2 * max(lengths[3:])))
    for row in document["systems"]:
        for share in (row["slot_utilization"], row["kv_utilization"]):
            assert share is None or 0 < share <= 1


def test_last_line_is_json(capsys: pytest.CaptureFixture[str], loaded: LoadedModel) -> None:
    assert engine.main([*SMALL.split(), "--rounds", "1"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["benchmark"] == "engine"
    assert last["systems"][0]["tokens_per_second"]["median"] > 0


def test_different_tokens_are_refused(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    run_as_it_is = Paged.run

    def with_a_wrong_token(self: Paged, trace: Trace) -> Run:
        run = run_as_it_is(self, trace)
        tokens = [list(some) for some in run.tokens]
        if "static" in self.name:
            tokens[0][0] = (tokens[0][0] + 1) % 256
        return replace(run, tokens=tokens)

    monkeypatch.setattr(Paged, "run", with_a_wrong_token)
    assert engine.main([*SMALL.split(), "--rounds", "1"]) == 1


def test_ties_are_told_from_differences(loaded: LoadedModel) -> None:
    trace = trace_of(loaded)
    system = Paged(loaded, "default", 4, trace)
    run = system.run(trace)
    other = [list(some) for some in run.tokens]
    other[1][-1] = (other[1][-1] + 1) % 256
    pair = (other[1][-1], run.tokens[1][-1])

    def logits(gap: float) -> torch.Tensor:
        values = torch.zeros(259)
        values[pair[1]], values[pair[0]] = 5.0, 5.0 - gap
        return values

    runs: dict[Any, list[Run]] = {system: [run, replace(run, tokens=other)]}
    asked = []

    def logits_after(token_ids: list[int]) -> torch.Tensor:
        asked.append(token_ids)
        return logits(1e-5)

    results, ties = engine.compare_tokens(trace, runs, run.tokens, logits_after)
    assert results[0].num_same == 3
    assert [(tie.request, tie.position) for tie in ties] == [(1, trace[1][1] - 1)]
    assert ties[0].logit_gap == pytest.approx(1e-5, rel=0.1)
    assert asked == [trace[1][0] + run.tokens[1][:-1]]
    with pytest.raises(engine.DifferentTokensError, match="no tie"):
        engine.compare_tokens(trace, runs, run.tokens, lambda _: logits(0.1))
    short = [some[:-1] for some in run.tokens]
    with pytest.raises(engine.DifferentTokensError, match="request 0 has"):
        engine.compare_tokens(trace, {system: [replace(run, tokens=short)]}, run.tokens, lambda _: logits(0.0))


def test_a_failing_baseline_is_a_dash_with_its_reason(document: dict[str, Any]) -> None:
    class Broken:
        name, batch_size = "transformers continuous batching", 3

        def run(self, trace: Trace) -> Run:
            raise RuntimeError("no such thing here\nsecond line")

    broken = Broken()
    runs, failures = engine.measure([broken], [([1], 1)], 2, lambda _: None)
    assert runs == {}
    assert failures == {broken: "RuntimeError: no such thing here"}
    failed = {"system": broken.name, "batch_size": 3, "failure": failures[broken]}
    cells = engine.table({**document, "systems": [failed]})[1][0]
    assert cells == [broken.name, "3", *"------", "RuntimeError: no such thing here"]


def test_weights_are_shared(loaded: LoadedModel) -> None:
    model = as_transformers(loaded)
    ours = loaded.decoder.weight_slots()["layers.1.key"]
    assert model.model.layers[1].self_attn.k_proj.weight.data_ptr() == ours.data_ptr()
    assert not any(parameter.is_meta for parameter in (*model.parameters(), *model.buffers()))


def test_bad_arguments_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert engine.main(["--device", "cpu", "--model", "no-such-model"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_memory_benchmark_counts_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "memory.json"
    small = "--device cpu --model random --num-questions 4 --max-tokens 6 --rounds 1 --system-tokens 80"
    assert kv_memory.main([*small.split(), "--json", str(path)]) == 0
    document = json.loads(path.read_text(encoding="utf-8"))
    off, on = document["sharing"]
    assert (off["hit_share"], off["num_computed_tokens"] > on["num_computed_tokens"]) == (0.0, True)
    assert on["hit_share"] > 0.3
    recompute, swap, cheapest = document["preempting"]
    assert recompute["num_preemptions"] > recompute["num_swaps"] == 0
    assert swap["num_preemptions"] == swap["num_swaps"] > 0
    assert swap["num_computed_tokens"] < recompute["num_computed_tokens"]
    assert cheapest["num_preemptions"] > 0
    assert "Crossover: " in capsys.readouterr().out
    assert report.kv_memory_block(document).count("\n|") == 4 + 2 + len(document["preemption_costs"]["lengths"]) + 5


def test_memory_benchmark_refuses_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    run = kv_memory.run
    calls: list[int] = []

    def with_a_wrong_token(*arguments: Any) -> Any:
        tokens, figures = run(*arguments)
        calls.append(len(calls))
        if len(calls) == 4:
            tokens[0][-1] += 1
        return tokens, figures

    monkeypatch.setattr(kv_memory, "run", with_a_wrong_token)
    small = "--device cpu --model random --num-questions 2 --max-tokens 4 --rounds 1 --system-tokens 20"
    assert kv_memory.main(small.split()) == 1


def test_readme_is_what_the_results_give() -> None:
    assert report.main(["--check"]) == 0
