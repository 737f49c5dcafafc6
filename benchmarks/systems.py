"""The systems that ``benchmarks.engine`` compares: each answers a whole trace, greedily, and says what it took.

All requests are there at time 0. EOS is ignored, and each request counts for the tokens that it asked for. All systems
share one copy of the weights: ``as_transformers`` builds a transformers model around ours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from benchmarks.traces import Trace
from pagedattn.engine.checkpoint_names import from_hugging_face
from pagedattn.engine.llm import LLM
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.weights import LoadedModel

CONTINUOUS_RESULT_SECONDS = 600.0  # without any result for this long, transformers' manager is taken for dead


@dataclass(frozen=True)
class Run:
    """One pass over a trace.

    ``latencies``: seconds from the start until a request's last token is in the caller's hands; a padded ``generate``
    hands out a batch when the batch ends. ``slot_utilization``: share of the batch's rows, over the decode steps or the
    time, in which an unfinished request was computed. ``kv_utilization``: share of the allocated KV slots that hold a
    token of an unfinished request. None: the system does not tell.
    """

    seconds: float
    tokens: list[list[int]]
    latencies: list[float]
    slot_utilization: float | None = None
    kv_utilization: float | None = None


class System(Protocol):
    """``name`` and ``batch_size`` identify it; ``run`` may be called any number of times."""

    name: str
    batch_size: int

    def run(self, trace: Trace) -> Run: ...


class Paged:
    """Our engine under one policy, driven step by step."""

    def __init__(self, loaded: LoadedModel, policy: str, batch_size: int, trace: Trace) -> None:
        self.name = f"pagedattn, {policy} policy"
        self.batch_size = batch_size
        # Blocks for the largest batch of the longest requests, so that no policy is held back by memory.
        block_size = 16
        blocks = sorted((-(-(len(prompt) + length) // block_size) for prompt, length in trace), reverse=True)
        self._engine = LLM(
            loaded,
            policy=policy,
            max_num_seqs=batch_size,
            block_size=block_size,
            num_blocks=sum(blocks[:batch_size]) + batch_size,
            enable_prefix_caching=False,  # or the second round would find the first one's prompts
        ).engine

    def run(self, trace: Trace) -> Run:
        engine = self._engine
        start = time.perf_counter()
        for index, (prompt, length) in enumerate(trace):
            params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
            engine.add_request(prompt, params, request_id=str(index))
        tokens: list[list[int]] = [[] for _ in trace]
        latencies = [0.0] * len(trace)
        durations, num_active, num_filled, num_allocated = [], [], [], []
        now = start
        while engine.has_unfinished:
            result = engine.step()
            before, now = now, time.perf_counter()
            if result.error is not None:
                raise RuntimeError(f"{self.name}: {result.error}")
            if result.usage is None:  # launched, and not ended yet: what comes with the next
                continue
            durations.append(now - before)
            num_active.append(result.num_seqs)
            num_filled.append(result.usage.num_filled_slots)
            num_allocated.append(result.usage.num_allocated_slots)
            for output in result.outputs:
                index = int(output.request_id)
                tokens[index] += output.outputs[0].delta_token_ids
                if output.finished:
                    latencies[index] = now - start
        weights = np.array(durations)
        return Run(
            now - start,
            tokens,
            latencies,
            float(weights @ np.array(num_active) / (weights.sum() * self.batch_size)),
            float(weights @ np.array(num_filled) / (weights @ np.array(num_allocated))),
        )


class PaddedGenerate:
    """transformers' ``generate`` on batches of left-padded prompts, each as long as the batch's longest request.

    A stopping criterion per row would not help: a row that has ended is computed until the batch ends.
    """

    def __init__(self, model: Any, order: Literal["in order of arrival", "sorted by length"], batch_size: int) -> None:
        self.name = f"transformers generate, {order}"
        self.batch_size = batch_size
        self._model = model
        self._is_sorted = order == "sorted by length"

    def run(self, trace: Trace) -> Run:
        start = time.perf_counter()
        tokens: list[list[int]] = [[] for _ in trace]
        latencies = [0.0] * len(trace)
        num_useful = num_computed = num_filled = num_allocated = 0
        for batch in self._batches(trace):
            prompts, lengths = [trace[index][0] for index in batch], [trace[index][1] for index in batch]
            width, num_steps = max(map(len, prompts)), max(lengths)
            input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            sequences = self._model.generate(
                input_ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                max_new_tokens=num_steps,
                do_sample=False,
                pad_token_id=0,
            ).tolist()
            now = time.perf_counter()
            for index, length, sequence in zip(batch, lengths, sequences, strict=True):
                tokens[index] = sequence[width : width + length]
                latencies[index] = now - start
            num_useful += sum(lengths)
            num_computed += len(batch) * num_steps
            # At decode step s every row has width + s slots, of which an unfinished one fills its prompt's and s.
            num_allocated += len(batch) * sum(width + step for step in range(num_steps))
            num_filled += sum(
                len(prompt) * length + length * (length - 1) // 2
                for prompt, length in zip(prompts, lengths, strict=True)
            )
        return Run(
            time.perf_counter() - start, tokens, latencies, num_useful / num_computed, num_filled / num_allocated
        )

    def _batches(self, trace: Trace) -> Iterator[list[int]]:
        order = list(range(len(trace)))
        if self._is_sorted:
            order.sort(key=lambda index: trace[index][1])
        for first in range(0, len(order), self.batch_size):
            yield order[first : first + self.batch_size]


class ContinuousGenerate:
    """transformers' continuous batching: its manager, started and warmed up before the clock starts."""

    name = "transformers continuous batching"

    def __init__(self, model: Any, batch_size: int, trace: Trace, max_batch_tokens: int) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.batch_size = batch_size
        self._model = model
        self._generation_config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        page_size = 16 if model.device.type == "cpu" else 256  # 256 is its default, made for flash attention
        num_pages = sum(-(-(len(prompt) + length) // page_size) for prompt, length in trace)
        self._config = ContinuousBatchingConfig(
            page_size=page_size,
            num_blocks=num_pages + batch_size,
            max_batch_tokens=max_batch_tokens,
            max_requests_per_batch=batch_size,
        )

    def run(self, trace: Trace) -> Run:
        tokens: list[list[int]] = [[] for _ in trace]
        latencies = [0.0] * len(trace)
        with self._model.continuous_batching_context_manager(
            generation_config=self._generation_config, continuous_batching_config=self._config, timeout=60.0
        ) as manager:
            start = time.perf_counter()
            for index, (prompt, length) in enumerate(trace):
                manager.add_request(prompt, request_id=str(index), max_new_tokens=length, eos_token_id=-1)
            num_left = len(trace)
            while num_left:
                result = manager.get_result(timeout=CONTINUOUS_RESULT_SECONDS)
                if result is None or result.error is not None:
                    error = "no result" if result is None else result.error
                    raise RuntimeError(f"{self.name}: {error}")
                if result.is_finished():
                    tokens[int(result.request_id)] = list(result.generated_tokens)
                    latencies[int(result.request_id)] = time.perf_counter() - start
                    num_left -= 1
            seconds = time.perf_counter() - start
        return Run(seconds, tokens, latencies)


def as_transformers(loaded: LoadedModel) -> Any:
    """A transformers Llama that uses the very weights of ``loaded``.

    Raises ValueError for a model that is not a plain Llama (stretched positions, biases, norms of queries and keys).
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = loaded.config
    if config.rope.scaling != "none" or config.attention_bias or config.qk_norm or config.sliding_window is not None:
        raise ValueError(f"model {loaded.name!r} is not allowed: the comparison needs a plain Llama")
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_size,
                max_position_embeddings=config.max_position_embeddings,
                rms_norm_eps=config.rms_norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
                tie_word_embeddings=config.tie_word_embeddings,
                bos_token_id=None,
                eos_token_id=None,
                dtype=loaded.decoder.dtype,
            )
        )
    slots = {**loaded.decoder.weight_slots(), "lm_head": loaded.decoder.lm_head}
    state = {name: slots[from_hugging_face(name)] for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # The rotation's frequencies are no weights: they were made on the meta device too, and have to be made again.
    with loaded.decoder.device:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.requires_grad_(False).eval()
