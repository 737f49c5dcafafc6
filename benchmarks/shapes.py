"""The grid that the kernel benchmark runs over: what a file of shapes says, and the least that a shape must move.

A file holds ``shapes`` (decode and prefill), ``mla`` (latent attention), ``append`` and, under ``sinks``, the names of
the shapes that have attention sinks. ``window`` is FlashAttention's left window: our ``sliding_window`` is one more.
Names repeat, so results are told apart by ``Shape.key``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("decode", "prefill", "latent", "append", "rope_append")
ITEMSIZE = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}
SCALES = ("none", "tensor", "head", "token")  # of a quantized cache
ROPE_QUERY_HEADS = 32  # of the model that rope_append_kv serves here, which the file does not say


@dataclass(frozen=True)
class Shape:
    """One batch. ``query_lens``: the new tokens of each sequence; ``seq_lens`` count them and what is cached before."""

    name: str
    kind: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    head_size_v: int | None = None  # None: the head size
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    cache_dtype: str = "bf16"
    query_dtype: str = "bf16"
    scales: str = "none"

    def __post_init__(self) -> None:
        for field, given, allowed in (
            ("kind", self.kind, KINDS),
            ("kv_dtype", self.cache_dtype, tuple(ITEMSIZE)),
            ("q_dtype", self.query_dtype, ("bf16", "fp8")),
            ("scales", self.scales, SCALES),
        ):
            if given not in allowed:
                raise ValueError(f"{self.name}: {field}: got {given!r}; must be one of {', '.join(allowed)}")
        if (self.scales == "none") != (self.cache_dtype == "bf16"):
            raise ValueError(f"{self.name}: scales: got {self.scales!r}; must be given for a quantized cache alone")
        if len(self.query_lens) != len(self.seq_lens) or not self.seq_lens:
            raise ValueError(f"{self.name}: kvs: got {len(self.seq_lens)} lengths for {len(self.query_lens)} sequences")
        if any(not 1 <= new <= length for new, length in zip(self.query_lens, self.seq_lens, strict=True)):
            raise ValueError(f"{self.name}: q: got more query tokens than kv, or none; must be within 1..kv")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.name}: hq: got {self.num_heads}; must be a multiple of hkv={self.num_kv_heads}")

    @property
    def value_size(self) -> int:
        return self.head_size if self.head_size_v is None else self.head_size_v

    @property
    def batch(self) -> int:
        return len(self.seq_lens)

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def max_query_len(self) -> int:
        return max(self.query_lens)

    @property
    def max_seq_len(self) -> int:
        return max(self.seq_lens)

    @property
    def is_append(self) -> bool:
        return self.kind in ("append", "rope_append")

    @property
    def scale(self) -> float:
        """Of the logits. An absorbed latent query has the scale of the head that it stands for: 128 + 64."""
        return 192**-0.5 if self.kind == "latent" else self.head_size**-0.5

    @property
    def label(self) -> str:
        """Batch and lengths for people: 64 x 4k, 4 x 512 on 8k."""
        if self.is_append:
            return f"{short(self.num_tokens)} tokens"
        if len(set(self.seq_lens)) > 1:
            lengths = f"{self.batch} ragged, {short(sum(self.seq_lens))} in all"
        else:
            lengths = f"{self.batch} x {short(self.seq_lens[0])}"
        if self.max_query_len == 1:
            return lengths
        if len(set(self.query_lens)) > 1:
            return f"{lengths}, {short(self.num_tokens)} new"
        return lengths if self.query_lens == self.seq_lens else f"{lengths}, {short(self.max_query_len)} new each"

    @property
    def heads(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads} d{self.head_size}"

    @property
    def key(self) -> str:
        parts = [self.name, self.kind, self.heads, self.label, f"page {self.block_size}"]
        if self.cache_dtype != "bf16":
            parts.append(f"{self.cache_dtype} {self.scales}")
        if self.query_dtype != "bf16":
            parts.append(f"{self.query_dtype} query")
        return " | ".join(parts)

    def first_key(self, sequence: int) -> int:
        """First position of a sequence that any of its query tokens sees."""
        if self.sliding_window is None:
            return 0
        return max(0, self.seq_lens[sequence] - self.query_lens[sequence] - self.sliding_window + 1)

    @property
    def keys_read(self) -> int:
        return sum(length - self.first_key(sequence) for sequence, length in enumerate(self.seq_lens))

    @property
    def bytes(self) -> float:
        """The least that must move: visible keys and values once, queries in, results out; or the rows of an append."""
        rows, heads = self.num_tokens, self.num_kv_heads
        if self.is_append:
            moved = 2.0 * rows * heads * (self.head_size + self.value_size) * 2
            if self.kind == "rope_append":  # queries in and out, a row of cosines and sines, a position
                moved += rows * (self.num_heads * self.head_size * 2 * 2 + self.head_size * 4 + 8)
            return moved + rows * 8
        stored = self.head_size if self.kind == "latent" else self.head_size + self.value_size  # latent: V lies in K
        per_key = heads * stored * ITEMSIZE[self.cache_dtype] + (8 * heads if self.scales == "token" else 0)
        ends = rows * self.num_heads * (self.head_size * ITEMSIZE[self.query_dtype] + self.value_size * 2)
        return self.keys_read * per_key + ends

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs that a head computes."""
        window = self.max_seq_len if self.sliding_window is None else self.sliding_window
        return sum(
            sum(min(position + 1, window) for position in range(length - new, length))
            for new, length in zip(self.query_lens, self.seq_lens, strict=True)
        )

    @property
    def flops(self) -> float:
        return 0.0 if self.is_append else 2.0 * self.num_heads * (self.head_size + self.value_size) * self.visible_pairs


def short(count: int) -> str:
    """1024 as 1k where that is exact or long enough not to matter."""
    if count >= 10_000 or (count >= 1024 and count % 512 == 0):
        return f"{count / 1024:.1f}".removesuffix(".0") + "k"
    return str(count)


def load_shapes(paths: Iterable[Path]) -> list[Shape]:
    """The shapes of some files, in their order.

    Raises:
        ValueError: naming the entry and the field that is wrong, or two shapes that results could not be told apart by.
    """
    shapes: dict[str, Shape] = {}
    for path in paths:
        for shape in _parse(json.loads(path.read_text(encoding="utf-8"))):
            if shapes.setdefault(shape.key, shape) != shape:
                raise ValueError(f"{path}: {shape.key} stands for two different shapes; must have a name of its own")
    return list(shapes.values())


def _parse(document: dict[str, Any]) -> Iterable[Shape]:
    sections = {"shapes": _attention, "mla": _latent, "append": _append}
    unknown = set(document) - {*sections, "sinks"}
    if unknown:
        raise ValueError(f"{min(unknown)}: must be one of shapes, sinks, mla, append")
    sinks = set(document.get("sinks", ()))
    for section, parse in sections.items():
        for entry in document.get(section, ()):
            rest = dict(entry)
            try:
                yield from parse(rest, sinks)
            except KeyError as error:
                raise ValueError(f"{section}: {entry.get('name', entry)}: {error.args[0]}: missing") from None
            if rest:
                raise ValueError(f"{section}: {entry['name']}: {min(rest)}: not a field of this section")


def _attention(entry: dict[str, Any], sinks: set[str]) -> Iterable[Shape]:
    batch = entry.pop("b", None)
    seq_lens = tuple(entry.pop("kvs")) if "kvs" in entry else (entry.pop("kv"),) * batch
    query_lens = tuple(entry.pop("qs")) if "qs" in entry else (entry.pop("q", 1),) * len(seq_lens)
    window, cache_dtype, name = entry.pop("window", None), entry.pop("kv_dtype", "bf16"), entry.pop("name")
    yield Shape(
        name=name,
        kind=entry.pop("kind"),
        num_heads=entry.pop("hq"),
        num_kv_heads=entry.pop("hkv"),
        head_size=entry.pop("d"),
        block_size=entry.pop("page"),
        query_lens=query_lens,
        seq_lens=seq_lens,
        sliding_window=None if window is None else window + 1,
        softcap=entry.pop("softcap", None),
        sinks=name in sinks,
        cache_dtype=cache_dtype,
        query_dtype=entry.pop("q_dtype", "bf16"),
        scales=entry.pop("scales", "none" if cache_dtype == "bf16" else "tensor"),
    )


def _latent(entry: dict[str, Any], sinks: set[str]) -> Iterable[Shape]:
    batch, rank = entry.pop("b"), entry.pop("ckv")
    yield Shape(
        name=entry.pop("name"),
        kind="latent",
        num_heads=entry.pop("h"),
        num_kv_heads=1,
        head_size=rank + entry.pop("kpe"),
        head_size_v=rank,
        block_size=entry.pop("page"),
        query_lens=(1,) * batch,
        seq_lens=(entry.pop("kv"),) * batch,
    )


def _append(entry: dict[str, Any], sinks: set[str]) -> Iterable[Shape]:
    """Each batch twice: appended as it is, and rotated on the way."""
    tokens, name, heads = tuple(entry.pop("tokens")), entry.pop("name"), entry.pop("hkv")
    head_size, block_size = entry.pop("d"), entry.pop("page")
    for kind, num_heads in (("append", heads), ("rope_append", ROPE_QUERY_HEADS)):
        yield Shape(name, kind, num_heads, heads, head_size, block_size, tokens, tokens)
