"""The ops around a decoder's matrix products and attention: norms, the gated activation, sampling.

They go by the rules of ``pagedattn.ops``: CPU tensors go to the torch reference, CUDA tensors to the Triton kernels
(with ``TRITON_INTERPRET=1`` CPU tensors too); checks read metadata alone and raise ValueError or TypeError naming the
argument. None synchronizes, and what is launched follows from shapes, strides and dtypes alone, so that all can be
captured in a CUDA graph. Every op is also ``torch.ops.pagedattn.<name>``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pagedattn.checks import (
    FLOAT_DTYPES,
    check_dense,
    check_index,
    check_rows,
    fail,
    require_bool,
    require_tensor,
)
from pagedattn.kernels import invariant_linear_reference, layers_reference, sampling_reference
from pagedattn.kernels.sampling_reference import as_int64 as as_int64  # what makes the bits of seeds
from pagedattn.kernels.sampling_reference import derive_seed as derive_seed
from pagedattn.ops import fake_of_mutation, register, uses_triton

MAX_NORM_SIZE = 32768  # a row is held in the registers of one thread block


def _check_matrix(name: str, given: Tensor, columns: Any = None) -> None:
    """[rows, columns] of a float dtype, dense in its last dimension."""
    if given.ndim != 2 or (columns is not None and given.shape[1] != columns):
        fail(name, given, f"[T, {'columns' if columns is None else columns}]")
    if given.dtype not in FLOAT_DTYPES:
        fail(name, given, "fp16, bf16 or fp32")
    check_dense(name, given)


def _check_weight(name: str, weight: Tensor, like: Tensor) -> None:
    size = like.shape[-1]
    fits = weight.shape == (size,) and weight.dtype == like.dtype and weight.device == like.device
    if not fits:
        fail(name, weight, f"{like.dtype} [{size}] on {like.device}".replace("torch.", ""))
    if size > MAX_NORM_SIZE:
        fail(name, weight, f"of at most {MAX_NORM_SIZE} elements")
    check_dense(name, weight)


def _check_norm(values: Tensor, weight: Tensor, eps: float) -> None:
    _check_matrix("values", values)
    _check_weight("weight", weight, values)


def _check_add_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    _check_matrix("residual", residual)
    fits = hidden.shape == residual.shape and hidden.dtype == residual.dtype and hidden.device == residual.device
    if not fits:
        fail("hidden", hidden, f"{residual.dtype} {list(residual.shape)} on {residual.device} like residual")
    check_dense("hidden", hidden)
    _check_weight("weight", weight, residual)


def _check_query_key_norm(query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float) -> None:
    check_rows("query", query, query.device, FLOAT_DTYPES)
    check_rows("key", key, query.device, (query.dtype,), tokens=query.shape[0])
    if key.shape[2] != query.shape[2]:
        fail("key", key, f"of head size {query.shape[2]} like query")
    _check_weight("query_weight", query_weight, query)
    _check_weight("key_weight", key_weight, key)


def _check_silu_and_mul(gate_up: Tensor) -> None:
    _check_matrix("gate_up", gate_up)
    if gate_up.shape[1] % 2:
        fail("gate_up", gate_up, "of an even number of columns")


def _check_linear(name: str, values: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_matrix(name, values)
    fits = weight.ndim == 2 and weight.shape[1] == values.shape[1] and weight.dtype == values.dtype
    if not fits or weight.device != values.device or not weight.is_contiguous():
        fail("weight", weight, f"contiguous {values.dtype} [N, {values.shape[1]}] on {values.device} like {name}")
    if bias is not None:
        fits = bias.shape == (weight.shape[0],) and bias.dtype == values.dtype and bias.device == values.device
        if not fits:
            fail("bias", bias, f"{values.dtype} [{weight.shape[0]}] on {values.device} like weight")
        check_dense("bias", bias)


def _check_norm_linear(
    values: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None, gated: bool
) -> None:
    _check_linear("values", values, weight, bias)
    _check_weight("norm_weight", norm_weight, values)
    if gated and (weight.shape[0] % 2 or bias is not None):
        fail("gated", gated, "False for a weight of an odd number of rows, or with a bias")


def _check_add_linear(
    residual: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool = False
) -> None:
    _check_linear("values", values, weight, bias)
    _check_matrix("residual", residual, columns=weight.shape[0])
    fits = residual.shape[0] == values.shape[0] and residual.dtype == values.dtype and residual.device == values.device
    if not fits:
        fail("residual", residual, f"{values.dtype} [{values.shape[0]}, {weight.shape[0]}] on {values.device}")


def _check_sampling(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> None:
    _check_matrix("logits", logits)
    if not logits.shape[1]:
        fail("logits", logits, "of at least one column")
    rows, device = logits.shape[0], logits.device
    for name, given, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("seed", seed, torch.int64),
        ("position", position, torch.int64),
    ):
        check_index(name, given, dtype, 1, device, rows)


def _layers(tensor: Tensor) -> Any:
    """The module whose functions compute on a tensor like this one."""
    if not uses_triton(tensor):
        return layers_reference
    from pagedattn.kernels import layers

    return layers


def _rms_norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check_norm(values, weight, eps)
    return _layers(values).rms_norm(values, weight, eps)


def _rms_norm_fake(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check_norm(values, weight, eps)
    return values.new_empty(values.shape)


def _add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check_add_norm(hidden, residual, weight, eps)
    return _layers(residual).add_rms_norm(hidden, residual, weight, eps)


def _add_rms_norm_fake(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check_add_norm(hidden, residual, weight, eps)
    return residual.new_empty(residual.shape)


def _query_key_norm(query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float) -> None:
    _check_query_key_norm(query, key, query_weight, key_weight, eps)
    _layers(query).query_key_norm(query, key, query_weight, key_weight, eps)


def _silu_and_mul(gate_up: Tensor) -> Tensor:
    _check_silu_and_mul(gate_up)
    return _layers(gate_up).silu_and_mul(gate_up)


def _silu_and_mul_fake(gate_up: Tensor) -> Tensor:
    _check_silu_and_mul(gate_up)
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


def _linear(tensor: Tensor, batch_invariant: bool) -> Any:
    """As ``_layers``, for products."""
    if not uses_triton(tensor):
        return invariant_linear_reference if batch_invariant else layers_reference
    from pagedattn.kernels import invariant_linear, linear

    return invariant_linear if batch_invariant else linear


def _norm_linear(
    values: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    gated: bool,
    batch_invariant: bool = False,
) -> Tensor:
    _check_norm_linear(values, norm_weight, eps, weight, bias, gated)
    return _linear(values, batch_invariant).norm_linear(values, norm_weight, eps, weight, bias, gated)


def _norm_linear_fake(
    values: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    gated: bool,
    batch_invariant: bool = False,
) -> Tensor:
    _check_norm_linear(values, norm_weight, eps, weight, bias, gated)
    return values.new_empty((values.shape[0], weight.shape[0] // (2 if gated else 1)))


def _add_linear(
    residual: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool = False
) -> None:
    _check_add_linear(residual, values, weight, bias, batch_invariant)
    _linear(values, batch_invariant).add_linear(residual, values, weight, bias)


def _sample_tokens(*args: Tensor) -> Tensor:
    _check_sampling(*args)
    if not uses_triton(args[0]):
        return sampling_reference.sample_tokens(*args)
    from pagedattn.kernels import sampling

    return sampling.sample_tokens(*args)


def _sample_tokens_fake(*args: Tensor) -> Tensor:
    _check_sampling(*args)
    logits = args[0]
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


register("rms_norm", "(Tensor values, Tensor weight, float eps) -> Tensor", _rms_norm, _rms_norm_fake)
register(
    "add_rms_norm",
    "(Tensor hidden, Tensor(a!) residual, Tensor weight, float eps) -> Tensor",
    _add_rms_norm,
    _add_rms_norm_fake,
)
register(
    "query_key_norm",
    "(Tensor(a!) query, Tensor(b!) key, Tensor query_weight, Tensor key_weight, float eps) -> ()",
    _query_key_norm,
    fake_of_mutation(_check_query_key_norm),
)
register("silu_and_mul", "(Tensor gate_up) -> Tensor", _silu_and_mul, _silu_and_mul_fake)
register(
    "norm_linear",
    "(Tensor values, Tensor norm_weight, float eps, Tensor weight, Tensor? bias, bool gated, "
    "bool batch_invariant=False) -> Tensor",
    _norm_linear,
    _norm_linear_fake,
)
register(
    "add_linear",
    "(Tensor(a!) residual, Tensor values, Tensor weight, Tensor? bias, bool batch_invariant=False) -> ()",
    _add_linear,
    fake_of_mutation(_check_add_linear),
)
register(
    "sample_tokens",
    "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor position) "
    "-> Tensor",
    _sample_tokens,
    _sample_tokens_fake,
)


# --- what people call -------------------------------------------------------------------------------------------------


def _require_tensors(**given: object) -> None:
    for name, tensor in given.items():
        require_tensor(name, tensor)


def rms_norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm of each row (Zhang and Sennrich, 2019): values / sqrt(mean(values**2) + eps) * weight.

    Args:
        values: [T, H] fp16, bf16 or fp32; sums are fp32.
        weight: [H], the dtype of values.
        eps: added to the mean.

    Returns:
        [T, H].

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _require_tensors(values=values, weight=weight)
    return torch.ops.pagedattn.rms_norm.default(values, weight, eps)


def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add ``hidden`` to the residual stream in place, and return its norm.

    Args:
        hidden: [T, H] fp16, bf16 or fp32.
        residual: [T, H], written in place; the norm is that of what it holds then, rounded to its dtype.
        weight, eps: as in ``rms_norm``.

    Returns:
        [T, H].

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _require_tensors(hidden=hidden, residual=residual, weight=weight)
    return torch.ops.pagedattn.add_rms_norm.default(hidden, residual, weight, eps)


def query_key_norm(query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float) -> None:
    """``rms_norm`` of every query and key head, in place, in one launch (Qwen3).

    Args:
        query: [T, Hq, D] fp16, bf16 or fp32; like key it may be a view of wider rows.
        key: [T, Hkv, D].
        query_weight, key_weight: [D].
        eps: added to the mean.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _require_tensors(query=query, key=key, query_weight=query_weight, key_weight=key_weight)
    torch.ops.pagedattn.query_key_norm.default(query, key, query_weight, key_weight, eps)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """The gated activation of Llama's feed-forward layers: silu(gate) * up.

    Args:
        gate_up: [T, 2 I] fp16, bf16 or fp32: the gates, then what they let through.

    Returns:
        [T, I].

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _require_tensors(gate_up=gate_up)
    return torch.ops.pagedattn.silu_and_mul.default(gate_up)


def norm_linear(
    values: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    batch_invariant: bool = False,
) -> Tensor:
    """``rms_norm`` of values, times a matrix, and ``silu_and_mul`` of that if it is gated.

    On a GPU a few rows of small weights take one launch. It reads weight, bias and norm_weight while the work ahead of
    it may still run: they must be older than that.

    Args:
        values: [T, K] fp16, bf16 or fp32.
        norm_weight: [K], the dtype of values; eps is added to the mean of squares.
        weight: [N, K], contiguous.
        bias: [N]; not with gated.
        gated: the first half of weight makes gates for the second.
        batch_invariant: a row's bits do not depend on how many others there are: on CUDA by one kernel for any number
            of them, slower than what is chosen by it; on a CPU by blocks of a fixed number of rows, as far as its BLAS
            treats the rows of a block alike (``kernels/invariant_linear_reference.py``).

    Returns:
        [T, N]; gated: [T, N / 2].

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _require_tensors(values=values, norm_weight=norm_weight, weight=weight)
    require_tensor("bias", bias, optional=True)
    require_bool("gated", gated)
    require_bool("batch_invariant", batch_invariant)
    return torch.ops.pagedattn.norm_linear.default(values, norm_weight, eps, weight, bias, gated, batch_invariant)


def add_linear(
    residual: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> None:
    """Add values times a matrix to the residual stream, in place.

    Args:
        residual: [T, N] fp16, bf16 or fp32, written in place.
        values: [T, K].
        weight: [N, K], contiguous; like bias it must be older than the work ahead, as in ``norm_linear``.
        bias: [N].
        batch_invariant: as in ``norm_linear``.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _require_tensors(residual=residual, values=values, weight=weight)
    require_tensor("bias", bias, optional=True)
    require_bool("batch_invariant", batch_invariant)
    torch.ops.pagedattn.add_linear.default(residual, values, weight, bias, batch_invariant)


def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """Choose one token for each row of logits, each by parameters of its own. A row's token depends on nothing else.

    Greedy takes the first of the likeliest tokens. Otherwise the inverse CDF is taken at a uniform number that follows
    from seed and position alone. Filters apply in the order min_p, top_k, top_p, each on what the one before left, and
    keep tokens that tie with the last one kept.

    Args:
        logits: [B, V] fp16, bf16 or fp32; -inf is a token that is not allowed.
        temperature: fp32 [B], finite and >= 0; 0 is greedy.
        top_k: int32 [B]; below 1 (and at V or more) it is off.
        top_p: fp32 [B] in (0, 1]; 1 is off.
        min_p: fp32 [B] in [0, 1]; tokens less likely than min_p times the likeliest are dropped.
        seed: int64 [B], the bits of an unsigned 64-bit seed.
        position: int64 [B]: which number of the seed's stream; how many tokens the request has generated.

    Returns:
        int64 [B]; -1 where the row has no finite maximum (a NaN, an infinity, or nothing but -inf).

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _require_tensors(
        logits=logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, position=position
    )
    return torch.ops.pagedattn.sample_tokens.default(logits, temperature, top_k, top_p, min_p, seed, position)
