"""What a prompt may be, and its token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from pagedattn.engine.tokenizer import Tokenizer


class TokensPrompt(TypedDict, total=False):
    """A prompt that is tokenized already; ``prompt``, its text, is optional and only handed back.

    ``cache_salt``: only requests with the same one share what is cached.
    """

    prompt_token_ids: Sequence[int]
    prompt: str
    cache_salt: str


Prompt = str | Sequence[int] | TokensPrompt


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    text: str | None
    token_ids: list[int]
    cache_salt: str = ""


def is_token_ids(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and all(issubclass(kind, int) and kind is not bool for kind in set(map(type, value)))
    )


def tokenize_prompt(prompt: Prompt | TokenizedPrompt, tokenizer: Tokenizer, vocab_size: int) -> TokenizedPrompt:
    """Text and ids of a prompt. Raises ValueError when empty, of the wrong type or out of the vocabulary."""
    if isinstance(prompt, TokenizedPrompt):
        return prompt
    text: str | None = None
    cache_salt = ""
    token_ids: Any
    if isinstance(prompt, str):
        text, token_ids = prompt, tokenizer.encode(prompt) if prompt else []
    elif isinstance(prompt, dict):
        unknown = sorted(set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"})
        if unknown or "prompt_token_ids" not in prompt:
            raise ValueError(
                f"prompt has the keys {sorted(prompt)}: it must have prompt_token_ids, it may have prompt and "
                "cache_salt, and no other"
            )
        cache_salt = prompt.get("cache_salt", "")
        if not isinstance(cache_salt, str):
            raise ValueError(f"cache_salt must be a string, not {cache_salt!r}")
        text, token_ids = prompt.get("prompt"), prompt["prompt_token_ids"]
        if text is not None and not isinstance(text, str):
            raise ValueError(f"prompt must be a string beside prompt_token_ids, not {text!r}")
    else:
        token_ids = prompt
    if not is_token_ids(token_ids):
        raise ValueError(
            f"prompt must be a string, a list of token ids or a dict with prompt_token_ids, not {prompt!r}"
        )
    if not token_ids:
        raise ValueError("prompt is empty: it must have at least one token")
    lowest, highest = min(token_ids), max(token_ids)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"prompt has the token id {wrong}: ids must be in [0, {vocab_size})")
    return TokenizedPrompt(text, list(token_ids), cache_salt)
