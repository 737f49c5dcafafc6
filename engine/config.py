"""``EngineConfig``: the sizes, the policy and the order of one engine, validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pagedattn.engine.degradation import Rung, SmallerChunks
from pagedattn.engine.kv_cache import KV_CACHE_DTYPES
from pagedattn.engine.monitor import AlertRule
from pagedattn.engine.orders import QueueOrder, resolve_order
from pagedattn.engine.policy import BatchingPolicy, resolve_policy


@dataclass(frozen=True)
class EngineConfig:
    """``num_blocks`` blocks of ``block_size`` token slots; at most ``max_num_seqs`` requests run together, and
    ``max_num_batched_tokens`` tokens are computed in a step; prompt and generation together have at most
    ``max_model_len`` tokens. ``enable_prefix_caching``: requests share the blocks of equal beginnings.
    ``swap_space``: GiB of host memory for the blocks of preempted requests. ``policy``: a row of ``POLICIES`` by name,
    or a ``BatchingPolicy``. ``order``: who joins first, a row of ``ORDERS`` by name, or a ``QueueOrder``. ``seed`` is
    where requests without one get theirs from. ``max_waiting_requests``, ``max_waiting_tokens``: at most so many
    sequences, and tokens of them, wait for a place (docs/operation.md); None is no bound. ``log_interval``: seconds
    between two lines of the log, None for none. ``alerts``: what is looked at every ``check_interval`` seconds.
    ``degradation``: what is given up under pressure, the first rung first. ``async_scheduling``: a step is launched
    before the tokens of the one before it are known (docs/decode-loop.md). ``enforce_eager``: no CUDA graphs.
    ``batch_invariant``: a request's bits do not depend on the steps that it shares with others (docs/decode-loop.md).
    ``kv_cache_dtype``: what keys and values are stored as, a row of ``KV_CACHE_DTYPES`` by name.
    """

    num_blocks: int
    max_model_len: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    swap_space: float = 0.0
    policy: str | BatchingPolicy = "default"
    order: str | QueueOrder = "fcfs"
    seed: int = 0
    max_waiting_requests: int | None = None
    max_waiting_tokens: int | None = None
    log_interval: float | None = None
    check_interval: float = 1.0
    alerts: tuple[AlertRule, ...] = ()
    degradation: tuple[Rung, ...] = ()
    async_scheduling: bool = False
    enforce_eager: bool = False
    batch_invariant: bool = False
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("num_blocks", "max_model_len", "block_size", "max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not allowed: it must be an int >= 1")
        for name in ("enable_prefix_caching", "async_scheduling", "enforce_eager", "batch_invariant"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: True or False")
        if not isinstance(self.swap_space, int | float) or not 0.0 <= self.swap_space < float("inf"):
            raise ValueError(f"swap_space={self.swap_space!r} is not allowed: it must be a finite number of GiB >= 0")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r} is not allowed: it must be an int")
        for name in ("max_waiting_requests", "max_waiting_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} is not allowed: it must be an int >= 1 or None")
        for name, is_optional in (("log_interval", True), ("check_interval", False)):
            value = getattr(self, name)
            if value is None and is_optional:
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not (math.isfinite(value) and value > 0):
                allowed = "a finite number of seconds > 0" + (" or None" if is_optional else "")
                raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}")
        if not isinstance(self.alerts, tuple) or not all(isinstance(rule, AlertRule) for rule in self.alerts):
            raise ValueError(f"alerts={self.alerts!r} is not allowed: it must be a tuple of AlertRule")
        if not isinstance(self.kv_cache_dtype, str) or self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ValueError(
                f"kv_cache_dtype={self.kv_cache_dtype!r} is not allowed: it must be one of {', '.join(KV_CACHE_DTYPES)}"
            )
        resolve_order(self.order)
        self._check_degradation(resolve_policy(self.policy))

    def _check_degradation(self, policy: BatchingPolicy) -> None:
        if not isinstance(self.degradation, tuple) or not all(isinstance(rung, Rung) for rung in self.degradation):
            raise ValueError(f"degradation={self.degradation!r} is not allowed: it must be a tuple of Rung")
        names = [rung.name for rung in self.degradation]
        if len(set(names)) < len(names):
            raise ValueError(f"degradation has the names {names}: each must be there once")
        if policy.is_whole and any(isinstance(rung.action, SmallerChunks) for rung in self.degradation):
            raise ValueError(f"SmallerChunks is not allowed with policy={self.policy!r}, which does not cut prompts")
