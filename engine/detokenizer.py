"""Token ids to text as they come: whole characters only, stop strings found across tokens and held back until sure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pagedattn.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pagedattn.engine.tokenizer import Tokenizer


class Detokenizer:
    """The text of one request. ``text`` is all of it; ``num_ready`` characters of it can no longer be cut."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.text = ""
        self._stream = tokenizer.new_stream(skip_special_tokens=params.skip_special_tokens)
        self._stop_strings = params.stop_strings
        self._keeps_stop_string = params.include_stop_str_in_output

    @property
    def num_ready(self) -> int:
        """Characters that can be handed out: all but a longest end of the text that begins a stop string."""
        if self._keeps_stop_string or not self._stop_strings:
            return len(self.text)
        longest = min(len(self.text), max(map(len, self._stop_strings)) - 1)
        for length in range(longest, 0, -1):
            tail = self.text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stop_strings):
                return len(self.text) - length
        return len(self.text)

    def flush(self, last_token_ids: Sequence[int] = ()) -> None:
        """The end: add the last tokens and what was held back as incomplete, without the half of a character at its
        end. Stop strings in that are ordinary text."""
        self.text += self._stream.flush(last_token_ids).rstrip("\N{REPLACEMENT CHARACTER}")

    def append(self, token_id: int, *, may_stop: bool = True) -> str | None:
        """Add a token; returns the stop string that its text completes, if any, and cuts the text there.

        Of several the one that ends first wins, as if characters had come one by one; of those that end together the
        longest. ``may_stop`` False: stop strings that this token completes are ordinary text.
        """
        num_checked = len(self.text)
        self.text += self._stream.step(token_id) or ""
        if not may_stop or len(self.text) == num_checked:
            return None
        matches = []
        for stop in self._stop_strings:
            start = self.text.find(stop, max(0, num_checked - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        if not matches:
            return None
        end, start, stop = min(matches)
        self.text = self.text[: end if self._keeps_stop_string else start]
        return stop
