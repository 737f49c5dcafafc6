"""A ``tokenizers.Tokenizer`` from the vocabulary in a GGUF file's metadata.

Contract: the same ids as the model's own ``tokenizer.json``, which a GGUF file does not carry: it names the kind of
tokenizer ("gpt2": byte-level BPE; "llama": SentencePiece BPE with byte fallback) and how text is cut before merging
(``tokenizer.ggml.pre``), and what those names mean is written down here. A name that is not known is a ``ValueError``:
cutting text some other way would give wrong ids silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pagedattn.engine.tokenizer import import_tokenizers, surround_with_special_tokens

if TYPE_CHECKING:
    import tokenizers

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

# How published tokenizers cut text, as their tokenizer.json files state it.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class ByteLevelRule:
    """How a byte-level tokenizer prepares text.

    split: a regular expression whose matches are merged separately; None is GPT-2's own.
    """

    split: str | None = None
    digits_alone: bool = False
    normalize_nfc: bool = False
    whole_words_first: bool = False  # a piece that is in the vocabulary is not merged from bytes
    adds_bos: bool = False  # unless the file says otherwise


_GPT2 = ByteLevelRule()
_SMOLLM = ByteLevelRule(digits_alone=True)
_LLAMA3 = ByteLevelRule(split=_LLAMA3_SPLIT, whole_words_first=True, adds_bos=True)
_QWEN2 = ByteLevelRule(split=_QWEN2_SPLIT, normalize_nfc=True)
BYTE_LEVEL_RULES = {
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def special_token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """ "bos_token", "eos_token", "unk_token", "pad_token": those that the file gives."""
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    num_tokens = len(metadata.get("tokenizer.ggml.tokens", ()))
    for name, token_id in found.items():
        if token_id is not None and not 0 <= token_id < num_tokens:
            raise ValueError(f"{name} is id {token_id}, outside the vocabulary of {num_tokens}")
    return {name: token_id for name, token_id in found.items() if token_id is not None}


def build_backend(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer that the metadata describes.

    Raises:
        ValueError: no vocabulary, or a kind or pre-tokenizer that is not supported, with what is.
    """
    tokens: list[str] | None = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError("no vocabulary: tokenizer.ggml.tokens is missing")
    kind = metadata.get("tokenizer.ggml.model")
    match kind:
        case "gpt2":
            backend, adds_bos = _byte_level(metadata, tokens)
        case "llama":
            backend, adds_bos = _sentencepiece(metadata, tokens), True
        case _:
            raise ValueError(f"tokenizer.ggml.model is {kind!r}; supported: 'gpt2', 'llama'")
    _add_special_tokens(backend, tokens, metadata.get("tokenizer.ggml.token_type", ()))
    ids = special_token_ids(metadata)
    before, after = ids.get("bos_token"), ids.get("eos_token")
    surround_with_special_tokens(
        backend,
        tokens[before] if before is not None and metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else None,
        tokens[after] if after is not None and metadata.get("tokenizer.ggml.add_eos_token", False) else None,
    )
    return backend


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tuple[tokenizers.Tokenizer, bool]:
    package = import_tokenizers()
    name = metadata.get("tokenizer.ggml.pre")
    rule = BYTE_LEVEL_RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        raise ValueError(f"tokenizer.ggml.pre is {name!r}; supported: {', '.join(BYTE_LEVEL_RULES)}")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = package.Tokenizer(package.models.BPE(vocabulary, merges, ignore_merges=rule.whole_words_first))
    if rule.normalize_nfc:
        backend.normalizer = package.normalizers.NFC()
    steps = []
    if rule.digits_alone:
        steps.append(package.pre_tokenizers.Digits(individual_digits=True))
    if rule.split is not None:
        steps.append(package.pre_tokenizers.Split(package.Regex(rule.split), behavior="isolated"))
    steps.append(package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.split is None))
    backend.pre_tokenizer = package.pre_tokenizers.Sequence(steps)
    backend.decoder = package.decoders.ByteLevel()
    return backend, rule.adds_bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    package = import_tokenizers()
    scores = metadata.get("tokenizer.ggml.scores", ())
    if len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = special_token_ids(metadata).get("unk_token", 0)
    backend = package.Tokenizer(
        package.models.BPE(
            vocabulary,
            _merges_from_scores(vocabulary, scores),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    # As SentencePiece does it: a space in front, also behind a special token, and every space a visible character.
    prepared = [package.normalizers.Prepend("\u2581")] if prefix_space else []
    backend.normalizer = package.normalizers.Sequence([*prepared, package.normalizers.Replace(" ", "\u2581")])
    steps = [package.decoders.Replace("\u2581", " "), package.decoders.ByteFallback(), package.decoders.Fuse()]
    if prefix_space:
        steps.append(package.decoders.Strip(" ", left=1))
    backend.decoder = package.decoders.Sequence(steps)
    return backend


def _merges_from_scores(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best; as an ordered list of merges that is every way to cut
    every token in two, by the score of the whole."""
    merges = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[index], vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _add_special_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Make tokens that the file marks as control or user-defined match whole; only control ones are skippable."""
    added = import_tokenizers().AddedToken
    control = [token for token, kind in zip(tokens, types, strict=False) if kind == CONTROL]
    user_defined = [token for token, kind in zip(tokens, types, strict=False) if kind == USER_DEFINED]
    backend.add_special_tokens([added(token, normalized=False, special=True) for token in control])
    backend.add_tokens([added(token, normalized=False, special=False) for token in user_defined])
