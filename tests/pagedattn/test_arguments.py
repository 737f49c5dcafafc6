"""10,000 drawn calls of the public functions: none that is valid raises, every other names the argument that is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import pagedattn
from pagedattn.kernels.quantization import LARGEST
from tests.device import INTERPRETED

pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="the checks are the same, and the interpreter takes minutes for them"
)

HALF = (torch.float32, torch.float16)
Bad = Callable[[Any], Any]
# What may be wrong with an argument of each kind.
NOT_A_TENSOR: tuple[Bad, ...] = (lambda _: None, lambda _: [1.0], lambda _: "x", lambda _: 3)
ROWS: tuple[Bad, ...] = (
    *NOT_A_TENSOR,
    lambda t: t[None],
    lambda t: t[0] if len(t) else t[None],
    lambda t: t.double(),
    lambda t: t.int(),
    lambda t: t.new_empty(*t.shape[:2], t.shape[2] * 2)[..., ::2],
    lambda t: t.clone().requires_grad_(),
)
CACHE: tuple[Bad, ...] = (
    *NOT_A_TENSOR,
    lambda t: t[None],
    lambda t: t[0],
    lambda t: t.to(torch.float64),
    lambda t: t[..., :-1],  # no multiple of 8, also of int4
    lambda t: t[:, :0],
    lambda t: t.new_empty(*t.shape[:3], t.shape[3] * 2)[..., ::2],
)
INDEX: tuple[Bad, ...] = (
    *NOT_A_TENSOR,
    lambda t: t[None],
    lambda t: t.to(torch.int16),
    lambda t: t.float(),
    lambda t: torch.cat((t, t[:1])),
)
SIZE: tuple[Bad, ...] = (lambda _: 1.5, lambda _: "4", lambda _: True, lambda _: -1)
POSITIVE: tuple[Bad, ...] = (*SIZE, lambda _: 0)
NUMBER: tuple[Bad, ...] = (lambda _: float("nan"), lambda _: float("inf"), lambda _: "1", lambda _: True)
FLAG: tuple[Bad, ...] = (lambda _: None, lambda _: 1, lambda _: "yes")
PER_HEAD: tuple[Bad, ...] = (
    lambda _: 1.0,
    lambda t: t.double(),
    lambda t: torch.cat((t, t[:1])),
    lambda t: t[None],
    lambda _: "x",
    lambda t: t.clone().requires_grad_(),
)
SCALE: tuple[Bad, ...] = (
    lambda _: 1.0,
    lambda t: t.double(),
    lambda t: t.new_ones(2, 2),
    lambda t: t.new_ones(99),
    lambda t: t.clone().requires_grad_(),
)

Call = tuple[Callable[..., Any], dict[str, Any], dict[str, tuple[Bad, ...]]]


def scale(draw: st.DrawFn, cache: Tensor) -> Tensor:
    shape = draw(st.sampled_from([(), (cache.shape[2],), tuple(cache.shape[:3])]))
    return torch.ones(shape)


@st.composite
def caches(
    draw: st.DrawFn, dtype: torch.dtype, heads: int, size: int, size_v: int, quantizes: bool = True
) -> tuple[Tensor, Tensor]:
    blocks, block_size = draw(st.integers(1, 6)), draw(st.sampled_from([1, 3, 16]))
    stored = draw(st.sampled_from([dtype, *LARGEST]))
    sizes = [n // 2 if stored == torch.uint8 else n for n in (size, size_v)]
    if draw(st.booleans()):
        key, value = (torch.zeros(blocks, heads, block_size, n).to(stored).transpose(1, 2) for n in sizes)
    else:
        key, value = (torch.zeros(blocks, block_size, heads, n).to(stored) for n in sizes)
    return key, value


@st.composite
def attention_calls(draw: st.DrawFn) -> Call:
    dtype, kv_heads = draw(st.sampled_from(HALF)), draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 4))
    size, size_v = draw(st.sampled_from([8, 16, 40, 64])), draw(st.sampled_from([8, 24, 64]))
    key_cache, value_cache = draw(caches(dtype, kv_heads, size, size_v))
    count, columns = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    reach = columns * key_cache.shape[1]
    seq_lens = [draw(st.integers(0, reach)) for _ in range(count)]
    query_lens = [draw(st.integers(0, 4)) for _ in range(count)]
    tokens, longest = sum(query_lens) + draw(st.integers(0, 2)), max([1, *query_lens])
    call: dict[str, Any] = {
        "query": torch.randn(tokens, heads, size).to(dtype),
        "key_cache": key_cache,
        "value_cache": value_cache,
        "block_table": torch.randint(0, len(key_cache), (count, columns), dtype=torch.int32),
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        "max_query_len": longest + draw(st.integers(0, 2)),
    }
    bad: dict[str, tuple[Bad, ...]] = {
        "query": ROWS,
        "key_cache": CACHE,
        "value_cache": CACHE,
        "seq_lens": INDEX[:-1],
        "block_table": (
            *INDEX[:-1],
            lambda t: t[0] if len(t) else t[None],
            lambda t: torch.cat((t, t.new_ones(1, columns))),
        ),
        "query_start_loc": INDEX,
        "max_query_len": (*SIZE, lambda _: None),
    }
    optional: dict[str, tuple[Any, tuple[Bad, ...]]] = {
        "max_seq_len": (reach, (*SIZE, lambda n: n + 1)),
        "scale": (0.3, NUMBER),
        "causal": (False, FLAG),
        "sliding_window": (3, POSITIVE),
        "attention_chunk": (5, POSITIVE),
        "softcap": (7.0, (*NUMBER, lambda _: 0.0, lambda _: -2.0)),
        "alibi_slopes": (torch.rand(heads), PER_HEAD),
        "sinks": (torch.rand(heads), PER_HEAD),
        "q_scale": (torch.ones(draw(st.sampled_from([(), (kv_heads,)]))), SCALE),
        "k_scale": (scale(draw, key_cache), SCALE),
        "v_scale": (scale(draw, key_cache), SCALE),
        "tree_mask": (
            torch.ones(tokens, call["max_query_len"], dtype=torch.bool),
            (lambda _: True, lambda t: t.float(), lambda t: t[:, :-1], lambda t: t[None]),
        ),
        "out": (
            torch.empty(tokens, heads, size_v, dtype=dtype),
            (lambda _: 1, lambda t: t.double(), lambda t: t[..., :-1], lambda t: t[None], ROWS[-1]),
        ),
        "return_lse": (True, FLAG),
        "plan": (None, (lambda _: 3, lambda _: "plan")),
    }
    for name, (value, wrong) in optional.items():
        if draw(st.booleans()):
            call[name], bad[name] = value, wrong
    if "out" in call:  # which does not fit another head size
        bad["value_cache"] = (*CACHE, lambda t: t.new_zeros(*t.shape[:3], t.shape[3] * 2))
    return pagedattn.paged_attention, call, bad


@st.composite
def append_calls(draw: st.DrawFn) -> Call:
    dtype, heads, tokens = draw(st.sampled_from(HALF)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
    size, size_v = draw(st.sampled_from([8, 16, 40])), draw(st.sampled_from([8, 24]))
    rotates = draw(st.booleans())
    key_cache, value_cache = draw(caches(dtype, heads, size, size_v))
    slots = key_cache.shape[0] * key_cache.shape[1]
    call: dict[str, Any] = {
        "key": torch.randn(tokens, heads, size).to(dtype),
        "value": torch.randn(tokens, heads, size_v).to(dtype),
        "key_cache": key_cache,
        "value_cache": value_cache,
        "slot_mapping": torch.randperm(slots + 3)[:tokens].where(torch.arange(tokens) < slots, -1).clamp_max(slots - 1)
        if tokens <= 1
        else torch.full((tokens,), -1),
    }
    bad = {
        "key": ROWS,
        "value": ROWS,
        "key_cache": CACHE,
        "value_cache": CACHE,
        "slot_mapping": (*INDEX[:-1], lambda t: t.new_zeros(9)),
    }
    if key_cache.dtype in LARGEST:
        call |= {"k_scale": scale(draw, key_cache), "v_scale": scale(draw, key_cache)}
        bad |= {"k_scale": (*SCALE, lambda _: None), "v_scale": (*SCALE, lambda _: None)}
    if not rotates:
        return pagedattn.append_kv, call, bad
    rotary_dim = draw(st.sampled_from([2, 6, 8]))
    call |= {
        "query": torch.randn(tokens, heads * 2, size).to(dtype),
        "cos_sin": torch.rand(5, rotary_dim),
        "positions": torch.randint(0, 5, (tokens,)),
        "interleaved": draw(st.booleans()),
    }
    bad |= {
        "query": ROWS,
        "interleaved": FLAG,
        "positions": (*INDEX[:-1], lambda t: t.new_zeros(9)),
        "cos_sin": (*NOT_A_TENSOR, lambda t: t.double(), lambda t: t[:, :-1], lambda t: t[None], ROWS[-1]),
    }
    if draw(st.booleans()):
        call["rotary_dim"], bad["rotary_dim"] = rotary_dim, (*POSITIVE, lambda n: n + 2)
    return pagedattn.rope_append_kv, call, bad


@st.composite
def other_calls(draw: st.DrawFn) -> Call:
    which = draw(st.sampled_from(["plan", "gather", "copy", "merge"]))
    if which == "plan":
        count, kv_heads = draw(st.integers(0, 3)), draw(st.integers(1, 3))
        lengths = torch.tensor([draw(st.integers(0, 900)) for _ in range(count)], dtype=torch.int32)
        call: dict[str, Any] = {
            "seq_lens": lengths,
            "query_start_loc": torch.arange(count + 1, dtype=torch.int32),
            "num_heads": kv_heads * draw(st.integers(1, 5)),
            "num_kv_heads": kv_heads,
            "head_size": draw(st.sampled_from([8, 128, 256, 512, 576])),
            "block_size": draw(st.integers(1, 600)),
            "max_query_len": draw(st.integers(1, 4)),
            "max_seq_len": 900,
        }
        call["head_size_v"] = min(512, call["head_size"])
        bad = {
            "seq_lens": INDEX[:-1],
            "query_start_loc": INDEX,
            "num_heads": (*POSITIVE, lambda n: n * kv_heads + 1 if kv_heads > 1 else 0),
            "num_kv_heads": POSITIVE,
            "head_size": (*POSITIVE, lambda n: n + 4, lambda _: 264),
            "head_size_v": (*POSITIVE, lambda _: 576),
            "block_size": POSITIVE,
            "max_query_len": SIZE,
            "max_seq_len": SIZE,
        }
        for name, value, wrong in (
            ("sliding_window", 7, POSITIVE),
            ("batch_invariant", True, FLAG),
            ("out", None, (lambda _: 3,)),
        ):
            if draw(st.booleans()):
                call[name], bad[name] = value, wrong
        return pagedattn.plan_attention, call, bad
    if which == "gather":
        key_cache, value_cache = draw(caches(torch.float32, draw(st.integers(1, 3)), 16, 8))
        count = draw(st.integers(0, 3))
        call = {
            "key_cache": key_cache,
            "value_cache": value_cache,
            "block_table": torch.zeros(count, 2, dtype=torch.int32),
            "seq_lens": torch.ones(count, dtype=torch.int32),
            "max_seq_len": draw(st.integers(0, 5)),
        }
        bad = {
            "key_cache": CACHE[:-3],
            "value_cache": (*NOT_A_TENSOR, lambda t: t[None], lambda t: t[:, :0]),
            "seq_lens": INDEX[:-1],
            "block_table": (*INDEX[:-1], lambda t: torch.cat((t, t.new_ones(1, 2)))),
            "max_seq_len": SIZE,
        }
        if draw(st.booleans()):
            call["dtype"], bad["dtype"] = torch.float16, (lambda _: "half", lambda _: torch.int8)
        return pagedattn.gather_kv, call, bad
    if which == "copy":
        blocks = draw(st.integers(1, 4))
        call = {name: torch.zeros(blocks, 4, 2, 8) for name in ("src_key", "src_value", "dst_key", "dst_value")}
        call["block_mapping"] = torch.arange(blocks)[:, None].expand(-1, 2)
        wrong = (*NOT_A_TENSOR, lambda t: t[:, :3], lambda t: t.half())
        bad = {"src_key": NOT_A_TENSOR, "src_value": NOT_A_TENSOR, "dst_key": wrong, "dst_value": wrong}
        bad["block_mapping"] = (*NOT_A_TENSOR, lambda t: t.int(), lambda t: t[0], lambda t: t[:, :1])
        return pagedattn.copy_blocks, call, bad
    rows, dtype = draw(st.integers(0, 3)), draw(st.sampled_from(HALF))
    out, lse = torch.randn(rows, 2, 8).to(dtype), torch.randn(rows, 2)
    call = {"out_a": out, "lse_a": lse, "out_b": out.clone(), "lse_b": lse.clone()}
    wrong_lse: tuple[Bad, ...] = (*NOT_A_TENSOR, lambda t: t.double(), lambda t: t[:, :1], lambda t: t[None])
    bad = {"out_a": (*NOT_A_TENSOR, lambda t: t.double(), lambda t: t[None]), "lse_a": wrong_lse, "lse_b": wrong_lse}
    bad["out_b"] = (*NOT_A_TENSOR, lambda t: t.double(), lambda t: t[None], lambda t: t[..., :4])
    return pagedattn.merge_attention_states, call, bad


@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=st.one_of(attention_calls(), append_calls(), other_calls()), data=st.data())
@torch.no_grad()
def test_arguments(call: Call, data: st.DataObject) -> None:
    function, arguments, bad = call
    if data.draw(st.booleans(), label="valid"):
        function(**arguments)
        return
    name = data.draw(st.sampled_from(sorted(bad)), label="argument")
    wrong = data.draw(st.sampled_from(bad[name]), label="what is wrong")
    with torch.enable_grad(), pytest.raises((ValueError, TypeError)) as raised:
        function(**{**arguments, name: wrong(arguments[name])})
    # Of two that do not fit together either may be the one to blame; the message then names both.
    assert re.match(r"\w+: ", str(raised.value)), str(raised.value)
    assert re.search(rf"\b{name}\b", str(raised.value)), str(raised.value)
