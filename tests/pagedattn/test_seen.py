"""Calls made again without checks: found only by what the checks and the launch would see the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pagedattn
from pagedattn.seen import CALLS_PER_KEY, SeenCalls
from tests.device import INTERPRETED, IS_CUDA
from tests.pagedattn.test_ops import append_inputs, make_case, make_plan, rope_inputs


class Labelled(Tensor):
    """A subclass that torch has to see."""


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


class RecordOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def seen() -> SeenCalls[str]:
    calls: SeenCalls[str] = SeenCalls()
    calls.add("key", example(), "found")
    return calls


def example() -> tuple[Tensor, Tensor]:
    return torch.zeros(3, 8), torch.zeros(4, dtype=torch.int32)


def test_found_by_key_and_metadata(seen: SeenCalls[str]) -> None:
    assert seen.find("key", example()) == "found"
    assert seen.find("other key", example()) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.double(),
        lambda t: t[:2],
        lambda t: t[None],
        lambda t: torch.zeros(8, 3).T,
        lambda t: torch.zeros(3, 16)[:, ::2],
        lambda t: t.clone().requires_grad_(),
        lambda t: t.as_subclass(Labelled),
        lambda t: torch.nn.Parameter(t),
        lambda t: t.to("meta"),
        lambda t: t.to_sparse(),
        lambda t: None,
        lambda t: 1.0,
    ],
)
def test_not_found_of_other_tensors(seen: SeenCalls[str], change: Callable[[Tensor], Any]) -> None:
    first, second = example()
    assert seen.find("key", (change(first), second)) is None


@pytest.mark.parametrize("context", [FunctionMode, RecordOps, torch.autograd.profiler.profile])
def test_not_found_and_not_added_where_something_sees_the_ops(
    seen: SeenCalls[str], context: Callable[[], AbstractContextManager[Any]]
) -> None:
    with context():
        assert seen.find("key", example()) is None
        if context is not torch.autograd.profiler.profile:
            seen.add("inside", example(), "found")
            assert seen.find("inside", example()) is None
    assert seen.find("inside", example()) is None


def test_not_found_in_a_transform(seen: SeenCalls[str]) -> None:
    found: list[str | None] = ["not called"]

    def transformed(row: Tensor) -> Tensor:
        found[:] = [seen.find("key", example())]
        return row

    torch.func.vmap(transformed)(torch.zeros(2, 3))
    assert found == [None]


def test_grad_mode_belongs_to_the_call(seen: SeenCalls[str]) -> None:
    """What passes without grad mode may not pass with it."""
    tensors = (example()[0].requires_grad_(), example()[1])
    with torch.no_grad():
        seen.add("without", tensors, "found")
        assert seen.find("without", tensors) == "found"
    assert seen.find("without", tensors) is None


def test_a_few_calls_of_a_key_are_kept() -> None:
    calls: SeenCalls[int] = SeenCalls()
    for rows in range(CALLS_PER_KEY + 1):
        calls.add("key", [torch.zeros(rows)], rows)
    assert [calls.find("key", [torch.zeros(rows)]) for rows in range(CALLS_PER_KEY + 1)] == [None, 1, 2, 3, 4]


# --- the ops ----------------------------------------------------------------------------------------------------------

needs_kernels = pytest.mark.skipif(not (INTERPRETED or IS_CUDA), reason="the torch reference has nothing to launch")


@needs_kernels
@pytest.mark.parametrize("return_lse", [False, True])
def test_attention_again_is_the_same(return_lse: bool) -> None:
    case = make_case(query_lens=(1, 2), seq_lens=(20, 70))
    plan = make_plan(case)
    arguments: dict[str, Any] = {"max_query_len": case.max_query_len, "plan": plan, "return_lse": return_lse}
    arguments["sinks"] = torch.zeros(4, device=case.query.device)
    for out in (None, torch.empty_like(case.query)):
        expected, *again = (pagedattn.paged_attention(*case.arguments(), **arguments, out=out) for _ in range(3))
        for result in again:
            torch.testing.assert_close(result, expected, rtol=0, atol=0)


@needs_kernels
def test_attention_again_still_checks() -> None:
    """What a remembered call must not let pass: numbers of another type, grad, subclasses that have to see the op."""
    case = make_case(query_lens=(1, 2), seq_lens=(20, 70))
    arguments: dict[str, Any] = {"max_query_len": case.max_query_len, "plan": make_plan(case), "softcap": 1.0}
    arguments["q_scale"] = torch.ones((), device=case.query.device)
    for _ in range(2):
        pagedattn.paged_attention(*case.arguments(), **arguments)
    for name, value in (("softcap", True), ("causal", 1), ("return_lse", 0), ("max_query_len", 2.0)):
        with pytest.raises(TypeError, match=f"^{name}: "):
            pagedattn.paged_attention(*case.arguments(), **{**arguments, name: value})
    with pytest.raises(ValueError, match=r"^q_scale: requires grad"):
        pagedattn.paged_attention(
            *case.arguments(), **{**arguments, "q_scale": arguments["q_scale"].clone().requires_grad_()}
        )
    with RecordOps() as recorded:
        pagedattn.paged_attention(*case.arguments(), **arguments)
    assert "pagedattn.paged_attention.default" in recorded.names


@needs_kernels
@pytest.mark.parametrize("rotates", [False, True])
def test_append_again_is_the_same(rotates: bool) -> None:
    function: Any = pagedattn.rope_append_kv if rotates else pagedattn.append_kv
    caches = []
    for _ in range(3):
        inputs = rope_inputs() if rotates else append_inputs()
        function(**inputs)
        caches.append(inputs["key_cache"])
    assert caches[0].any()
    assert torch.equal(caches[1], caches[0])
    assert torch.equal(caches[2], caches[0])
    inputs = rope_inputs() if rotates else append_inputs()
    with pytest.raises(ValueError, match=r"^slot_mapping: "):
        function(**{**inputs, "slot_mapping": inputs["slot_mapping"].int()})
    with pytest.raises(ValueError, match=r"^value: requires grad"):
        function(**{**inputs, "value": inputs["value"].requires_grad_()})
    with RecordOps() as recorded:
        function(**(rope_inputs() if rotates else append_inputs()))
    assert any(name.startswith("pagedattn.") for name in recorded.names)


@needs_kernels
@pytest.mark.parametrize("has_plan", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_second_call_takes_the_short_way(
    mode: Callable[[], Any], has_plan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, shorter = (make_case(query_lens=(1, 2), seq_lens=lengths) for lengths in ((20, 70), (9, 70)))

    def attend(lengths: Tensor) -> Tensor:
        batch = (*case.arguments()[:4], lengths, case.query_start_loc)
        plan = make_plan(case) if has_plan else None
        return pagedattn.paged_attention(*batch, max_query_len=case.max_query_len, plan=plan)

    def refuse(*_: Any) -> None:
        raise AssertionError("checked again")

    with mode():
        expected = attend(case.seq_lens)
        with monkeypatch.context() as patch:
            patch.setattr(pagedattn.ops, "_prepare_attention", refuse)
            assert torch.equal(attend(case.seq_lens), expected)
            if has_plan:
                return
            changed = attend(shorter.seq_lens)  # planned anew
        assert not torch.equal(changed, expected)
        torch.testing.assert_close(changed[1:], expected[1:], rtol=0, atol=2e-3)  # the other sequence's, cut elsewhere
