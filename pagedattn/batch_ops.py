"""The ops that keep a batch's state on the device from step to step: rows of numbers and blocks, changed in place.

They go by the rules of ``pagedattn.ops``: CPU tensors go to the torch reference, CUDA tensors to the Triton kernels
(with ``TRITON_INTERPRET=1`` CPU tensors too), and none synchronizes. ``prepare_inputs`` and ``accept_tokens`` can be
captured in a CUDA graph. What a row holds: ``kernels/batch_state_reference.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pagedattn.checks import check_index, fail, require_int
from pagedattn.kernels import batch_state_reference
from pagedattn.kernels.batch_state_reference import NUM_FIELDS as NUM_FIELDS  # what makes a state
from pagedattn.kernels.batch_state_reference import Field as Field
from pagedattn.kernels.batch_state_reference import StepInputs as StepInputs
from pagedattn.ops import fake_of_mutation, register, uses_triton


def _kernels(tensor: Tensor) -> Any:
    if uses_triton(tensor):
        from pagedattn.kernels import batch_state

        return batch_state
    return batch_state_reference


def _check_pairs(name: str, pairs: Tensor, device: torch.device) -> None:
    check_index(name, pairs, torch.int32, 2, device, 2)
    if not pairs.is_contiguous():
        fail(name, pairs, "contiguous")


def _check_state(fields: Tensor, block_table: Tensor | None = None) -> None:
    check_index("fields", fields, torch.int32, 2, fields.device, NUM_FIELDS)
    if not fields.is_contiguous():
        fail("fields", fields, "contiguous")
    if block_table is None:
        return
    is_table = block_table.dtype == torch.int32 and block_table.ndim == 3 and block_table.is_contiguous()
    if not is_table or block_table.shape[1] != fields.shape[1] or block_table.device != fields.device:
        fail("block_table", block_table, f"int32 [G, {fields.shape[1]}, W], contiguous, on {fields.device}")


def _check_update(words: Tensor, updates: Tensor) -> None:
    check_index("words", words, torch.int32, 1, words.device)
    _check_pairs("updates", updates, words.device)


def _check_move(fields: Tensor, block_table: Tensor, moves: Tensor) -> None:
    _check_state(fields, block_table)
    _check_pairs("moves", moves, fields.device)


def _check_prepare(
    fields: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    token_ids: Tensor | None,
    sample_rows: Tensor | None,
    *rest: Any,
) -> None:
    _check_state(fields, block_table)
    inputs, device = StepInputs(*rest[:-1]), fields.device
    num_rows, num_tokens, num_samples = inputs.seq_lens.shape[0], inputs.input_ids.shape[0], inputs.top_k.shape[0]
    if num_rows > fields.shape[1] or num_samples > num_rows:
        fail("seq_lens", inputs.seq_lens, f"of at least {num_samples} and at most {fields.shape[1]} rows")
    check_index("query_start_loc", query_start_loc, torch.int32, 1, device, num_rows + 1)
    if token_ids is not None:
        check_index("token_ids", token_ids, torch.int32, 1, device, num_tokens)
    elif num_tokens != num_rows:
        fail("token_ids", token_ids, "given, unless each row has a token")
    if sample_rows is not None:
        check_index("sample_rows", sample_rows, torch.int32, 1, device, num_samples)
    for name, dtype, size in (
        ("input_ids", torch.int64, num_tokens),
        ("positions", torch.int64, num_tokens),
        ("seq_lens", torch.int32, num_rows),
        ("temperature", torch.float32, num_samples),
        ("top_k", torch.int32, num_samples),
        ("top_p", torch.float32, num_samples),
        ("min_p", torch.float32, num_samples),
        ("seed", torch.int64, num_samples),
        ("position", torch.int64, num_samples),
    ):
        check_index(name, getattr(inputs, name), dtype, 1, device, size)
    check_index("slot_mapping", inputs.slot_mapping, torch.int64, 2, device, block_table.shape[0])
    if inputs.slot_mapping.shape[1] != num_tokens:
        fail("slot_mapping", inputs.slot_mapping, f"[{block_table.shape[0]}, {num_tokens}]")


def _check_accept(fields: Tensor, token_ids: Tensor, sample_rows: Tensor | None, num_rows: int) -> None:
    _check_state(fields)
    check_index("token_ids", token_ids, torch.int64, 1, fields.device)
    if sample_rows is not None:
        check_index("sample_rows", sample_rows, torch.int32, 1, fields.device, token_ids.shape[0])
    if not token_ids.shape[0] <= num_rows <= fields.shape[1]:
        fail("num_rows", num_rows, f"from {token_ids.shape[0]} to {fields.shape[1]}")


def _update_words(words: Tensor, updates: Tensor) -> None:
    _check_update(words, updates)
    if updates.shape[1]:
        _kernels(words).update_words(words, updates)


def _move_rows(fields: Tensor, block_table: Tensor, moves: Tensor) -> None:
    _check_move(fields, block_table, moves)
    if moves.shape[1]:
        _kernels(fields).move_rows(fields, block_table, moves)


def _prepare_inputs(*arguments: Any) -> None:
    _check_prepare(*arguments)
    fields, block_table, query_start_loc, token_ids, sample_rows, *inputs, block_size = arguments
    _kernels(fields).prepare_inputs(
        fields, block_table, query_start_loc, token_ids, sample_rows, StepInputs(*inputs), block_size=block_size
    )


def _accept_tokens(fields: Tensor, token_ids: Tensor, sample_rows: Tensor | None, num_rows: int) -> None:
    _check_accept(fields, token_ids, sample_rows, num_rows)
    _kernels(fields).accept_tokens(fields, token_ids, sample_rows, num_rows=num_rows)


register("update_words", "(Tensor(a!) words, Tensor updates) -> ()", _update_words, fake_of_mutation(_check_update))
register(
    "move_rows",
    "(Tensor(a!) fields, Tensor(b!) block_table, Tensor moves) -> ()",
    _move_rows,
    fake_of_mutation(_check_move),
)
register(
    "prepare_inputs",
    "(Tensor fields, Tensor block_table, Tensor query_start_loc, Tensor? token_ids, Tensor? sample_rows, "
    "Tensor(a!) input_ids, Tensor(b!) positions, Tensor(c!) slot_mapping, Tensor(d!) seq_lens, "
    "Tensor(e!) temperature, Tensor(f!) top_k, Tensor(g!) top_p, Tensor(h!) min_p, Tensor(i!) seed, "
    "Tensor(j!) position, SymInt block_size) -> ()",
    _prepare_inputs,
    fake_of_mutation(_check_prepare),
)
register(
    "accept_tokens",
    "(Tensor(a!) fields, Tensor token_ids, Tensor? sample_rows, SymInt num_rows) -> ()",
    _accept_tokens,
    fake_of_mutation(_check_accept),
)


# --- what people call -------------------------------------------------------------------------------------------------


def update_words(words: Tensor, updates: Tensor) -> None:
    """``words[updates[0]] = updates[1]``, in one launch.

    Args:
        words: int32 [N].
        updates: int32 [2, P], no index twice.

    Raises:
        ValueError: naming the argument, what it is and what it must be.
    """
    torch.ops.pagedattn.update_words.default(words, updates)


def move_rows(fields: Tensor, block_table: Tensor, moves: Tensor) -> None:
    """Copy whole rows of the state.

    Args:
        fields: int32 [NUM_FIELDS, R].
        block_table: int32 [G, R, W].
        moves: int32 [2, M]: from the first to the second; no row is in both.

    Raises:
        ValueError: naming the argument, what it is and what it must be.
    """
    torch.ops.pagedattn.move_rows.default(fields, block_table, moves)


def prepare_inputs(
    fields: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    inputs: StepInputs,
    *,
    block_size: int,
    token_ids: Tensor | None = None,
    sample_rows: Tensor | None = None,
) -> None:
    """Write a step's inputs from rows 0 to B - 1 of the state, where B is the length of ``inputs.seq_lens``.

    Args:
        fields, block_table: the state, as in ``move_rows``.
        query_start_loc: int32 [B + 1], where each row's tokens are; tokens behind them are padding.
        inputs: what is written; its shapes say how many tokens and samples there are.
        block_size: token slots in a block.
        token_ids: int32 [T], -1 where it is the row's last token; None: each row has one token, and it is that.
        sample_rows: int32 [L], the rows that samples are for, -1 for nobody's; None: row l for sample l.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    require_int("block_size", block_size, minimum=1)
    torch.ops.pagedattn.prepare_inputs.default(
        fields, block_table, query_start_loc, token_ids, sample_rows, *inputs, block_size
    )


def accept_tokens(fields: Tensor, token_ids: Tensor, *, num_rows: int, sample_rows: Tensor | None = None) -> None:
    """The step of rows 0 to ``num_rows`` - 1 ran: its tokens are computed, and what was sampled follows them.

    Args:
        fields: int32 [NUM_FIELDS, R].
        token_ids: int64 [L], -1 where none could be sampled.
        num_rows: the step's.
        sample_rows: as in ``prepare_inputs``.

    Raises:
        ValueError: naming the argument, what it is and what it must be.
    """
    torch.ops.pagedattn.accept_tokens.default(fields, token_ids, sample_rows, num_rows)
