"""``BatchState``: the running sequences as rows on the device, and what the host knows of them.

A row stays from a sequence's first step to its last: its blocks, lengths, last token and sampling parameters. The
device counts its tokens itself, so a step tells it only what it cannot know: who came, who left, who got a block, who
computes how many tokens. All of that goes over in one copy. Where nobody comes or leaves, that is a few words for each
sequence that begins a block, and nothing for the others.

Rows are dense: when one leaves, the last one takes its place. A sequence that sits a step out keeps its row, with no
tokens. Everything here is ordered by the device's stream: rows may change while the steps before still run.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from pagedattn import batch_ops
from pagedattn.batch_ops import NUM_FIELDS, Field, StepInputs
from pagedattn.engine.batch import BatchTensors
from pagedattn.engine.device_copies import ALIGNMENT, Upload
from pagedattn.engine.prefix_tree import NO_BLOCK
from pagedattn.engine.request import Request
from pagedattn.engine.sampler import MAX_TOP_K, SamplingTensors
from pagedattn.engine.step_plan import StepPlan

WordsT = TypeVar("WordsT", np.ndarray, Tensor)


class Mixture(NamedTuple):
    """What a step that is no decode says on the device: int32, as ``batch_ops.prepare_inputs`` takes it."""

    query_start_loc: Tensor  # [B + 1]
    sample_rows: Tensor  # [L]
    logits_indices: Tensor  # [L], into the tokens
    token_ids: Tensor  # [T]


@dataclass(frozen=True, slots=True)
class StagedStep:
    """A plan whose changes are on their way to the device.

    ``num_rows`` rows have the step's sequences. ``sample_indices``: for each request that gets a token, in the plan's
    order, the number of its sample. ``mixture`` is None in a decode: each row has one token or sits the step out, and
    sample l is row l's. ``padded_size``: the tokens of a mixture, where these are one of ``pad_mixtures``'s sizes.
    """

    num_rows: int
    sample_indices: Sequence[int]
    max_query_len: int
    max_seq_len: int
    mixture: Mixture | None = None
    padded_size: int | None = None

    @property
    def sample_rows(self) -> Tensor | None:
        """The row of each sample; None where it is the sample's own number."""
        return None if self.mixture is None else self.mixture.sample_rows


class BatchState:
    """``max_num_seqs`` rows for sequences of up to ``max_model_len`` tokens; each group of layers has a block table.

    ``null_block`` stands in the tables for blocks that a group's window has left behind: nothing there is seen. Batches
    are said to be ``batch_invariant``, or not to need it.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        num_groups: int,
        null_block: int,
        device: torch.device,
        batch_invariant: bool = False,
    ) -> None:
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.device = device
        self.num_groups = num_groups
        self._null_block = null_block
        self._batch_invariant = batch_invariant
        self._table_width = -(-max_model_len // block_size)
        num_fields = NUM_FIELDS * max_num_seqs
        self._words = torch.zeros(
            num_fields + num_groups * max_num_seqs * self._table_width, dtype=torch.int32, device=device
        )
        self._fields = self._words[:num_fields].view(NUM_FIELDS, max_num_seqs)
        self._block_table = self._words[num_fields:].view(num_groups, max_num_seqs, self._table_width)
        self._decode_inputs = self._allocate_inputs(max_num_seqs, max_num_seqs, max_num_seqs)
        self._decode_starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._decode_indices = torch.arange(max_num_seqs, device=device)
        self._upload = Upload(device)
        self.pad_mixtures(())

        # Requests that want more of their samples than a token: log probabilities, or not to end yet.
        self.special: set[Request] = set()
        self._row_of: dict[Request, int] = {}
        self._requests: list[Request] = []  # by row
        # What the device has, by row: tokens in the cache, tokens of the last step, blocks of each group.
        self._num_computed = np.zeros(max_num_seqs, dtype=np.int64)
        self._query_lens = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self._step_lens = np.zeros(max_num_seqs, dtype=np.int64)  # tokens of the step that is being staged

    @property
    def num_rows(self) -> int:
        return len(self._requests)

    def release(self) -> None:
        """No sequence has a row any more."""
        self.special.clear()
        self._row_of.clear()
        self._requests.clear()
        self._num_computed.fill(0)

    def reset(self) -> None:
        """As at first: no sequence, and zeros on the device."""
        self.release()
        self._words.zero_()
        self._query_lens.fill(0)

    def forget(self) -> None:
        """What the device has is not known any more: all rows will be sent anew."""
        self.release()
        self._query_lens.fill(-1)

    def stage(self, plan: StepPlan) -> StagedStep:
        """Send what the step changes. Every token that it computes must be known, but for those that rows end with."""
        requests, query_lens = plan.requests, plan.query_lens
        assert requests, "an empty plan has no batch"
        moves: list[tuple[int, int]] = []
        indices: list[int] = []
        values: list[int] = []
        rows = self._rows_of(requests)
        if rows is None:
            moves = self._assign_rows(requests, indices, values)
            rows = [self._row_of[request] for request in requests]
        num_rows = len(self._requests)

        step_lens = self._step_lens
        step_lens.fill(0)
        step_lens[rows] = query_lens
        seq_lens = (self._num_computed + step_lens)[:num_rows]
        self._add_blocks(seq_lens, indices, values)
        changed = np.flatnonzero(step_lens != self._query_lens)
        self._query_lens[changed] = step_lens[changed]
        updates = np.empty((2, len(indices) + len(changed)), dtype=np.int32)
        updates[0, : len(indices)], updates[1, : len(indices)] = indices, values
        updates[0, len(indices) :] = changed + Field.QUERY_LEN * self.max_num_seqs
        updates[1, len(indices) :] = step_lens[changed]

        max_query_len, max_seq_len = max(query_lens), int(seq_lens.max())
        is_decode = max_query_len == 1 and not plan.num_padding_tokens and all(plan.needs_sample)
        parts = [np.array(moves, dtype=np.int32).reshape(-1, 2).T, updates]
        num_samples, padded_size = 0, None
        if not is_decode:
            num_tokens = int(step_lens.sum()) + plan.num_padding_tokens
            padded_size = next((size for size in self._padded_sizes if size >= num_tokens), None)
            words, num_samples = self._mixture_words(plan, rows, padded_size or num_tokens)
            parts.append(words)
        mixture: list[Tensor] = []
        if moves or updates.size or not is_decode:
            sent_moves, sent_updates, *mixture = self._upload.send(parts)
            if moves:
                batch_ops.move_rows(self._fields, self._block_table, sent_moves)
            if updates.size:
                batch_ops.update_words(self._words, sent_updates)
        self._num_computed += step_lens
        if is_decode:
            return StagedStep(num_rows, rows, max_query_len, max_seq_len)
        (sent,) = mixture
        if padded_size is not None:  # where a graph looks for it
            sent = self._padded_words[: len(sent)].copy_(sent)
        said = self._as_mixture(sent, num_rows, num_samples)
        return StagedStep(num_rows, range(num_samples), max_query_len, max_seq_len, said, padded_size)

    def prepare(self, staged: StagedStep, max_seq_len: int) -> tuple[BatchTensors, SamplingTensors]:
        """Write the inputs of a step on the device. ``max_seq_len`` bounds the sequences' lengths."""
        if staged.mixture is None:
            return self.prepare_decode(staged.num_rows, max_seq_len)
        mixture = staged.mixture
        inputs = self._allocate_inputs(len(mixture.token_ids), staged.num_rows, len(mixture.sample_rows))
        return self._prepare_mixture(inputs, mixture, staged.max_query_len, max_seq_len)

    def prepare_decode(self, num_rows: int, max_seq_len: int) -> tuple[BatchTensors, SamplingTensors]:
        """Write the inputs of a decode of the first rows, always to the same addresses; rows of nobody are padding."""
        all_inputs = self._decode_inputs
        inputs = StepInputs(*(values[..., :num_rows] for values in all_inputs))
        starts = self._decode_starts[: num_rows + 1]
        self._prepare(inputs, starts, None, None)
        return self._batch(inputs, starts, self._decode_indices[:num_rows], 1, max_seq_len)

    def pad_mixtures(self, sizes: Sequence[int]) -> None:
        """From now on steps that are no decodes have the next of these ascending numbers of tokens, if there is one;
        the rest is padding. What they say is then always at the same addresses."""
        largest = sizes[-1] if sizes else 0
        self._padded_sizes = sizes
        self._padded_words = torch.zeros(self._words_of_mixture(largest), dtype=torch.int32, device=self.device)
        self._padded_inputs = self._allocate_inputs(largest, self.max_num_seqs, self.max_num_seqs)

    @property
    def padded_sample_rows(self) -> Tensor:
        """The row of each sample of ``prepare_padded``, -1 for nobody's."""
        return self._as_mixture(self._padded_words, self.max_num_seqs, self.max_num_seqs).sample_rows

    def prepare_padded(self, size: int, max_seq_len: int) -> tuple[BatchTensors, SamplingTensors]:
        """As ``prepare``, for whatever step of that padded size was staged last, always to the same addresses: all rows
        may have tokens and a sample."""
        largest = self._padded_inputs
        inputs = largest._replace(
            input_ids=largest.input_ids[:size],
            positions=largest.positions[:size],
            slot_mapping=largest.slot_mapping[:, :size],
        )
        words = self._padded_words[: self._words_of_mixture(size)]
        mixture = self._as_mixture(words, self.max_num_seqs, self.max_num_seqs)
        return self._prepare_mixture(inputs, mixture, min(size, max_seq_len), max_seq_len)

    def accept(self, token_ids: Tensor, num_rows: int, sample_rows: Tensor | None = None) -> None:
        """The step ran: ``token_ids`` int64 [L] follow."""
        batch_ops.accept_tokens(self._fields, token_ids, num_rows=num_rows, sample_rows=sample_rows)

    def replace_last(self, rows: Tensor, token_ids: Tensor) -> None:
        """These rows (int64) end with other tokens than were accepted."""
        self._fields[Field.LAST_TOKEN].index_copy_(0, rows, token_ids.int())

    def _rows_of(self, requests: Sequence[Request]) -> list[int] | None:
        """None when a request has no row, or a row no request."""
        if len(requests) != len(self._requests):
            return None
        row_of = self._row_of
        try:
            return [row_of[request] for request in requests]
        except KeyError:
            return None

    def _assign_rows(self, requests: Sequence[Request], indices: list[int], values: list[int]) -> list[tuple[int, int]]:
        """Rows for who came, none for who left; returns which rows move to which."""
        present = set(requests)
        gone = [request for request in self._requests if request not in present and _is_gone(request)]
        self.special.difference_update(gone)
        holes = sorted((self._row_of.pop(request) for request in gone), reverse=True)
        for request in requests:
            if request in self._row_of:
                continue
            if holes:
                row = holes.pop()
                self._requests[row] = request
            else:
                row = len(self._requests)
                self._requests.append(request)
            self._add_row(row, request, indices, values)
        num_rows = len(self._requests) - len(holes)
        sources = [row for row in range(num_rows, len(self._requests)) if row not in holes]
        moves = list(zip(sources, (hole for hole in holes if hole < num_rows), strict=True))
        for source, hole in moves:
            request = self._requests[hole] = self._requests[source]
            self._row_of[request] = hole
            for known in (self._num_computed, self._query_lens, self._num_blocks):
                known[hole] = known[source]
        del self._requests[num_rows:]
        # Rows behind the last one have nothing to compute.
        self._num_computed[len(self._requests) :] = 0
        return moves

    def _add_row(self, row: int, request: Request, indices: list[int], values: list[int]) -> None:
        assert not request.num_pending_tokens, f"{request} gets a row while its last token is not known"
        params = request.params
        if params.logprobs is not None or (params.min_tokens and request.stop_token_ids):
            self.special.add(request)
        self._row_of[request] = row
        self._num_computed[row] = request.num_computed_tokens
        self._num_blocks[row] = 0
        fields = {
            Field.LAST_TOKEN: request.token_ids[-1],
            Field.NUM_COMPUTED: request.num_computed_tokens,
            Field.NUM_DRAWN: request.num_output_tokens,
            Field.SEED_LOW: _signed(request.seed),
            Field.SEED_HIGH: _signed(request.seed >> 32),
            Field.TOP_K: min(params.top_k, MAX_TOP_K),
            Field.TEMPERATURE: _float_bits(0.0 if params.is_greedy else params.temperature),
            Field.TOP_P: _float_bits(params.top_p),
            Field.MIN_P: _float_bits(params.min_p),
        }
        indices.extend(field * self.max_num_seqs + row for field in fields)
        values.extend(fields.values())

    def _add_blocks(self, seq_lens: np.ndarray, indices: list[int], values: list[int]) -> None:
        """Send the blocks of rows that need more than the device has of them."""
        num_needed = -(-seq_lens // self.block_size)
        num_groups = self.num_groups
        for row in np.flatnonzero(num_needed > self._num_blocks[: len(seq_lens)]).tolist():
            block_ids = self._requests[row].block_ids
            first, end = int(self._num_blocks[row]), len(block_ids) // num_groups
            self._num_blocks[row] = end
            for group in range(num_groups):
                base = NUM_FIELDS * self.max_num_seqs + (group * self.max_num_seqs + row) * self._table_width
                indices.extend(range(base + first, base + end))
                new_ids = block_ids[first * num_groups + group :: num_groups]
                values.extend([self._null_block if id_ == NO_BLOCK else id_ for id_ in new_ids])

    def _mixture_words(self, plan: StepPlan, rows: list[int], num_tokens: int) -> tuple[np.ndarray, int]:
        """The words of a ``Mixture`` of ``num_tokens``: where each row's tokens are, the samples' rows and logits,
        which tokens they are (-1: the row's last one); and the number of samples. What is nobody's is -1, or a place
        that exists."""
        words = np.full(self._words_of_mixture(num_tokens), -1, dtype=np.int32)
        starts, sample_rows, logits_indices, token_ids = self._parts_of_mixture(words)
        starts[0] = logits_indices[:] = 0
        np.cumsum(self._step_lens, out=starts[1:])
        sampled = []
        for row, (request, start, count, needs_sample) in zip(rows, plan.rows(), strict=True):
            if needs_sample:
                sampled.append(row)
            if count > 1 or not needs_sample:
                token_ids[starts[row] : starts[row] + count] = request.token_ids[start : start + count]
        sample_rows[: len(sampled)] = sampled
        logits_indices[: len(sampled)] = starts[sample_rows[: len(sampled)] + 1] - 1
        return words, len(sampled)

    def _words_of_mixture(self, num_tokens: int) -> int:
        """Words that a ``Mixture`` takes: each part for all rows there may be, so that its place does not change."""
        return 3 * self._part_words + num_tokens

    @property
    def _part_words(self) -> int:
        return -(-(self.max_num_seqs + 1) // ALIGNMENT) * ALIGNMENT

    def _parts_of_mixture(self, words: WordsT) -> tuple[WordsT, WordsT, WordsT, WordsT]:
        num_rows, part = self.max_num_seqs, self._part_words
        return (
            words[: num_rows + 1],
            words[part : part + num_rows],
            words[2 * part : 2 * part + num_rows],
            words[3 * part :],
        )

    def _as_mixture(self, words: Tensor, num_rows: int, num_samples: int) -> Mixture:
        starts, sample_rows, logits_indices, token_ids = self._parts_of_mixture(words)
        return Mixture(starts[: num_rows + 1], sample_rows[:num_samples], logits_indices[:num_samples], token_ids)

    def _allocate_inputs(self, num_tokens: int, num_rows: int, num_samples: int) -> StepInputs:
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        return StepInputs(
            input_ids=empty(num_tokens, dtype=torch.int64),
            positions=empty(num_tokens, dtype=torch.int64),
            slot_mapping=empty(self.num_groups, num_tokens, dtype=torch.int64),
            seq_lens=empty(num_rows, dtype=torch.int32),
            temperature=empty(num_samples, dtype=torch.float32),
            top_k=empty(num_samples, dtype=torch.int32),
            top_p=empty(num_samples, dtype=torch.float32),
            min_p=empty(num_samples, dtype=torch.float32),
            seed=empty(num_samples, dtype=torch.int64),
            position=empty(num_samples, dtype=torch.int64),
        )

    def _prepare(
        self, inputs: StepInputs, query_start_loc: Tensor, token_ids: Tensor | None, sample_rows: Tensor | None
    ) -> None:
        batch_ops.prepare_inputs(
            self._fields,
            self._block_table,
            query_start_loc,
            inputs,
            block_size=self.block_size,
            token_ids=token_ids,
            sample_rows=sample_rows,
        )

    def _prepare_mixture(
        self, inputs: StepInputs, mixture: Mixture, max_query_len: int, max_seq_len: int
    ) -> tuple[BatchTensors, SamplingTensors]:
        self._prepare(inputs, mixture.query_start_loc, mixture.token_ids, mixture.sample_rows)
        indices = mixture.logits_indices.long()
        return self._batch(inputs, mixture.query_start_loc, indices, max_query_len, max_seq_len)

    def _batch(
        self,
        inputs: StepInputs,
        query_start_loc: Tensor,
        logits_indices: Tensor,
        max_query_len: int,
        max_seq_len: int,
    ) -> tuple[BatchTensors, SamplingTensors]:
        batch = BatchTensors(
            input_ids=inputs.input_ids,
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            block_table=self._block_table[:, : len(inputs.seq_lens)],
            seq_lens=inputs.seq_lens,
            query_start_loc=query_start_loc,
            logits_indices=logits_indices,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            batch_invariant=self._batch_invariant,
        )
        return batch, SamplingTensors(*inputs[4:])

    def check_integrity(self) -> None:
        """The device has what the requests say, as far as it is known. Raises AssertionError. It synchronizes."""
        assert {row: request for request, row in self._row_of.items()} == dict(enumerate(self._requests))
        fields, tables = self._fields.tolist(), self._block_table.tolist()
        for row, count in enumerate(self._query_lens.tolist()):
            assert count in (-1, fields[Field.QUERY_LEN][row]), f"row {row} has other tokens than it is said to have"
        for row, request in enumerate(self._requests):
            if _is_gone(request):
                continue
            assert fields[Field.NUM_COMPUTED][row] == request.num_computed_tokens, f"{request}: tokens are miscounted"
            assert fields[Field.NUM_DRAWN][row] == request.num_output_tokens, f"{request}: samples are miscounted"
            if not request.num_pending_tokens and request.num_uncomputed_tokens == 1:
                assert fields[Field.LAST_TOKEN][row] == request.token_ids[-1], f"{request} ends with another token"
            for group in range(self.num_groups):
                held = request.block_ids[group :: self.num_groups][: int(self._num_blocks[row])]
                for block_id, known in zip(held, tables[group][row], strict=False):
                    assert block_id in (NO_BLOCK, known), f"{request} has another block"


def _is_gone(request: Request) -> bool:
    """Whether it needs no row: it has ended, lost its blocks, or only its last token is to come."""
    return request.finished_time is not None or not request.block_ids or request.num_uncomputed_tokens == 0


def _signed(bits: int) -> int:
    """The int32 with these low 32 bits."""
    return (bits + 2**31) % 2**32 - 2**31


def _float_bits(value: float) -> int:
    """The int32 with the bits of this fp32."""
    return int(struct.unpack("i", struct.pack("f", value))[0])
