"""Tokenised prompts of a whole table: only their tokens are kept, and a prompt is made when it is asked for."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, overload

from grpo_fast.tasks.task import Rows
from grpo_fast.types import Prompt, PromptText

Ask = Callable[[Mapping[str, Any], int], PromptText]
"""Gives the prompt of a row, whose number is told for errors."""


class EncodedPrompts(Sequence[Prompt]):
    """A sequence of prompts that takes 4 bytes a token and 24 a prompt, beside the table that it reads from.

    Args:
        rows: the table, which must not change.
        ask: what gives a row's prompt.
    """

    def __init__(self, rows: Rows, ask: Ask) -> None:
        self._rows = rows
        self._ask = ask
        self._numbers = array("q")
        """Rows that are kept, in their order."""
        self._ends = array("q", [0])
        """End of each prompt's tokens; the first number is the beginning of the first one."""
        self._tokens = array("i")
        self._openings: list[str] = []
        self._columns: dict[str, None] = {}
        self.num_plain = 0
        """Prompts that are plain text, not messages."""

    def add(
        self, number: int, columns: Iterable[str], prompt: PromptText, token_ids: Sequence[int], *, opening: str = ""
    ) -> None:
        """Keeps a row's tokens; rows come in their order.

        Args:
            number: of the row.
            columns: names of the row's columns.
            prompt: what was asked.
            token_ids: its tokens.
            opening: how it begins the answer.
        """
        self._numbers.append(number)
        self._tokens.extend(token_ids)
        self._ends.append(len(self._tokens))
        self._openings.append(sys.intern(opening))
        self._columns |= dict.fromkeys(columns)
        self.num_plain += isinstance(prompt, str)

    @property
    def columns(self) -> list[str]:
        """Names of all columns beside the prompt, as they came."""
        return [name for name in self._columns if name != "prompt"]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt; 0 where there is none."""
        return max((end - begin for begin, end in pairwise(self._ends)), default=0)

    @property
    def mean_length(self) -> float:
        """Tokens of a prompt, in the mean."""
        return len(self._tokens) / len(self)

    def of_row(self, number: int) -> Prompt:
        """The prompt of a row of the table.

        Raises:
            KeyError: it was left out, or there is none.
        """
        place = bisect_left(self._numbers, number)
        if place == len(self) or self._numbers[place] != number:
            raise KeyError(number)
        return self[place]

    def token_ids(self) -> Iterator[array[int]]:
        """Tokens of one prompt after the other."""
        return map(self._token_ids, range(len(self)))

    def _token_ids(self, place: int) -> array[int]:
        return self._tokens[self._ends[place] : self._ends[place + 1]]

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Prompt: ...

    @overload
    def __getitem__(self, place: slice) -> list[Prompt]: ...

    def __getitem__(self, place: int | slice) -> Prompt | list[Prompt]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        place = range(len(self))[place]
        number = self._numbers[place]
        row = self._rows[number]
        columns = {name: value for name, value in row.items() if name != "prompt"}
        return Prompt(number, self._ask(row, number), tuple(self._token_ids(place)), columns, self._openings[place])


def token_ids_of(prompts: Sequence[Prompt]) -> Iterable[Sequence[int]]:
    """Tokens of one prompt after the other, without making the prompts."""
    return prompts.token_ids() if isinstance(prompts, EncodedPrompts) else (prompt.token_ids for prompt in prompts)
