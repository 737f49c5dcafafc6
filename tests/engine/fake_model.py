"""A decoder without weights: the next token is a hash of all tokens before it, read back through the paged cache.

So a block that is shared, lost, overwritten or out of order shows in the tokens. The cache holds token ids.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pagedattn.engine.batch import BatchTensors
from pagedattn.engine.block_manager import BlockTransfers
from pagedattn.engine.config import EngineConfig
from pagedattn.engine.engine import Engine
from pagedattn.engine.monitor import Alert
from pagedattn.engine.swap_space import SwapSpace

EOS = 256
VOCAB_SIZE = 257


def next_token(token_ids: Sequence[int]) -> int:
    """What ``FakeDecoder`` answers; 'z' and the id before it are never followed by EOS, the others sometimes."""
    value = 0
    for token_id in token_ids:
        value = (value * 31 + token_id + 7) % 1_000_003
    return EOS if value % 41 == 0 else 97 + value % 26


def expected_tokens(prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
    """The greedy continuation, by plain arithmetic."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]


class FakeCache:
    """A token id in each slot, on the "device" and in "host memory"; -1 where none was written."""

    windows = (None,)
    null_block = 0

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.slots = torch.full((num_blocks * block_size,), -1, dtype=torch.int64)
        self._blocks = self.slots.view(num_blocks, block_size)
        self._host = torch.full((num_host_blocks, block_size), -1, dtype=torch.int64)

    def transfer(self, transfers: BlockTransfers) -> None:
        for source, host_id in transfers.swap_out:
            self._host[host_id] = self._blocks[source]
        copied = [(self._blocks[source].clone(), destination) for source, destination in transfers.copy]
        for block, destination in copied:
            self._blocks[destination] = block
        for host_id, destination in transfers.swap_in:
            self._blocks[destination] = self._host[host_id]


@dataclass
class FakeDecoder:
    """``before_forward`` is called with each batch and may raise; rows of ``nan_prompts`` get NaN logits."""

    block_size: int
    before_forward: Callable[[BatchTensors], None] | None = None
    nan_prompts: list[list[int]] = field(default_factory=list)

    def forward(self, batch: BatchTensors, cache: FakeCache) -> Tensor:
        if self.before_forward is not None:
            self.before_forward(batch)
        slot_mapping, block_table = batch.slot_mapping[0], batch.block_table[0]
        written = slot_mapping >= 0
        cache.slots[slot_mapping[written]] = batch.input_ids[written]
        logits = torch.zeros(len(batch.logits_indices), VOCAB_SIZE)
        for row, index in enumerate(batch.logits_indices.tolist()):
            sequence = int(torch.searchsorted(batch.query_start_loc, index, right=True)) - 1
            positions = torch.arange(int(batch.seq_lens[sequence]))
            blocks = block_table[sequence].long()[positions // self.block_size]
            token_ids = cache.slots[blocks * self.block_size + positions % self.block_size].tolist()
            logits[row, next_token(token_ids)] = 9.0
            if any(token_ids[: len(prompt)] == prompt for prompt in self.nan_prompts):
                logits[row] = torch.nan
        return logits


class FakeTokenizer:
    """A byte is a token; EOS is not text."""

    eos_token_ids = (EOS,)
    bos_token_id = None
    vocab_size = VOCAB_SIZE

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def token_text(self, token_id: int) -> str:
        return bytes([token_id]).decode(errors="replace") if token_id < EOS else "<eos>"

    def new_stream(self, skip_special_tokens: bool = True) -> FakeStream:
        return FakeStream(skip_special_tokens)


class FakeStream:
    """As ``TextStream`` does, it holds back what ends with U+FFFD, as that may become a character yet."""

    def __init__(self, skip_special_tokens: bool) -> None:
        self._pending = b""
        self._eos_text = b"" if skip_special_tokens else b"<eos>"

    def step(self, token_id: int) -> str | None:
        text = self._add([token_id])
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return None
        self._pending = b""
        return text

    def flush(self, last_ids: Sequence[int] = ()) -> str:
        return self._add(last_ids)

    def _add(self, token_ids: Sequence[int]) -> str:
        self._pending += b"".join(self._eos_text if token_id == EOS else bytes([token_id]) for token_id in token_ids)
        return self._pending.decode(errors="replace")


def fake_engine(
    *,
    decoder: Any = None,
    swap_space: SwapSpace | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_alert: Callable[[Alert], None] | None = None,
    **config: Any,
) -> Engine:
    """An engine on the fake model; ``config`` are fields of ``EngineConfig``."""
    sizes = EngineConfig(**{"num_blocks": 64, "block_size": 4, "max_model_len": 256, **config})
    if decoder is None:
        decoder = FakeDecoder(sizes.block_size)
    if swap_space is None:
        swap_space = SwapSpace()
    cache = FakeCache(sizes.num_blocks, sizes.block_size, swap_space.num_blocks)
    tokenizer: Any = FakeTokenizer()
    return Engine(
        decoder,
        cache,
        tokenizer,
        sizes,
        vocab_size=VOCAB_SIZE,
        swap_space=swap_space,
        clock=clock,
        on_alert=on_alert,
    )


class Clock:
    """A simulated one: each forward pass takes ``step_seconds``, and ``token_seconds`` for each of its tokens."""

    def __init__(self) -> None:
        self.now = 0.0
        self.step_seconds = 0.1
        self.token_seconds = 0.0

    def __call__(self) -> float:
        return self.now

    def engine(self, *, block_size: int = 4, **options: Any) -> Engine:
        """``fake_engine`` on this clock."""

        def pass_time(batch: BatchTensors) -> None:
            self.now += self.step_seconds + self.token_seconds * len(batch.input_ids)

        return fake_engine(decoder=FakeDecoder(block_size, pass_time), clock=self, block_size=block_size, **options)


def run_to_end(engine: Engine, max_steps: int = 10_000) -> dict[str, Any]:
    """The finished outputs by request id, with the integrity checked after every step."""
    finished = {}
    for _ in range(max_steps):
        for output in engine.step().outputs:
            if output.finished:
                finished[output.request_id] = output
        engine.check_integrity()
        if not engine.has_unfinished:
            return finished
    raise AssertionError(f"requests left after {max_steps} steps")
