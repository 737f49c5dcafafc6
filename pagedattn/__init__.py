"""Paged attention for PyTorch: block-table attention and KV append as torch ops, and a small engine on top of them.

    import pagedattn

    pagedattn.paged_attention(query, key_cache, value_cache, block_table, seq_lens, query_start_loc, max_query_len=1)

    llm = pagedattn.LLM("smollm2-135m-instruct")
    llm.generate(["The capital of France is"], pagedattn.SamplingParams(temperature=0.0, max_tokens=16))

Importing this loads torch and the op definitions; kernels and the engine load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pagedattn._version import __version__
from pagedattn.cascade import shared_prefix_attention
from pagedattn.ops import (
    AttentionPlan,
    append_kv,
    copy_blocks,
    gather_kv,
    merge_attention_states,
    paged_attention,
    plan_attention,
    rope_append_kv,
)

if TYPE_CHECKING:
    from pagedattn.engine.beam_search import BeamSearchParams
    from pagedattn.engine.llm import LLM
    from pagedattn.engine.outputs import RequestOutput
    from pagedattn.engine.sampling_params import SamplingParams
    from pagedattn.engine.scheduling_params import SchedulingParams

__all__ = [
    "LLM",
    "AttentionPlan",
    "BeamSearchParams",
    "RequestOutput",
    "SamplingParams",
    "SchedulingParams",
    "__version__",
    "append_kv",
    "copy_blocks",
    "gather_kv",
    "merge_attention_states",
    "paged_attention",
    "plan_attention",
    "rope_append_kv",
    "shared_prefix_attention",
]

_LAZY = {
    "BeamSearchParams": "pagedattn.engine.beam_search",
    "LLM": "pagedattn.engine.llm",
    "RequestOutput": "pagedattn.engine.outputs",
    "SamplingParams": "pagedattn.engine.sampling_params",
    "SchedulingParams": "pagedattn.engine.scheduling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pagedattn' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
