"""Finds stop strings in text that arrives token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text of ``token_ids`` without special tokens, spaces left as they are."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first occurrence of any stop string; all of it where there is none."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


class StopScanner:
    """Follows one sequence and says at which token its text first contains a stop string.

    Only a short window of tokens is decoded each time, from a point where the text was whole, so that the cost of a token
    does not grow with the length of the sequence. A character whose bytes are spread over tokens is waited for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._overlap = max(map(len, stop)) - 1
        self._window: list[int] = []
        self._read = 0
        self._tail = ""

    def feed(self, token_ids: Sequence[int]) -> int | None:
        """Takes the next tokens of the sequence.

        Returns:
            How many of them make the text contain a stop string; ``None`` where all of them do not.
        """
        before = self._window, self._read, self._tail
        if not self._advance(token_ids):
            return None
        self._window, self._read, self._tail = before
        for count, token in enumerate(token_ids[:-1], start=1):
            if self._advance([token]):
                return count
        return len(token_ids)

    def _advance(self, token_ids: Sequence[int]) -> bool:
        window = [*self._window, *token_ids]
        seen = decode(self._tokenizer, window[: self._read])
        text = decode(self._tokenizer, window)
        complete = text.rstrip(_INCOMPLETE)
        searched = self._tail + complete[len(seen) :]
        if text == complete and len(text) > len(seen):
            # The tokens just read become the context of the next window: decoders treat the first token specially.
            window, self._read = window[self._read :], len(window) - self._read
            self._tail = searched[-self._overlap :] if self._overlap else ""
        self._window = window
        return any(stop in searched for stop in self._stop)
