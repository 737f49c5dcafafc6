"""The ops as torch citizens: opcheck, fullgraph compilation, CUDA graphs, and errors that name the argument."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import pagedattn
from tests.device import DEVICE, DTYPES, IS_CUDA
from tests.kernels.cases import build_case
from tests.kernels.oracle import AttentionCase

ops = torch.ops.pagedattn


def make_case(
    query_lens: tuple[int, ...] = (1, 4, 0), seq_lens: tuple[int, ...] = (20, 300, 3), **options: Any
) -> AttentionCase:
    return build_case(
        generator=torch.Generator().manual_seed(0),
        dtype=DTYPES[0],
        num_heads=4,
        num_kv_heads=2,
        head_size=32,
        block_size=16,
        seq_lens=list(seq_lens),
        query_lens=list(query_lens),
        **options,
    ).to(DEVICE)


def make_plan(case: AttentionCase, **changes: Any) -> pagedattn.AttentionPlan:
    geometry: dict[str, Any] = {
        "num_heads": case.query.shape[1],
        "num_kv_heads": case.key_cache.shape[2],
        "head_size": case.query.shape[2],
        "block_size": case.key_cache.shape[1],
        "max_query_len": case.max_query_len,
        "max_seq_len": case.block_table.shape[1] * case.key_cache.shape[1],
    }
    return pagedattn.plan_attention(case.seq_lens, case.query_start_loc, **(geometry | changes))


def append_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 5, 2, 32, generator=generator).to(DEVICE, DTYPES[0]).unbind()
    caches = torch.zeros(2, 4, 16, 2, 32, device=DEVICE, dtype=DTYPES[0]).unbind()
    slots = torch.tensor([3, -1, 40, 17, 63], device=DEVICE)
    return {"key": key, "value": value, "key_cache": caches[0], "value_cache": caches[1], "slot_mapping": slots}


def rope_inputs() -> dict[str, Any]:
    inputs = append_inputs()
    query = torch.randn(5, 4, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPES[0])
    angles = torch.arange(10.0, device=DEVICE)[:, None] * torch.linspace(0.1, 1, 16, device=DEVICE)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.tensor([0, 1, 9, 3, 4], device=DEVICE)
    return {"query": query, "cos_sin": cos_sin, "positions": positions, **inputs}


# --- opcheck and compilation ------------------------------------------------------------------------------------------


def attention_arguments(case: AttentionCase, plan: pagedattn.AttentionPlan | None) -> tuple[Any, ...]:
    max_seq_len = case.block_table.shape[1] * case.key_cache.shape[1]
    tensors = None if plan is None else plan.tensors
    return (*case.arguments(), case.max_query_len, max_seq_len, 0.2, True, *[None] * 9, tensors, False)


def finite(case: AttentionCase) -> AttentionCase:
    """opcheck compares clones with ==, which NaN in unused slots fails."""
    case.key_cache, case.value_cache = case.key_cache.nan_to_num(0.0), case.value_cache.nan_to_num(0.0)
    return case


@pytest.mark.parametrize("planned", [False, True])
def test_opcheck_paged_attention(planned: bool) -> None:
    case = finite(make_case())
    plan = make_plan(case) if planned else None
    for return_lse in (False, True):
        torch.library.opcheck(ops.paged_attention.default, (*attention_arguments(case, plan), return_lse))
    out = torch.empty_like(case.query)
    lse = torch.empty(case.query.shape[:2], device=DEVICE)
    for given in (None, lse):
        torch.library.opcheck(ops.paged_attention.out, (*attention_arguments(case, plan), out, given))


def test_opcheck_plan() -> None:
    case = make_case()
    arguments = (4, 2, 32, 32, case.max_query_len, 320, None, False)
    # What lies past the counts is not written, so the buffers of two runs are not equal there.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        ops.plan_attention.default, (case.seq_lens, case.query_start_loc, *arguments), test_utils=checks
    )
    plan = pagedattn.plan_attention(
        case.seq_lens, case.query_start_loc, num_heads=4, num_kv_heads=2, head_size=32, block_size=16,
        max_query_len=case.max_query_len, max_seq_len=320,
    )  # fmt: skip
    for tensor in plan.tensors:
        tensor.zero_()
    torch.library.opcheck(ops.plan_attention.out, (case.seq_lens, case.query_start_loc, *plan.tensors, *arguments))


def test_opcheck_cache_ops() -> None:
    append, rope = append_inputs(), rope_inputs()
    torch.library.opcheck(ops.append_kv.default, (*append.values(), None, None))
    names = ("query", "key", "value", "cos_sin", "positions", "key_cache", "value_cache", "slot_mapping")
    torch.library.opcheck(ops.rope_append_kv.default, (*(rope[name] for name in names), False, None, None))
    mapping = torch.tensor([[0, 1], [1, 0]], device=DEVICE)
    caches = (append["key_cache"], append["value_cache"])
    torch.library.opcheck(ops.copy_blocks.default, (*caches, *(c.clone() for c in caches), mapping))
    case = finite(make_case())
    gather = (case.key_cache, case.value_cache, case.block_table, case.seq_lens, 320, None, None, torch.float32)
    torch.library.opcheck(ops.gather_kv.default, gather)
    parts = [torch.randn(3, 4, 8, device=DEVICE), torch.randn(3, 4, device=DEVICE)]
    torch.library.opcheck(ops.merge_attention_states.default, (*parts, *parts))


def attention_step(rope: dict[str, Any], case: AttentionCase, max_seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All that a layer does, through the public functions: rotate and append, plan, attend, merge with itself."""
    query = rope["query"].clone()
    pagedattn.rope_append_kv(
        query, rope["key"], rope["value"], rope["cos_sin"], rope["positions"],
        rope["key_cache"], rope["value_cache"], rope["slot_mapping"],
    )  # fmt: skip
    plan = pagedattn.plan_attention(
        case.seq_lens, case.query_start_loc, num_heads=4, num_kv_heads=2, head_size=32, block_size=16,
        max_query_len=case.max_query_len, max_seq_len=max_seq_len,
    )  # fmt: skip
    out, lse = pagedattn.paged_attention(
        *case.arguments(), max_query_len=case.max_query_len, plan=plan, return_lse=True
    )
    out, lse = pagedattn.merge_attention_states(out, lse, out, lse)
    return out + query, lse


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_fullgraph(dynamic: bool) -> None:
    compiled = torch.compile(
        attention_step, fullgraph=True, dynamic=dynamic, backend="inductor" if IS_CUDA else "aot_eager"
    )
    for seq_lens in ((20, 300, 3), (310, 17, 2)):
        case = make_case(seq_lens=seq_lens)
        max_seq_len = case.block_table.shape[1] * 16
        expected_inputs, inputs = rope_inputs(), rope_inputs()
        expected = attention_step(expected_inputs, case, max_seq_len)
        torch.testing.assert_close(compiled(inputs, case, max_seq_len), expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(inputs["key_cache"], expected_inputs["key_cache"])


@pytest.mark.gpu
@pytest.mark.skipif(not IS_CUDA, reason="CUDA graphs need a GPU")
def test_cuda_graph_replays_with_changed_lengths_and_tables() -> None:
    """Captured once; replayed on a batch of other lengths, other blocks and other contents."""
    first = make_case(query_lens=(1, 1, 1, 1), seq_lens=(5, 900, 30, 0), padding_rows=2)
    others = [
        make_case(query_lens=(1, 1, 1, 1), seq_lens=lens, padding_rows=2)
        for lens in ((900, 1, 0, 64), (17, 18, 800, 19))
    ]
    blocks = max(case.key_cache.shape[0] for case in (first, *others))
    key_cache, value_cache = torch.zeros(2, blocks, 16, 2, 32, dtype=first.query.dtype, device=DEVICE).unbind()
    static = [first.query.clone(), first.block_table.clone(), first.seq_lens.clone(), first.query_start_loc.clone()]
    geometry = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 32,
        "block_size": 16,
        "max_query_len": 1,
        "max_seq_len": 912,
    }
    plan = pagedattn.plan_attention(static[2], static[3], **geometry)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        pagedattn.plan_attention(static[2], static[3], out=plan, **geometry)
        return pagedattn.paged_attention(
            static[0], key_cache, value_cache, *static[1:], max_query_len=1, max_seq_len=912, plan=plan, return_lse=True
        )

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    for case in (first, *others):
        count = case.key_cache.shape[0]
        key_cache.fill_(torch.nan)[:count] = case.key_cache
        value_cache.fill_(torch.nan)[:count] = case.value_cache
        for target, source in zip(
            static, (case.query, case.block_table, case.seq_lens, case.query_start_loc), strict=True
        ):
            target.fill_(2**30 if target.dtype == torch.int32 else 0)
            target[tuple(slice(0, n) for n in source.shape)] = source
        out.fill_(torch.nan)
        graph.replay()
        expected = pagedattn.paged_attention(*case.arguments(), max_query_len=1, return_lse=True)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


@pytest.mark.gpu
@pytest.mark.skipif(not IS_CUDA, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("scales", ["tensor", "head"])
def test_cuda_graph_replays_with_changed_scales(scales: str) -> None:
    """Append and attention captured once; scales rewritten in place are what the next replay writes and reads with."""
    generator = torch.Generator().manual_seed(0)
    shape = () if scales == "tensor" else (2,)
    k_scale, v_scale = torch.full((2, *shape), 0.05, device=DEVICE).unbind()
    key_cache, value_cache = torch.zeros(2, 4, 16, 2, 32, dtype=torch.int8, device=DEVICE).unbind()
    query = torch.randn(3, 4, 32, generator=generator).to(DEVICE, torch.bfloat16)
    key, value = torch.randn(2, 3, 2, 32, generator=generator).to(DEVICE, torch.bfloat16).unbind()
    slots = torch.tensor([0, 16, 33], device=DEVICE)
    table = torch.tensor([[0], [1], [2]], dtype=torch.int32, device=DEVICE)
    lens, starts = (torch.tensor(t, dtype=torch.int32, device=DEVICE) for t in ([1, 1, 2], [0, 1, 2, 3]))
    geometry: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_size": 32, "block_size": 16}
    plan = pagedattn.plan_attention(lens, starts, max_query_len=1, max_seq_len=16, **geometry)

    def step() -> torch.Tensor:
        pagedattn.append_kv(key, value, key_cache, value_cache, slots, k_scale=k_scale, v_scale=v_scale)
        return pagedattn.paged_attention(
            query, key_cache, value_cache, table, lens, starts,
            max_query_len=1, plan=plan, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    results = []
    for factor in (1.0, 0.5, 3.0):
        k_scale.mul_(factor)
        v_scale.mul_(factor)
        graph.replay()
        results.append((out.clone(), key_cache.clone(), value_cache.clone()))
        expected = step()
        assert torch.equal(results[-1][0], expected)
        assert torch.equal(results[-1][1], key_cache)
        assert torch.equal(results[-1][2], value_cache)
    assert not torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[1][1], results[2][1])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs; test_launcher.py has the choice of device")
def test_runs_on_the_device_of_its_tensors() -> None:
    """Every op on a device that is not the current one, and an error where devices are mixed."""
    other = torch.device("cuda", 1)
    case = make_case().to(DEVICE)
    expected = pagedattn.paged_attention(*case.arguments(), max_query_len=case.max_query_len)
    inputs = rope_inputs()
    pagedattn.rope_append_kv(**inputs)
    with torch.cuda.device(0):
        moved = case.to(other)
        for _ in range(3):  # through the dispatcher, and again
            out = pagedattn.paged_attention(*moved.arguments(), max_query_len=case.max_query_len, plan=make_plan(moved))
            assert out.device == other
            torch.testing.assert_close(out.to(DEVICE), expected, rtol=2e-3, atol=2e-3)
            moved_inputs = {name: tensor.to(other) for name, tensor in rope_inputs().items()}
            pagedattn.rope_append_kv(**moved_inputs)
            assert torch.equal(moved_inputs["key_cache"].to(DEVICE), inputs["key_cache"])
        assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match=r"^block_table: .* must be on cuda:0"):
        call_attention(block_table=moved.block_table)


@pytest.mark.gpu
@pytest.mark.skipif(not IS_CUDA, reason="a cache of more than 2**31 elements needs a GPU's memory")
def test_cache_of_more_than_2_31_elements() -> None:
    block_elements = 16 * 2 * 32
    blocks = 2**31 // block_elements + 8
    cache = torch.empty(blocks, 16, 2, 32, dtype=torch.bfloat16, device=DEVICE)
    rows = torch.randn(16, 2, 32, device=DEVICE, dtype=torch.bfloat16)
    slots = torch.arange(16, device=DEVICE) + (blocks - 1) * 16
    pagedattn.append_kv(rows, rows, cache, cache, slots)
    assert torch.equal(cache[-1], rows)
    query = torch.randn(1, 4, 32, device=DEVICE, dtype=torch.bfloat16)
    lens, starts = (torch.tensor(t, dtype=torch.int32, device=DEVICE) for t in ([16], [0, 1]))
    table = torch.tensor([[blocks - 1]], dtype=torch.int32, device=DEVICE)
    far = pagedattn.paged_attention(query, cache, cache, table, lens, starts, max_query_len=1)
    near = pagedattn.paged_attention(
        query, cache[-1:], cache[-1:], torch.zeros_like(table), lens, starts, max_query_len=1
    )
    assert torch.equal(far, near)


# --- errors -----------------------------------------------------------------------------------------------------------


def call_attention(**changes: Any) -> None:
    case = make_case()
    names = ("query", "key_cache", "value_cache", "block_table", "seq_lens", "query_start_loc")
    arguments = dict(zip(names, case.arguments(), strict=True)) | {"max_query_len": case.max_query_len}
    pagedattn.paged_attention(**{k: (v(arguments) if callable(v) else v) for k, v in (arguments | changes).items()})


def call_append(**changes: Any) -> None:
    arguments = append_inputs()
    pagedattn.append_kv(**{k: (v(arguments) if callable(v) else v) for k, v in (arguments | changes).items()})


def call_rope(**changes: Any) -> None:
    arguments = rope_inputs()
    pagedattn.rope_append_kv(**{k: (v(arguments) if callable(v) else v) for k, v in (arguments | changes).items()})


def of(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda arguments: change(arguments[name])


BAD_CALLS = [
    (call_attention, {"query": of("query", lambda t: t[0])}, ValueError),
    (call_attention, {"query": of("query", lambda t: t.int())}, ValueError),
    (call_attention, {"query": of("query", lambda t: t[:, :3])}, ValueError),
    (call_attention, {"query": of("query", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2))}, ValueError),
    (call_attention, {"query": [1.0]}, TypeError),
    (call_attention, {"query": of("query", lambda t: t.clone().requires_grad_())}, ValueError),
    (call_attention, {"key_cache": None}, TypeError),
    (call_attention, {"key_cache": of("key_cache", lambda t: t.double())}, ValueError),
    (call_attention, {"key_cache": of("key_cache", lambda t: t[..., :16])}, ValueError),
    (call_attention, {"key_cache": of("key_cache", lambda t: t[:, :0])}, ValueError),
    (call_attention, {"value_cache": of("value_cache", lambda t: t[:-1])}, ValueError),
    (call_attention, {"value_cache": of("value_cache", lambda t: t[0])}, ValueError),
    (call_attention, {"block_table": of("block_table", lambda t: t.long())}, ValueError),
    (call_attention, {"block_table": of("block_table", lambda t: t[:1])}, ValueError),
    (call_attention, {"block_table": of("block_table", lambda t: t[0])}, ValueError),
    (call_attention, {"block_table": of("block_table", lambda t: t.T.contiguous().T)}, ValueError),
    (call_attention, {"seq_lens": of("seq_lens", lambda t: t.long())}, ValueError),
    (call_attention, {"seq_lens": of("seq_lens", lambda t: t[0])}, ValueError),
    (call_attention, {"seq_lens": [1, 2, 3]}, TypeError),
    (call_attention, {"query_start_loc": of("query_start_loc", lambda t: t[:-1])}, ValueError),
    (call_attention, {"max_query_len": 1.5}, TypeError),
    (call_attention, {"max_query_len": True}, TypeError),
    (call_attention, {"max_query_len": 0}, ValueError),
    (call_attention, {"max_seq_len": -1}, ValueError),
    (call_attention, {"max_seq_len": 10**6}, ValueError),
    (call_attention, {"scale": float("nan")}, ValueError),
    (call_attention, {"scale": "1"}, TypeError),
    (call_attention, {"softcap": 0.0}, ValueError),
    (call_attention, {"sliding_window": 0}, ValueError),
    (call_attention, {"sliding_window": 2.0}, TypeError),
    (call_attention, {"attention_chunk": -3}, ValueError),
    (call_attention, {"alibi_slopes": torch.ones(3, device=DEVICE)}, ValueError),
    (call_attention, {"sinks": torch.ones(4, device=DEVICE, dtype=torch.float64)}, ValueError),
    (call_attention, {"q_scale": torch.ones(3, device=DEVICE)}, ValueError),
    (call_attention, {"k_scale": torch.ones(5, device=DEVICE)}, ValueError),
    (call_attention, {"v_scale": 1.0}, TypeError),
    (call_attention, {"tree_mask": torch.ones(5, 4, device=DEVICE)}, ValueError),
    (call_attention, {"causal": 1}, TypeError),
    (call_attention, {"plan": 3}, TypeError),
    (call_attention, {"plan": lambda _: make_plan(make_case(), max_query_len=9)}, ValueError),
    (call_attention, {"out": of("query", lambda t: t[1:].clone())}, ValueError),
    (call_attention, {"out": of("query", lambda t: t.double())}, ValueError),
    (call_attention, {"out": of("query", lambda t: t.clone().requires_grad_())}, ValueError),
    (call_attention, {"q_scale": torch.ones((), device=DEVICE, requires_grad=True)}, ValueError),
    (call_attention, {"k_scale": torch.ones(2, device=DEVICE, requires_grad=True)}, ValueError),
    (call_attention, {"v_scale": torch.ones(2, device=DEVICE, requires_grad=True)}, ValueError),
    (call_attention, {"out": of("query", lambda t: t[:1, :1].expand(t.shape))}, ValueError),
    (call_attention, {"query": of("query", torch.Tensor.to_sparse)}, ValueError),
    (call_attention, {"sliding_window": 2**63}, ValueError),
    (call_attention, {"max_query_len": 2**70}, ValueError),
    (call_attention, {"scale": 10**400}, ValueError),
    (call_append, {"key_cache": of("key_cache", lambda t: t[:, :, :1].expand(t.shape))}, ValueError),
    (call_append, {"value_cache": of("value_cache", lambda t: t[:1].expand(t.shape))}, ValueError),
    (call_rope, {"query": of("query", lambda t: t[:1].expand(t.shape))}, ValueError),
    (call_append, {"key": of("key", lambda t: t[0])}, ValueError),
    (call_append, {"key": of("key", lambda t: t.clone().requires_grad_())}, ValueError),
    (call_append, {"value": of("value", lambda t: t[1:])}, ValueError),
    (call_append, {"value": of("value", lambda t: t[..., :16])}, ValueError),
    (call_append, {"key_cache": of("key_cache", lambda t: t.double())}, ValueError),
    (call_append, {"slot_mapping": of("slot_mapping", lambda t: t.int())}, ValueError),
    (call_append, {"slot_mapping": of("slot_mapping", lambda t: t[1:])}, ValueError),
    (call_append, {"k_scale": torch.ones((), device=DEVICE)}, ValueError),
    (call_rope, {"query": of("query", lambda t: t[..., :16])}, ValueError),
    (call_rope, {"cos_sin": of("cos_sin", lambda t: t.double())}, ValueError),
    (call_rope, {"cos_sin": of("cos_sin", lambda t: t.clone().requires_grad_())}, ValueError),
    (call_rope, {"cos_sin": of("cos_sin", lambda t: t[:, :15])}, ValueError),
    (call_rope, {"positions": of("positions", lambda t: t.int())}, ValueError),
    (call_rope, {"positions": None}, TypeError),
    (call_rope, {"rotary_dim": 16}, ValueError),
    (call_rope, {"interleaved": None}, TypeError),
]


@pytest.mark.parametrize(
    ("call", "changes", "error"), BAD_CALLS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else None
)
def test_bad_calls_name_the_argument(
    call: Callable[..., None], changes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=rf"^{re.escape(next(iter(changes)))}: "):
        call(**changes)


def test_the_calls_above_are_good_when_nothing_is_changed() -> None:
    call_attention()
    call_append()
    call_rope()


def test_bad_calls_of_the_other_ops() -> None:
    case = make_case()
    key, value = case.key_cache, case.value_cache
    with pytest.raises(ValueError, match=r"^num_heads: .* multiple of num_kv_heads"):
        make_plan(case, num_heads=3)
    with pytest.raises(ValueError, match=r"^head_size: got head size 12"):
        make_plan(case, head_size=12)
    with pytest.raises(ValueError, match=r"^head_size_v: got head size 576"):
        make_plan(case, head_size_v=576)
    with pytest.raises(TypeError, match=r"^batch_invariant: "):
        make_plan(case, batch_invariant=1)
    with pytest.raises(TypeError, match=r"^dtype: "):
        pagedattn.gather_kv(*case.arguments()[1:5], max_seq_len=320, dtype="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^block_mapping: "):
        pagedattn.copy_blocks(key, value, key, value, torch.zeros(2, 2, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ValueError, match=r"^block_size: "):
        make_plan(case, block_size=2**70)
    mapping = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"^dst_value: "):
        pagedattn.copy_blocks(key, value, key, value[:, :8], mapping)
    with pytest.raises(ValueError, match=r"^dst_key: .* do not share memory"):
        pagedattn.copy_blocks(key, value, key[:1].expand(key.shape), value, mapping)
    with pytest.raises(ValueError, match=r"^src_key: .* on meta; must be of memory"):
        pagedattn.copy_blocks(key.to("meta"), value.to("meta"), key, value, mapping)
    part = torch.zeros(2, 4, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"^lse_b: "):
        pagedattn.merge_attention_states(part, part[..., 0], part, part)


def test_value_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagedattn.ops, "CHECK_VALUES", True)
    call_attention()
    call_append()
    call_rope()
    with pytest.raises(ValueError, match=r"^block_table: "):
        call_attention(block_table=of("block_table", lambda t: t + 1000))
    with pytest.raises(ValueError, match=r"^seq_lens: "):
        call_attention(seq_lens=of("seq_lens", lambda t: t + 1000))
    with pytest.raises(ValueError, match=r"^query_start_loc: "):
        call_attention(query_start_loc=of("query_start_loc", lambda t: t * 2))
    with pytest.raises(ValueError, match=r"^slot_mapping: got \[17\]; must be without duplicates"):
        call_append(slot_mapping=torch.tensor([17, 17, 2, 3, 4], device=DEVICE))
    with pytest.raises(ValueError, match=r"^slot_mapping: "):
        call_append(slot_mapping=torch.tensor([64, 1, 2, 3, 4], device=DEVICE))
    with pytest.raises(ValueError, match=r"^positions: "):
        call_rope(positions=of("positions", lambda t: t + 10))
    case = make_case()
    caches, table, lens = (case.key_cache, case.value_cache), case.block_table, case.seq_lens
    pagedattn.gather_kv(*caches, table, lens, max_seq_len=300)
    with pytest.raises(ValueError, match=r"^block_table: "):
        pagedattn.gather_kv(*caches, table + 1000, lens, max_seq_len=300)
    with pytest.raises(ValueError, match=r"^seq_lens: "):
        pagedattn.gather_kv(*caches, table, lens, max_seq_len=299)
    with pytest.raises(ValueError, match=r"^seq_lens: "):
        pagedattn.gather_kv(*caches, table, lens - 4, max_seq_len=300)
    for mapping in ([[0, len(case.key_cache)]], [[0, 1], [2, 1]]):
        with pytest.raises(ValueError, match=r"^block_mapping: "):
            pagedattn.copy_blocks(*caches, *caches, torch.tensor(mapping, device=DEVICE))
    make_plan(case)
    with pytest.raises(ValueError, match=r"^seq_lens: "):
        make_plan(replace(case, seq_lens=case.seq_lens - 400))
    with pytest.raises(ValueError, match=r"^query_start_loc: .* rising"):
        make_plan(replace(case, query_start_loc=-case.query_start_loc))


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacfwd", "dual"])
def test_derivatives_are_refused(transform: str) -> None:
    """By torch.func too, whose tensors an op sees without their derivatives."""
    case, lse = make_case(), torch.zeros(5, 4, device=DEVICE)
    query, *rest = case.arguments()
    query = torch.ones_like(query)

    def attend(query: torch.Tensor) -> torch.Tensor:
        return pagedattn.paged_attention(query, *rest, max_query_len=case.max_query_len).square().sum()

    def merge(out_a: torch.Tensor) -> torch.Tensor:
        return pagedattn.merge_attention_states(out_a, lse[:, : out_a.shape[1]], query, lse)[0].sum()

    def differentiate(function: Callable[[torch.Tensor], torch.Tensor]) -> object:
        if transform in ("grad", "jacfwd"):
            return getattr(torch.func, transform)(function)(query)
        if transform == "vjp":
            return torch.func.vjp(function, query)
        if transform == "jvp":
            return torch.func.jvp(function, (query,), (query,))
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(query, query))

    attend(query)  # on a GPU it is remembered, and must not be found again
    refused = "has a tangent" if transform in ("jvp", "jacfwd", "dual") else "requires grad"
    for function, name in ((attend, "query"), (merge, "out_a")):
        with pytest.raises(ValueError, match=f"^{name}: {refused}"):
            differentiate(function)


def test_importing_is_light() -> None:
    """torch and the op definitions; no kernel, tokenizer, server or plot."""
    import subprocess
    import sys

    script = "import sys, torch; before = set(sys.modules); import pagedattn; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "pagedattn.ops" in loaded
    heavy = {"triton", "tokenizers", "transformers", "safetensors", "jinja2", "rich", "matplotlib", "gguf", "numpy"}
    assert not heavy & {name.split(".")[0] for name in loaded}
    assert not any(name.startswith("pagedattn.engine") for name in loaded)
