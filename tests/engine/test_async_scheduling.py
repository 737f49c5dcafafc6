"""Steps that are launched before the one before has ended: the same answers, and every guarantee kept.

On a CPU a launched step has ended at once; that its tokens are looked at one step late is what is tested here. The
order is the engine's own, and the decoder reads the tokens back through the paged cache.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pagedattn.engine.engine import Engine
from pagedattn.engine.policy import POLICIES
from pagedattn.engine.sampler import NO_FINITE_LOGITS
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduling_params import SchedulingParams
from pagedattn.engine.swap_space import PreemptionCosts, SwapSpace
from tests.engine.fake_model import EOS, Clock, FakeDecoder, expected_tokens, fake_engine, run_to_end

NAN_PROMPT = [101, 101]


def greedy(max_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **params)


def async_engine(**options: Any) -> Engine:
    return fake_engine(async_scheduling=True, **options)


def test_the_tokens_of_a_step_come_with_the_next() -> None:
    engine = async_engine()
    engine.add_request([98, 99], greedy(3, ignore_eos=True), request_id="a")
    expected = expected_tokens([98, 99], 3, ignore_eos=True)
    assert engine.step().outputs == []
    for count in (1, 2):
        [output] = engine.step().outputs
        assert output.outputs[0].token_ids == expected[:count]
        engine.runner.state.check_integrity()
    [output] = engine.step().outputs  # nothing is left to launch: its last token is never computed
    assert (output.finished, output.outputs[0].token_ids) == (True, expected)
    assert (engine.stats().num_steps, engine.has_unfinished) == (3, False)


def test_a_stop_that_is_seen_late_costs_a_token_that_nobody_sees() -> None:
    prompt = next(p for p in ([98, c] for c in range(97, 123)) if expected_tokens(p, 40)[-1] == EOS)
    expected = expected_tokens(prompt, 40)
    finished, num_computed = [], []
    for is_async in (False, True):
        engine = fake_engine(async_scheduling=is_async)
        name = engine.add_request(prompt, greedy(100))
        finished.append(run_to_end(engine)[name])
        num_computed.append(engine.stats().num_computed_tokens)
    assert finished[0].outputs == finished[1].outputs
    assert finished[1].outputs[0].token_ids == expected
    assert num_computed[1] == num_computed[0] + 1
    assert engine.stats().num_generated_tokens == len(expected)


def test_blocks_of_one_that_ended_are_reused_while_its_last_step_runs() -> None:
    """One block each is all there is: who waits gets that of the one who ended, in the very next step."""
    engine = async_engine(num_blocks=1, block_size=4, max_model_len=4, enable_prefix_caching=False)
    prompts = [[98, 97], [99, 97], [100, 97]]
    names = [engine.add_request(prompt, greedy(1)) for prompt in prompts]
    finished = run_to_end(engine)
    for name, prompt in zip(names, prompts, strict=True):
        assert finished[name].outputs[0].token_ids == expected_tokens(prompt, 1)


def test_a_name_may_be_used_again_while_a_step_of_its_first_bearer_runs() -> None:
    engine = async_engine()
    engine.add_request([98, 99], greedy(20, ignore_eos=True), request_id="other")
    engine.add_request([98, 97], greedy(20, ignore_eos=True), request_id="same")
    for _ in range(4):
        engine.step()
    engine.abort("same")
    engine.add_request([104, 105, 106], greedy(5, ignore_eos=True), request_id="same")
    outputs = []
    while engine.has_unfinished:
        outputs += [output for output in engine.step().outputs if output.request_id == "same" and output.finished]
    assert [output.outputs[0].finish_reason for output in outputs] == ["abort", "length"]
    assert outputs[1].outputs[0].token_ids == expected_tokens([104, 105, 106], 5, ignore_eos=True)


def failing(when: int, error: BaseException) -> FakeDecoder:
    calls = 0

    def before_forward(batch: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == when:
            raise error

    return FakeDecoder(4, before_forward)


@pytest.mark.parametrize("when", [1, 2, 4])
def test_a_launch_that_raises_fails_its_requests_with_what_they_had(when: int) -> None:
    """The step before it is finished first: its tokens are handed out."""
    engine = async_engine(decoder=failing(when, RuntimeError("a kernel broke")), max_num_seqs=2)
    work = [[98, 99, 100], [101, 102], [103, 104]]
    names = [engine.add_request(prompt, greedy(6, ignore_eos=True)) for prompt in work]
    finished = run_to_end(engine)
    for name, prompt in zip(names[:2], work, strict=False):
        assert finished[name].error == "the step failed: RuntimeError: a kernel broke"
        assert finished[name].outputs[0].token_ids == expected_tokens(prompt, 6, ignore_eos=True)[: when - 1]
    assert finished[names[2]].outputs[0].token_ids == expected_tokens(work[2], 6, ignore_eos=True)


@pytest.mark.parametrize("when", [1, 2, 4])
def test_an_interrupted_launch_loses_nothing(when: int) -> None:
    engine = async_engine(decoder=failing(when, KeyboardInterrupt()))
    work = [[98, 99, 100], [101, 102]]
    names = [engine.add_request(prompt, greedy(8, ignore_eos=True)) for prompt in work]
    with pytest.raises(KeyboardInterrupt):
        run_to_end(engine)
    finished = run_to_end(engine)
    for name, prompt in zip(names, work, strict=True):
        assert finished[name].outputs[0].token_ids == expected_tokens(prompt, 8, ignore_eos=True)


@pytest.mark.parametrize("when", [1, 2, 4])
def test_a_device_that_fails_fails_all_that_it_runs(when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA does it: the error shows when the tokens are waited for, with the next step under way."""
    engine = async_engine()
    work = [[98, 99, 100], [101, 102]]
    names = [engine.add_request(prompt, greedy(8, ignore_eos=True)) for prompt in work]
    launch, num_launched = engine.runner.launch, 0

    def broken(plan: Any) -> Any:
        nonlocal num_launched
        num_launched += 1
        step = launch(plan)
        if num_launched == when:
            monkeypatch.setattr(step, "wait", lambda: torch.zeros(1).view(2))
        return step

    monkeypatch.setattr(engine.runner, "launch", broken)
    finished = run_to_end(engine)
    for name in names:
        assert "the step failed: RuntimeError" in (finished[name].error or "")
        assert len(finished[name].outputs[0].token_ids) == when - 1
    name = engine.add_request([107], greedy(8, ignore_eos=True))
    assert run_to_end(engine)[name].outputs[0].token_ids == expected_tokens([107], 8, ignore_eos=True)


def test_nan_logits_fail_their_request_alone() -> None:
    engine = async_engine(decoder=FakeDecoder(4, nan_prompts=[NAN_PROMPT]), enable_prefix_caching=True)
    work = [[98, 99, 100], NAN_PROMPT, [103, 104]]
    names = [engine.add_request(prompt, greedy(12)) for prompt in work]
    finished = run_to_end(engine)
    assert [finished[name].error for name in names] == [None, NO_FINITE_LOGITS, None]
    for index in (0, 2):
        assert finished[names[index]].outputs[0].token_ids == expected_tokens(work[index], 12)


def test_deadlines_are_kept_while_a_step_runs() -> None:
    engine = Clock().engine(async_scheduling=True)
    late = engine.add_request([98], greedy(200), scheduling_params=SchedulingParams(timeout=1.0))
    other = engine.add_request([99], greedy(5, ignore_eos=True))
    finished = run_to_end(engine)
    assert finished[late].outputs[0].finish_reason in ("deadline", "stop")
    assert finished[other].outputs[0].token_ids == expected_tokens([99], 5, ignore_eos=True)


def test_unstreamed_requests_have_one_output_and_the_same_text() -> None:
    prompts = [[97 + index, 98] for index in range(6)]
    params = [
        greedy(9),
        greedy(9, ignore_eos=True),
        greedy(9, stop="a"),
        greedy(5, stop_token_ids=[100, 101, 102, 103]),
    ]
    params += [greedy(9, include_stop_str_in_output=True, skip_special_tokens=False), greedy(9, detokenize=False)]
    found = []
    for is_streamed in (True, False):
        engine = async_engine()
        for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            engine.add_request(prompt, one, request_id=str(index), is_streamed=is_streamed)
        outputs: dict[str, list[Any]] = {str(index): [] for index in range(6)}
        while engine.has_unfinished:
            for output in engine.step().outputs:
                outputs[output.request_id].append(output)
        if not is_streamed:
            assert all(len(several) == 1 for several in outputs.values())
        last = [several[-1].outputs[0] for several in outputs.values()]
        found.append([(one.text, one.token_ids, one.finish_reason, one.stop_reason) for one in last])
    assert found[0] == found[1]


def test_an_aborted_request_that_was_not_streamed_has_its_text() -> None:
    engine = async_engine()
    name = engine.add_request([98], greedy(50, ignore_eos=True, skip_special_tokens=False), is_streamed=False)
    for _ in range(6):
        assert engine.step().outputs == []
    engine.abort(name)
    [output] = engine.step().outputs
    expected = expected_tokens([98], 50, ignore_eos=True)[:5]
    assert output.outputs[0].token_ids == expected
    assert output.outputs[0].text == "".join("<eos>" if one == EOS else chr(one) for one in expected)


def answer_alone(prompt: list[int], params: SamplingParams) -> list[tuple[list[int], str, str | None]]:
    """What the request gets from an engine of its own, that waits for every step."""
    engine = fake_engine(num_blocks=400, max_model_len=64)
    name = engine.add_request(prompt, params)
    return [(one.token_ids, one.text, one.finish_reason) for one in run_to_end(engine)[name].outputs]


class EngineMachine(RuleBasedStateMachine):
    """Requests of every kind, aborts, failures and interrupts; answers must be those that each gets alone."""

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        num_blocks=st.integers(16, 60),
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.integers(6, 40),
        enable_prefix_caching=st.booleans(),
        num_host_blocks=st.sampled_from([0, 12]),
        preempt_by=st.sampled_from(["recompute", "swap"]),
    )
    def start(self, policy: str, num_host_blocks: int, preempt_by: Any, **options: Any) -> None:
        self.failure: BaseException | None = None
        costs = PreemptionCosts((1, 16), (0.0, 15.0), (7.0, 7.0))
        self.engine = async_engine(
            decoder=FakeDecoder(4, self.before_forward),
            policy=replace(POLICIES[policy], preempt_by=preempt_by),
            swap_space=SwapSpace(num_host_blocks, costs),
            max_model_len=64,
            **options,
        )
        self.work: dict[str, tuple[list[int], SamplingParams]] = {}
        self.touched: set[str] = set()  # by aborts and failures: they may end early
        self.finished: dict[str, Any] = {}

    def before_forward(self, batch: Any) -> None:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    @rule(
        length=st.integers(1, 12),
        first=st.integers(97, 100),
        max_tokens=st.integers(1, 20),
        n=st.sampled_from([1, 1, 1, 2]),
        seed=st.integers(0, 5),
        temperature=st.sampled_from([0.0, 1.0]),
        ignore_eos=st.booleans(),
        stop=st.sampled_from([None, None, "a", "cb"]),
        min_tokens=st.sampled_from([0, 0, 3]),
        logprobs=st.sampled_from([None, None, 1]),
        is_streamed=st.booleans(),
    )
    def arrive(self, length: int, first: int, is_streamed: bool, **params: Any) -> None:
        if params["n"] > self.engine.config.max_num_seqs:
            return
        params["min_tokens"] = min(params["min_tokens"], params["max_tokens"])
        prompt, sampling = [first] * length, SamplingParams(**params)
        name = self.engine.add_request(prompt, sampling, is_streamed=is_streamed)
        self.work[name] = (prompt, sampling)

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.one_step()

    @rule(index=st.integers(0, 100))
    def abort(self, index: int) -> None:
        unfinished = sorted(set(self.work) - set(self.finished))
        if unfinished:
            self.touched.add(unfinished[index % len(unfinished)])
            self.engine.abort(unfinished[index % len(unfinished)])

    @rule(is_interrupt=st.booleans())
    def fail(self, is_interrupt: bool) -> None:
        self.failure = KeyboardInterrupt() if is_interrupt else RuntimeError("a kernel broke")
        if not is_interrupt:
            self.touched |= set(self.work) - set(self.finished)
        self.one_step()
        self.failure = None

    def one_step(self) -> None:
        try:
            result = self.engine.step()
        except KeyboardInterrupt:
            return
        for output in result.outputs:
            if output.finished:
                assert output.request_id not in self.finished
                self.finished[output.request_id] = output
        self.engine.runner.state.check_integrity()

    @invariant()
    def whole(self) -> None:
        self.engine.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if not self.engine.has_unfinished:
                break
            self.one_step()
        self.one_step()  # aborts of the last round
        assert set(self.finished) == set(self.work), "some requests never end"
        assert self.engine.block_manager.num_used == self.engine.block_manager.swap_space.num_used == 0
        for name, output in self.finished.items():
            found = [(one.token_ids, one.text, one.finish_reason) for one in output.outputs]
            expected = answer_alone(*self.work[name])
            if name not in self.touched:
                assert found == expected, name
            for (tokens, *_), (all_tokens, *_) in zip(found, expected, strict=True):
                assert tokens == all_tokens[: len(tokens)], name


@pytest.mark.parametrize("seed", range(4))
def test_random_work_gets_the_answers_that_it_gets_alone(seed: int) -> None:
    class Machine(EngineMachine):
        pass

    run_state_machine_as_test(
        hypothesis.seed(seed)(Machine),
        settings=settings(
            max_examples=12,
            stateful_step_count=25,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("policy", ["default", "static"])
@pytest.mark.parametrize("seed", range(4))
def test_aborts_at_random_moments_leave_all_blocks(policy: str, seed: int) -> None:
    generator = random.Random(seed)
    engine = async_engine(policy=policy, num_blocks=14, max_model_len=56, max_num_seqs=4, max_num_batched_tokens=9)
    prompts = [[generator.randrange(97, 123) for _ in range(generator.randint(1, 30))] for _ in range(12)]
    work = {engine.add_request(prompt, greedy(12)): prompt for prompt in prompts}
    finished: dict[str, Any] = {}
    while engine.has_unfinished:
        for output in engine.step().outputs:
            if output.finished:
                finished[output.request_id] = output
        engine.check_integrity()
        engine.runner.state.check_integrity()
        if generator.random() < 0.3:
            engine.abort(generator.choice(list(work)))
            engine.check_integrity()
    for output in engine.step().outputs:
        finished[output.request_id] = output
    assert set(finished) == set(work)
    for name, output in finished.items():
        expected, token_ids = expected_tokens(work[name], 12), output.outputs[0].token_ids
        is_aborted = output.outputs[0].finish_reason == "abort"
        assert token_ids == (expected[: len(token_ids)] if is_aborted else expected)
    assert engine.block_manager.num_used == 0
