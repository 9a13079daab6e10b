"""A log before a column is chosen, and the choice of columns worth keeping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from grpo_fast.integrations.logs.log_columns import may_matter

_Column = TypeVar("_Column", int, str)
_SPLIT = 2


class LogError(ValueError):
    """A file that holds no reward curve that could be read; the message says what was looked for."""


@dataclass(frozen=True)
class RunSettings:
    """A run's settings for its rewards, forecast and stop; the defaults if the log is of another tool.

    Attributes:
        num_prompts: prompts a step.
        num_generations: completions per prompt.
        reward_range: least and greatest mean reward that is possible, where that is known.
        epsilon: gain that is not worth having; None where nothing says so, as below.
        confidence: probability of so small a gain that stops the run.
        patience: for how long forecasts must say so: a share of the budget below 1, a number of forecasts from 1 on.
        min_steps: steps before which nothing stops the run.
        warmup_steps: steps over which the learning rate rises.
        reward_value: money that one unit of reward is worth.
        prior: file of the prior that the run's forecasts began from; None for the one that ships.
        facts: what was known of the run before its first step, by the names of :class:`~grpo_fast.law.RunFacts`.
    """

    num_prompts: int = 1
    num_generations: int = 1
    reward_range: tuple[float, float] | None = None
    epsilon: float | None = None
    confidence: float | None = None
    patience: float | None = None
    min_steps: int | None = None
    warmup_steps: int = 0
    reward_value: float | None = None
    prior: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Names:
    """The columns of a log, all remembered in their order, of which only those that may matter are read.

    A log of a million lines has dozens of columns, and a forecast needs four.
    """

    def __init__(self, reward_column: str | None = None) -> None:
        self._reward_column = reward_column
        self._kept: dict[str, bool] = {}

    def keeps(self, name: str) -> bool:
        """Whether a column is read; it is remembered either way."""
        kept = self._kept.get(name)
        if kept is None:
            kept = self._kept[name] = may_matter(name, self._reward_column)
        return kept

    def all(self) -> list[str]:
        """Every column seen."""
        return list(self._kept)


@dataclass(frozen=True)
class RawLog:
    """Rows of numbers in the order in which they were written.

    Attributes:
        rows: numbers by column name, one mapping a logged row; NaN where the log says so.
        source: the format, in words.
        max_steps: planned steps, where the log tells them.
        reward_column: the column that the format itself names, where it does.
        notes: what could not be read.
        settings: what the run's configuration says.
        runs: name of the run that each row belongs to, where the log has such a column.
        splits: what each row was measured on, likewise: "train", "eval" and the like.
    """

    rows: list[dict[str, float]]
    source: str
    max_steps: int | None = None
    reward_column: str | None = None
    notes: list[str] = field(default_factory=list)
    settings: RunSettings = field(default_factory=RunSettings)
    runs: list[str] | None = None
    splits: list[str] | None = None


RUN_COLUMNS = ("run", "run_id", "run_name", "runid", "experiment", "exp_name", "trial", "trial_id")
"""Columns that tell several runs in one file apart, in small letters."""
SEED_COLUMNS = ("seed",)
"""Columns that do so too, beside those or alone, unless they change all the time."""
SPLIT_COLUMNS = ("split", "mode", "phase", "stage", "partition", "subset")
"""Columns that tell rows of training from those of an evaluation, in small letters."""


class RowWords(Generic[_Column]):
    """The words that tell the rows of a log apart: by their run, its seed, and what they were measured on.

    Args:
        find: gives the column that has one of some names, or None.
    """

    def __init__(self, find: Callable[[tuple[str, ...]], _Column | None]) -> None:
        columns = [find(known) for known in (RUN_COLUMNS, SEED_COLUMNS, SPLIT_COLUMNS)]
        self._found: list[tuple[_Column, list[str]] | None] = [None if column is None else (column, []) for column in columns]

    def add(self, word_of: Callable[[_Column], str | None]) -> None:
        """Takes a row; one without a word (None) belongs to the run and seed of the row before it."""
        for place, found in enumerate(self._found):
            if found is not None:
                column, words = found
                word = word_of(column)
                before = words[-1] if words and place < _SPLIT else ""
                words.append(before if word is None else word)

    @property
    def runs(self) -> list[str] | None:
        """:func:`runs_by_seed` of the rows."""
        runs, seeds, _ = self._words
        return runs_by_seed(runs, seeds)

    @property
    def splits(self) -> list[str] | None:
        """What each row was measured on, where the log has such a column."""
        return self._words[_SPLIT]

    @property
    def _words(self) -> list[list[str] | None]:
        return [None if found is None else found[1] for found in self._found]


def runs_by_seed(runs: list[str] | None, seeds: list[str] | None) -> list[str] | None:
    """The run of each row, told apart by seeds where a run has several.

    Args:
        runs: name of each row's run, where the log has such a column.
        seeds: seed of each row, likewise.
    """
    if seeds is None or 2 * len(set(seeds)) > len(seeds):  # a seed for every row tells nothing apart
        return runs
    if runs is None:
        return seeds
    pairs = set(zip(runs, seeds, strict=True))
    return runs if len(pairs) == len(set(runs)) else [f"{run}, seed {seed}" for run, seed in zip(runs, seeds, strict=True)]


def counted(count: int, noun: str, rest: str) -> str:
    """``counted(2, "reward", "is|are infinite")`` is "2 rewards are infinite"."""
    words = " ".join(part.split("|")[count != 1] if "|" in part else part for part in rest.split(" "))
    return f"{count} {noun}{'' if count == 1 else 's'} {words}"
