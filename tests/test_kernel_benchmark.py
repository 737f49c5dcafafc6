"""The kernel benchmark on a CPU: what it counts, what it checks, what it refuses, and the report made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pagedattn
from benchmarks import kernels, peers, report, roofline
from benchmarks.attention_systems import OURS, Prepared
from benchmarks.device_timing import Ceilings, launches_per_graph
from benchmarks.kernel_summary import ratio, summarize
from benchmarks.shapes import Shape, load_shapes
from benchmarks.workload import Arena, AttentionInputs, WrongResultError, choose_layout
from tests.kernels import oracle

CPU = torch.device("cpu")
ENTRY: dict[str, Any] = {"kind": "decode", "hq": 4, "hkv": 2, "d": 32, "page": 16}
SHAPES: dict[str, Any] = {
    "shapes": [
        {**ENTRY, "name": "plain", "b": 3, "kv": 70},
        {**ENTRY, "name": "page-1", "b": 3, "kv": 70, "page": 1},
        {**ENTRY, "name": "ragged", "kvs": [1, 120, 17]},
        {**ENTRY, "name": "windowed", "b": 2, "kv": 90, "window": 29},
        {**ENTRY, "name": "fp8", "b": 3, "kv": 70, "kv_dtype": "fp8"},
        {**ENTRY, "name": "int4", "b": 3, "kv": 70, "kv_dtype": "int4", "scales": "token"},
        {**ENTRY, "name": "fp8-query", "b": 2, "kv": 40, "kv_dtype": "fp8", "q_dtype": "fp8", "scales": "head"},
        {**ENTRY, "name": "capped", "kind": "prefill", "b": 2, "q": 21, "kv": 50, "softcap": 20.0},
        {**ENTRY, "name": "whole", "kind": "prefill", "b": 2, "q": 40, "kv": 40},
        {**ENTRY, "name": "mixed", "kind": "prefill", "qs": [1, 1, 20], "kvs": [50, 3, 20]},
    ],
    "sinks": ["windowed"],
    "mla": [{"name": "latent", "b": 2, "kv": 20, "h": 4, "ckv": 512, "kpe": 64, "page": 64}],
    "append": [{"name": "append", "tokens": [1, 20, 1], "hkv": 2, "d": 32, "page": 16}],
}


@pytest.fixture(scope="module")
def shapes_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes") / "small.json"
    path.write_text(json.dumps(SHAPES), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def document(shapes_file: Path) -> dict[str, Any]:
    out = shapes_file.with_name("out.json")
    assert run(shapes_file, "--json", str(out)) == 0
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def run(shapes_file: Path, *arguments: str) -> int:
    return kernels.main(["--shapes", str(shapes_file), "--device", "cpu", "--seconds", "0", *arguments])


def shape_of(shapes_file: Path, name: str) -> Shape:
    return next(shape for shape in load_shapes([shapes_file]) if shape.name == name)


def test_canonical_grid() -> None:
    shapes = load_shapes(kernels.DEFAULT_SHAPES[:1])
    kinds = [shape.kind for shape in shapes]
    assert [kinds.count(kind) for kind in ("decode", "prefill", "latent", "append", "rope_append")] == [24, 9, 2, 3, 3]
    found = {(shape.name, shape.kind, shape.label): shape for shape in shapes}
    large = found["llama3-8b", "decode", "64 x 4k"]
    assert large.bytes == 64 * 4096 * 8 * 128 * 2 * 2 + 2 * 64 * 32 * 128 * 2
    assert found["mistral-7b-swa", "decode", "32 x 32k"].sliding_window == 4096
    assert {shape.name for shape in shapes if shape.sinks} == {"gptoss-120b-swa", "gptoss-120b-full"}
    long = found["chunk2k@32k", "prefill", "1 x 32k, 2k new each"]
    assert long.flops == 4 * 32 * 128 * sum(range(30721, 32769))
    assert found["mistral-7b-swa", "prefill", "1 x 16k"].visible_pairs == 4096 * 4097 // 2 + (16384 - 4096) * 4096


def test_shapes_of_both_files_are_told_apart() -> None:
    shapes = load_shapes(kernels.DEFAULT_SHAPES)
    assert len({shape.key for shape in shapes}) == len(shapes)
    assert len(kernels.choose_shapes(kernels.DEFAULT_SHAPES, "64 x 4k.*page 16$")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": None, "q": 9, "kv": 8}, "q: got more"),
        ({"hq": 5}, "hq: got 5"),
        ({"kv_dtype": "fp4"}, "kv_dtype: got 'fp4'"),
        ({"scales": "head"}, "scales: got 'head'"),
        ({"heads": 1}, "heads: not a field"),
        ({"kind": "train"}, "kind: got 'train'"),
    ],
)
def test_bad_shapes_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"shapes": [{**ENTRY, "name": "x", "b": 1, "kv": 8, **change}]}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_shapes([path])


def test_copies_share_no_visible_block(shapes_file: Path) -> None:
    for name in ("ragged", "windowed"):
        shape = shape_of(shapes_file, name)
        arena = Arena([shape], CPU, cold_bytes=200_000)
        inputs = AttentionInputs(shape, arena)
        assert (inputs.copies - 1) * shape.bytes >= 200_000
        seen: list[int] = []
        for table in inputs.block_tables.tolist():
            for sequence, row in enumerate(table):
                first = shape.first_key(sequence) // shape.block_size
                seen += row[first : -(-shape.seq_lens[sequence] // shape.block_size)]
        assert sorted(seen) == list(range(choose_layout(shape, 200_000).num_blocks))


@pytest.mark.parametrize("name", ["ragged", "windowed", "int4", "fp8-query", "capped", "mixed"])
def test_the_check_agrees_with_the_oracle(shapes_file: Path, name: str) -> None:
    """Two fp64 computations that share no code; and what is off by more than the tolerance is refused."""
    shape = shape_of(shapes_file, name)
    inputs = AttentionInputs(shape, Arena([shape], CPU))
    options: dict[str, Any] = {"scale": shape.scale, "sliding_window": shape.sliding_window, "softcap": shape.softcap}
    options |= {"sinks": inputs.sinks, "q_scale": inputs.q_scale, "k_scale": inputs.k_scale, "v_scale": inputs.v_scale}
    case = oracle.AttentionCase(
        inputs.queries[1], inputs.key_cache, inputs.value_cache, inputs.block_tables[1], inputs.seq_lens,
        inputs.query_start_loc, shape.max_query_len, options,
    )  # fmt: skip
    exact, _ = oracle.attention(case)
    assert inputs.check(1, exact, 1e-6) < 1e-6
    with pytest.raises(WrongResultError, match="off"):
        inputs.check(1, exact * 1.02, 0.01)
    exact[-1, -1, -1] = float("nan")
    with pytest.raises(WrongResultError, match="not written"):
        inputs.check(1, exact, 0.01)


def test_every_shape_is_measured(document: dict[str, Any]) -> None:
    assert [row["name"] for row in document["rows"]] == [
        *(entry["name"] for entry in SHAPES["shapes"]), "latent", "append", "append",
    ]  # fmt: skip
    for row in document["rows"]:
        for name, found in row["systems"].items():
            assert ("us" in found) != ("reason" in found), (row["key"], name, found)
        assert row["systems"][OURS]["us"] > 0
        assert row["files"] == ["small"]
    times = {row["name"]: ratio(row) for row in document["rows"] if ratio(row) is not None}
    assert set(times) == {"plain", "page-1", "whole", "latent"}  # what torch's own attention can do
    assert set(document["missing"]) == set(peers.PEERS) - {"torch SDPA"}


def test_a_wrong_result_is_not_reported(shapes_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = pagedattn.paged_attention

    def wrong(*args: Tensor, out: Tensor, **options: Any) -> None:
        right(*args, out=out, **options)
        out[0] += 1

    monkeypatch.setattr(pagedattn, "paged_attention", wrong)
    out = shapes_file.with_name("wrong.json")
    assert run(shapes_file, "--only", "plain", "--peers", "torch SDPA", "--json", str(out)) == 1
    row = json.loads(out.read_text(encoding="utf-8"))["rows"][0]
    assert "us" not in row["systems"][OURS]
    assert row["systems"][OURS]["wrong"]
    assert row["systems"]["torch SDPA"]["us"] > 0


def test_a_wrong_append_is_not_reported(shapes_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagedattn, "append_kv", lambda *args: None)
    assert run(shapes_file, "--only", r"\| append", "--peers", "none") == 1


def test_a_raising_peer_is_a_dash_with_its_reason(shapes_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        name, version = "broken", "1"

        def prepare(self, inputs: AttentionInputs) -> Prepared:
            raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setitem(peers.PEERS, "broken", Broken)
    out = shapes_file.with_name("broken.json")
    assert run(shapes_file, "--only", "plain", "--peers", "broken", "--json", str(out)) == 0
    found = json.loads(out.read_text(encoding="utf-8"))["rows"][0]["systems"]
    assert found["broken"] == {"reason": "RuntimeError: no such kernel", "failed": True}
    assert found[OURS]["us"] > 0


def test_last_line_is_json(shapes_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shapes_file, "--only", "plain", "--peers", "none") == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["benchmark"] == "kernels"
    assert last["summary"]["against_peers"]["small decode"]["shapes"] == 1


def test_bad_arguments_end_in_one_line(shapes_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shapes_file, "--peers", "nobody") == 2
    assert run(shapes_file, "--only", "nothing like this") == 2
    assert run(kernels.DEFAULT_SHAPES[0], "--only", "llama2") == 2  # gigabytes, on a CPU
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_launches_are_whole_rounds_over_the_copies() -> None:
    assert launches_per_graph(8e-6, 48) == 96
    assert launches_per_graph(350e-6, 2) == 6
    assert launches_per_graph(10e-3, 2) == 2
    assert launches_per_graph(1e-9, 100) == 100


def test_the_limit_is_the_larger_of_the_two_times() -> None:
    ceilings = Ceilings(read_bytes=3e12, copy_bytes=2e12, matmul_flops=8e14)
    assert ceilings.limit(3e9, 8e9) == pytest.approx(1e-3)
    assert ceilings.limit(3e6, 8e11) == pytest.approx(1e-3)
    assert ceilings.limit(2e9, 0, is_copy=True) == pytest.approx(1e-3)


def test_summary_compares_shapes_that_differ_in_one_thing() -> None:
    def row(name: str, us: float, theirs: float | None = None, **fields: Any) -> dict[str, Any]:
        systems: dict[str, Any] = {OURS: {"us": us}, "pagedattn batch-invariant": {"us": us * 1.02}}
        if theirs is not None:
            systems["peer"] = {"us": theirs}
        plain = {"kind": "decode", "heads": "32/8 d128", "query_lens": [1] * 4, "seq_lens": [100] * 4, "bytes": 2e8}
        plain |= {"sliding_window": None, "softcap": None, "sinks": False, "block_size": 16, "cache_dtype": "bf16"}
        return {**plain, "key": name, "files": ["grid"], "limit_us": 80.0, "systems": systems, **fields}

    summary = summarize([
        row("plain", 100.0, 120.0),
        row("small pages", 102.0, 100.0, block_size=1),
        row("fp8", 50.0, cache_dtype="fp8", limit_us=40.0, bytes=1e8),
        row("ragged", 105.0, seq_lens=[397, 1, 1, 1]),
    ])  # fmt: skip
    against = summary["against_peers"]["grid decode"]
    assert against["worst"] == "small pages"
    assert against["worst_ratio"] == pytest.approx(100 / 102)
    assert against["ratio"] == against["ratio to peer"] == pytest.approx((120 / 100 * 100 / 102) ** 0.5)
    assert summary["of_bandwidth"]["128-512 MB"] == pytest.approx(80 / 105)
    assert summary["of_bandwidth"][">= 512 MB"] is None
    assert summary["batch_invariant_cost"] == pytest.approx(1.02)
    assert summary["quantized_speedup"] == {"fp8": pytest.approx(2.0)}
    assert summary["page_size_spread"] == pytest.approx(0.02)
    assert summary["ragged_over_uniform"] == {"ragged": pytest.approx(1.05)}


def test_report_and_picture(document: dict[str, Any], shapes_file: Path) -> None:
    tables = report.kernels_block(document)
    for row in document["rows"]:
        assert f"| {row['name']}, {row['heads']}" in tables
    lines = [line for line in report.kernels_summary_block(document).splitlines() if line.startswith("| small")]
    assert [line.split(" | ")[0] for line in lines] == ["| small decode", "| small latent", "| small prefill"]
    picture = shapes_file.with_name("roofline.png")
    roofline.main([str(shapes_file.with_name("out.json")), str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
