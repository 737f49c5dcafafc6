"""The engine's use of its blocks, on the fake model: prefixes shared, sequences forked, victims in host memory."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pagedattn.engine.batch import BatchTensors
from pagedattn.engine.engine import Engine
from pagedattn.engine.policy import POLICIES
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduler import RequestRejectedError
from pagedattn.engine.swap_space import PreemptionCosts, SwapSpace
from tests.engine.fake_model import FakeDecoder, expected_tokens, fake_engine, run_to_end

SWAP_ALWAYS = PreemptionCosts((1, 2), (1.0, 2.0), (0.0, 0.0))
SWAP_NEVER = PreemptionCosts((1, 2), (0.0, 0.0), (1.0, 2.0))


def greedy(max_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **params)


def letters(count: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(97, 123) for _ in range(count)]


def add_all(engine: Engine, prompts: list[list[int]], max_tokens: int = 12) -> dict[str, list[int]]:
    """What each request should come to."""
    return {
        engine.add_request(prompt, greedy(max_tokens)): expected_tokens(prompt, max_tokens, ignore_eos=True)
        for prompt in prompts
    }


def tokens_of(finished: dict[str, Any]) -> dict[str, list[int]]:
    return {name: output.outputs[0].token_ids for name, output in finished.items()}


def questions(count: int, num_common: int = 21) -> list[list[int]]:
    return [letters(num_common, seed=0) + letters(5, seed=index + 1) for index in range(count)]


@pytest.mark.parametrize("max_num_batched_tokens", [9, 512])
def test_what_is_common_is_computed_once_even_at_once(max_num_batched_tokens: int) -> None:
    engine = fake_engine(num_blocks=200, max_num_batched_tokens=max_num_batched_tokens)
    expected = add_all(engine, questions(8))
    assert tokens_of(run_to_end(engine)) == expected
    stats = engine.stats()
    assert stats.prefix_cache_queries == 8 * 26
    assert stats.prefix_cache_hits == 7 * 20  # five full blocks of the 21 common tokens
    assert stats.num_computed_tokens == 8 * (26 + 11) - 7 * 20
    assert stats.num_preemptions == 0


def test_the_same_prompt_again_computes_its_last_block() -> None:
    engine = fake_engine()
    prompt = letters(20, seed=0)
    for num_cached in (0, 16):  # of 20: the last token is always computed
        expected = add_all(engine, [prompt])
        finished = run_to_end(engine)
        assert tokens_of(finished) == expected
        assert [output.num_cached_tokens for output in finished.values()] == [num_cached]


def test_an_answer_is_cached_for_the_next_turn() -> None:
    engine = fake_engine()
    prompt = letters(10, seed=0)
    (name,) = add_all(engine, [prompt])
    answer = run_to_end(engine)[name].outputs[0].token_ids
    expected = add_all(engine, [[*prompt, *answer, *letters(3, seed=1)]])
    finished = run_to_end(engine)
    assert tokens_of(finished) == expected
    assert [output.num_cached_tokens for output in finished.values()] == [20]  # of 22, one of which was not computed


def test_off_means_off() -> None:
    engine = fake_engine(enable_prefix_caching=False)
    for _ in range(2):
        expected = add_all(engine, [letters(20, seed=0)])
        assert tokens_of(run_to_end(engine)) == expected
    assert engine.stats().prefix_cache_hits == 0
    assert engine.stats().num_computed_tokens == 2 * (20 + 11)


def test_tenants_do_not_see_each_others_blocks() -> None:
    engine = fake_engine()
    hits = []
    for salt in ("a", "b", "a", ""):
        name = engine.add_request({"prompt_token_ids": letters(20, seed=0), "cache_salt": salt}, greedy(4))
        hits.append(run_to_end(engine)[name].num_cached_tokens)
    assert hits == [0, 0, 16, 0]


def test_who_waits_for_a_prefix_goes_on_when_its_computing_is_aborted() -> None:
    engine = fake_engine(max_num_batched_tokens=8)
    first, *others = add_all(engine, questions(3)).items()
    result = engine.step()
    assert list(result.num_scheduled_tokens) == [first[0]]  # the others wait though the step has budget to give
    engine.abort(first[0])
    assert tokens_of(run_to_end(engine)) == {**dict(others), first[0]: []}
    assert engine.stats().prefix_cache_hits == 8 + 20  # what the first left, then all that is common


def test_a_batch_that_nobody_joins_later_does_not_wait_for_prefixes() -> None:
    engine = fake_engine(policy="static", num_blocks=100)
    expected = add_all(engine, questions(3))
    assert engine.step().num_seqs == 3
    assert tokens_of(run_to_end(engine)) == expected


def test_a_waiting_requests_blocks_are_evicted_last() -> None:
    engine = fake_engine(num_blocks=12, max_num_seqs=1)
    wanted, unwanted = letters(16, seed=0), letters(16, seed=1)
    for prompt in (wanted, unwanted):  # the wanted blocks are the older ones
        add_all(engine, [prompt], max_tokens=1)
        run_to_end(engine)
    add_all(engine, [letters(24, seed=2), [*wanted, 97]], max_tokens=1)
    finished = run_to_end(engine)
    assert [output.num_cached_tokens for output in finished.values()] == [0, 16]


def test_nan_is_not_shared() -> None:
    prompt = letters(20, seed=0)
    decoder = FakeDecoder(block_size=4, nan_prompts=[prompt])
    engine = fake_engine(decoder=decoder)
    name = engine.add_request(prompt, greedy(4))
    assert run_to_end(engine)[name].error is not None
    decoder.nan_prompts.clear()
    expected = add_all(engine, [prompt])
    finished = run_to_end(engine)
    assert tokens_of(finished) == expected
    assert engine.stats().prefix_cache_hits == 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("num_host_blocks", [0, 6, 200])
def test_tokens_are_the_models_through_sharing_and_preemptions(
    policy: str, enable_prefix_caching: bool, num_host_blocks: int
) -> None:
    engine = fake_engine(
        num_blocks=14,
        max_model_len=48,
        max_num_seqs=6,
        max_num_batched_tokens=16,
        policy=policy,
        enable_prefix_caching=enable_prefix_caching,
        swap_space=SwapSpace(num_host_blocks, SWAP_ALWAYS),
    )
    expected = add_all(engine, questions(5, num_common=9) + [letters(7, seed) for seed in range(5)])
    assert tokens_of(run_to_end(engine)) == expected
    stats = engine.stats()
    assert (stats.prefix_cache_hits > 0) == enable_prefix_caching
    swaps = POLICIES[policy].preempt_by != "recompute" and num_host_blocks > 0 and stats.num_preemptions > 0
    assert (stats.num_swaps > 0) == swaps


def squeezed_engine(costs: PreemptionCosts = SWAP_ALWAYS, **options: Any) -> Engine:
    """Two requests that do not fit together to their end."""
    options = {"num_blocks": 9, "max_model_len": 32, "swap_space": SwapSpace(20, costs), **options}
    return fake_engine(**options)


def step_until_swapped(engine: Engine) -> None:
    while not engine.block_manager.swap_space.num_used:
        engine.step()
        engine.check_integrity()


def test_a_swapped_request_computes_nothing_again() -> None:
    engine = squeezed_engine()
    expected = add_all(engine, [letters(8, seed) for seed in range(2)], max_tokens=16)
    assert tokens_of(run_to_end(engine)) == expected
    stats = engine.stats()
    assert stats.num_swaps == stats.num_preemptions > 0
    assert stats.num_computed_tokens == 2 * (8 + 15)


def test_what_costs_less_is_done() -> None:
    engine = squeezed_engine(SWAP_NEVER)
    expected = add_all(engine, [letters(8, seed) for seed in range(2)], max_tokens=16)
    assert tokens_of(run_to_end(engine)) == expected
    assert engine.stats().num_preemptions > engine.stats().num_swaps == 0


def test_abort_while_swapped_frees_host_blocks() -> None:
    engine = squeezed_engine()
    first, second = add_all(engine, [letters(8, seed) for seed in range(2)], max_tokens=16)
    step_until_swapped(engine)
    engine.abort(second)
    assert engine.block_manager.swap_space.num_used == 0
    finished = run_to_end(engine)
    assert [finished[name].outputs[0].finish_reason for name in (first, second)] == ["length", "abort"]


def test_a_step_that_fails_leaves_swapped_requests_to_compute_again() -> None:
    def fail(batch: BatchTensors) -> None:
        if engine.block_manager.swap_space.num_used and not failed:
            failed.append(True)
            raise RuntimeError("kernel")

    failed: list[bool] = []
    engine = squeezed_engine(decoder=FakeDecoder(4, before_forward=fail))
    (_, first), (second, expected) = add_all(engine, [letters(8, seed) for seed in range(2)], max_tokens=16).items()
    finished = run_to_end(engine)
    assert failed
    assert finished[second].outputs[0].token_ids == expected
    assert sum(output.error is not None for output in finished.values()) == 1
    assert engine.stats().num_computed_tokens > 8 + len(first) + 15


def test_a_failing_transfer_fails_the_step() -> None:
    engine = squeezed_engine()
    add_all(engine, [letters(8, seed) for seed in range(2)], max_tokens=16)
    transfer = engine.cache.transfer

    def fail(transfers: Any) -> None:
        engine.cache.transfer = transfer  # type: ignore[method-assign]
        raise RuntimeError("out of pinned memory")

    engine.cache.transfer = fail  # type: ignore[method-assign]
    finished = run_to_end(engine)
    assert sorted(output.error is None for output in finished.values()) == [False, True]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_n_sequences_are_those_of_their_seeds(policy: str, enable_prefix_caching: bool) -> None:
    engine = fake_engine(policy=policy, enable_prefix_caching=enable_prefix_caching, num_blocks=40, max_num_seqs=4)
    prompt = letters(10, seed=0)
    name = engine.add_request(prompt, greedy(9, n=4))
    output = run_to_end(engine)[name]
    expected = expected_tokens(prompt, 9, ignore_eos=True)
    assert [completion.token_ids for completion in output.outputs] == [expected] * 4
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    assert engine.stats().num_finished == 1
    if POLICIES[policy].join == "every_step":
        # Once the prompt, then its last token for each other sequence.
        assert engine.stats().num_computed_tokens == 10 + 3 + 4 * 8


def test_forks_copy_the_block_that_they_write_to() -> None:
    copies = []
    engine = fake_engine()
    transfer = engine.cache.transfer

    def spy(transfers: Any) -> None:
        copies.extend(transfers.copy)
        transfer(transfers)

    engine.cache.transfer = spy  # type: ignore[method-assign]
    engine.add_request(letters(10, seed=0), greedy(9, n=3))
    engine.step()
    assert engine.block_manager.num_used == 3
    engine.step()
    assert len(copies) == 2
    assert engine.block_manager.num_used == 3 + 2  # the two full blocks are shared, the third is everybody's own
    run_to_end(engine)
    assert len(copies) == 2


def test_n_sequences_end_and_are_reported_together() -> None:
    engine = fake_engine(max_num_seqs=3)
    name = engine.add_request([98, 99], SamplingParams(n=3, max_tokens=20, stop=["a"], seed=1))
    seen = []
    while engine.has_unfinished:
        seen += engine.step().outputs
        engine.check_integrity()
    assert {output.request_id for output in seen} == {name}
    assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]
    for index in range(3):
        assert "".join(output.outputs[index].delta_text for output in seen) == seen[-1].outputs[index].text


def test_aborting_n_sequences() -> None:
    engine = fake_engine()
    name = engine.add_request(letters(10, seed=0), greedy(9, n=3))
    for _ in range(3):
        engine.step()
    engine.abort(name)
    (output,) = engine.step().outputs
    assert [completion.finish_reason for completion in output.outputs] == ["abort"] * 3
    assert not engine.has_unfinished
    assert engine.stats().num_aborted == 1


def test_more_sequences_than_run_together_are_refused() -> None:
    engine = fake_engine(max_num_seqs=4)
    with pytest.raises(RequestRejectedError, match="n=5 is not allowed: at most max_num_seqs=4"):
        engine.add_request([98], SamplingParams(n=5))
    assert not engine.has_unfinished


def test_names_of_sequences_are_not_taken_twice() -> None:
    engine = fake_engine()
    engine.add_request([98], SamplingParams(n=2), request_id="a")
    with pytest.raises(ValueError, match="in use"):
        engine.add_request([98], request_id="a#1")
    run_to_end(engine)
