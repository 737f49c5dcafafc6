"""The ops alone, inside a decode loop of your own: no engine, no model files.

A two-layer decoder with random weights, written in plain torch, keeps its keys and values in a paged cache with
``pagedattn.append_kv`` and attends with ``pagedattn.paged_attention``. Three sequences of different lengths run in one
batch: first their prompts in one step, then a token each a step, taking blocks from a pool as they grow. At the end
every sequence is computed again with dense attention over all of its tokens, and the tokens must be the same.

    python examples/custom_decode_loop.py
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

import pagedattn

VOCABULARY, HIDDEN, LAYERS = 97, 64, 2
HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 16
BLOCK_SIZE, NUM_BLOCKS = 4, 64


class Layer:
    """One decoder layer without rotary embeddings: attention, then a gated linear unit."""

    def __init__(self, device: torch.device) -> None:
        def weight(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns) * columns**-0.5).to(device)

        self.qkv = weight((HEADS + 2 * KV_HEADS) * HEAD_SIZE, HIDDEN)
        self.output = weight(HIDDEN, HEADS * HEAD_SIZE)
        self.gate, self.up, self.down = weight(128, HIDDEN), weight(128, HIDDEN), weight(HIDDEN, 128)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, HIDDEN] to query [T, HEADS, HEAD_SIZE], key and value [T, KV_HEADS, HEAD_SIZE]."""
        heads = functional.linear(functional.rms_norm(hidden, (HIDDEN,)), self.qkv).view(len(hidden), -1, HEAD_SIZE)
        query, key, value = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        return query.contiguous(), key.contiguous(), value.contiguous()

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + functional.linear(attended.flatten(1), self.output)
        normed = functional.rms_norm(hidden, (HIDDEN,))
        gated = functional.silu(functional.linear(normed, self.gate)) * functional.linear(normed, self.up)
        return hidden + functional.linear(gated, self.down)


class PagedDecoder:
    """The decoder, its cache, and which blocks belong to which sequence."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.embedding = torch.randn(VOCABULARY, HIDDEN).to(device)
        self.head = torch.randn(VOCABULARY, HIDDEN).to(device)
        self.layers = [Layer(device) for _ in range(LAYERS)]
        shape = (LAYERS, 2, NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_SIZE)
        # NaN in what was never written: a wrong slot would show.
        self.cache = torch.full(shape, torch.nan, device=device)
        self.free_blocks = list(range(NUM_BLOCKS))
        self.blocks: list[list[int]] = []

    def step(self, new_tokens: list[list[int]], num_cached: list[int]) -> list[int]:
        """Computes the new tokens of every sequence in one batch; returns the likeliest next token of each."""
        seq_lens = [cached + len(tokens) for cached, tokens in zip(num_cached, new_tokens, strict=True)]
        slots: list[int] = []
        for blocks, cached, length in zip(self.blocks, num_cached, seq_lens, strict=True):
            while len(blocks) * BLOCK_SIZE < length:
                blocks.append(self.free_blocks.pop())
            slots += [blocks[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(cached, length)]
        width = max(len(blocks) for blocks in self.blocks)
        block_table = self._int32([blocks + [0] * (width - len(blocks)) for blocks in self.blocks])
        starts = torch.tensor([0, *(len(tokens) for tokens in new_tokens)]).cumsum(0)
        lengths, query_start_loc = self._int32(seq_lens), self._int32(starts.tolist())
        slot_mapping = torch.tensor(slots, device=self.device)
        max_query_len = max(len(tokens) for tokens in new_tokens)
        plan = pagedattn.plan_attention(  # once a step, shared by all layers
            lengths,
            query_start_loc,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_size=HEAD_SIZE,
            block_size=BLOCK_SIZE,
            max_query_len=max_query_len,
            max_seq_len=max(seq_lens),
        )
        hidden = self.embedding[torch.tensor([token for tokens in new_tokens for token in tokens], device=self.device)]
        for layer, (key_cache, value_cache) in zip(self.layers, self.cache, strict=True):
            query, key, value = layer.project(hidden)
            pagedattn.append_kv(key, value, key_cache, value_cache, slot_mapping)
            attended = pagedattn.paged_attention(
                query,
                key_cache,
                value_cache,
                block_table,
                lengths,
                query_start_loc,
                max_query_len=max_query_len,
                max_seq_len=max(seq_lens),
                plan=plan,
            )
            hidden = layer.finish(hidden, attended)
        logits = functional.linear(hidden[query_start_loc[1:].long() - 1], self.head)
        return logits.argmax(-1).tolist()

    def dense_next_token(self, tokens: list[int]) -> int:
        """The same for one whole sequence, with torch's attention and no cache."""
        hidden = self.embedding[torch.tensor(tokens, device=self.device)]
        for layer in self.layers:
            query, key, value = (heads.transpose(0, 1) for heads in layer.project(hidden))
            attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            hidden = layer.finish(hidden, attended.transpose(0, 1))
        return int(functional.linear(hidden[-1], self.head).argmax())

    def _int32(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    decoder = PagedDecoder(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    prompts = [[5, 17, 3], list(range(1, 20)), [42]]
    sequences = [list(prompt) for prompt in prompts]
    decoder.blocks = [[] for _ in sequences]

    num_cached = [0] * len(sequences)
    for _ in range(24):
        new_tokens = [tokens[cached:] for tokens, cached in zip(sequences, num_cached, strict=True)]
        next_tokens = decoder.step(new_tokens, num_cached)
        num_cached = [len(tokens) for tokens in sequences]
        for tokens, token in zip(sequences, next_tokens, strict=True):
            tokens.append(token)

    for prompt, tokens in zip(prompts, sequences, strict=True):
        for position in range(len(prompt), len(tokens)):
            expected = decoder.dense_next_token(tokens[:position])
            if tokens[position] != expected:
                raise SystemExit(f"position {position}: paged attention said {tokens[position]}, dense {expected}")
        print(f"{len(prompt)} prompt tokens, then {tokens[len(prompt) :]}")
    num_used = NUM_BLOCKS - len(decoder.free_blocks)
    print(f"the same tokens as dense attention; {num_used} blocks for {sum(map(len, sequences))} tokens")


if __name__ == "__main__":
    main()
