"""Rewards, logged values and failures of the reward functions in one step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from grpo_fast.types import COMPLETION_COLUMNS, Group, Scored


@dataclass(frozen=True, slots=True)
class RewardReport:
    """Statistics of one :meth:`RewardPool.score`, by the name of the reward function."""

    mean: dict[str, float]
    """Mean over the completions that got a value; NaN where none did."""
    std: dict[str, float]
    """Sample standard deviation (n - 1) over the same, as TRL's; NaN below two values."""
    nones: dict[str, int]
    """Completions without a value: the function gave ``None`` or NaN, or its call failed."""
    errors: dict[str, int]
    """Calls that raised, broke the contract or ended their process."""
    timeouts: dict[str, int]
    """Calls that missed the deadline."""
    restarts: int
    """Workers lost, each replaced when it is next needed."""
    problems: tuple[str, ...]
    """One line for each failed call."""
    logged: dict[str, float] = field(default_factory=dict)
    """By metric, the mean of what functions gave to ``log_metric``: each finite number weighs as many completions as its call
    had, so that it is no matter into how many calls a step was cut. NaN where there is none."""

    def metrics(self) -> dict[str, float]:
        """Flat metrics under TRL's names, with the counts of what went wrong where something did."""
        flat: dict[str, float] = {}
        for name in self.mean:
            flat[f"rewards/{name}/mean"] = self.mean[name]
            flat[f"rewards/{name}/std"] = self.std[name]
            counts = {"nones": self.nones[name], "errors": self.errors[name], "timeouts": self.timeouts[name]}
            flat |= {f"rewards/{name}/{key}": float(count) for key, count in counts.items() if count}
        return flat | ({"rewards/restarts": float(self.restarts)} if self.restarts else {})


@dataclass(slots=True)
class Tally:
    """The values and failures of a step while its calls come back."""

    names: Sequence[str]
    num_completions: int
    values: list[list[float]] = field(init=False)
    """[F][N], NaN where there is no value (yet)."""
    errors: list[int] = field(init=False)
    timeouts: list[int] = field(init=False)
    restarts: int = 0
    problems: list[str] = field(default_factory=list)
    metrics: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """By name, the numbers that were logged, each with the completions of its call."""
    extra: list[dict[str, list[Any]]] = field(init=False)
    """[F] by column, [N] what was logged of each completion, ``None`` where nothing (yet)."""

    def __post_init__(self) -> None:
        self.values = [[math.nan] * self.num_completions for _ in self.names]
        self.errors = [0] * len(self.names)
        self.timeouts = [0] * len(self.names)
        self.extra = [{} for _ in self.names]

    @classmethod
    def joined(cls, parts: Sequence[Tally]) -> Tally:
        """The tally of several calls as one; their completions follow each other."""
        result = cls(parts[0].names, sum(part.num_completions for part in parts))
        result.values = [[value for part in parts for value in part.values[f]] for f in range(len(result.names))]
        result.errors = [sum(counts) for counts in zip(*(part.errors for part in parts), strict=True)]
        result.timeouts = [sum(counts) for counts in zip(*(part.timeouts for part in parts), strict=True)]
        result.restarts = sum(part.restarts for part in parts)
        result.problems = [problem for part in parts for problem in part.problems]
        first = 0
        for part in parts:
            result._log(part.metrics)
            for function, columns in enumerate(part.extra):
                result._place(function, columns, first=first)
            first += part.num_completions
        return result

    def store(self, function: int, scored: Scored, *, first: int = 0) -> None:
        """Keeps what function number ``function`` gave, and logged of, the completions from number ``first`` on."""
        numbers = [math.nan if value is None else value for value in scored.values]
        self.values[function][first : first + len(numbers)] = numbers
        self._log({name: [(value, len(numbers)) for value in values] for name, values in scored.metrics.items()})
        self._place(function, scored.extra, first=first)

    def fill(self, groups: Sequence[Group], weights: Sequence[float]) -> None:
        """Sets ``rewards``, ``reward`` and ``extra`` of the groups whose completions, in order, were scored."""
        rows = zip(*self.values, strict=True)
        columns = {name: iter(values) for name, values in self._columns().items()}
        for group in groups:
            group.rewards = [list(next(rows)) for _ in group.completions]
            group.reward = [_weighted_sum(row, weights) for row in group.rewards]
            group.extra = {name: list(islice(values, len(group.completions))) for name, values in columns.items()}

    def report(self) -> RewardReport:
        """The statistics of what was kept."""
        present = {
            name: [value for value in values if not math.isnan(value)]
            for name, values in zip(self.names, self.values, strict=True)
        }
        return RewardReport(
            mean={name: _mean(values) for name, values in present.items()},
            std={name: _std(values) for name, values in present.items()},
            nones={name: self.num_completions - len(values) for name, values in present.items()},
            errors=dict(zip(self.names, self.errors, strict=True)),
            timeouts=dict(zip(self.names, self.timeouts, strict=True)),
            restarts=self.restarts,
            problems=tuple(self.problems),
            logged={name: _weighted_mean(values) for name, values in sorted(self.metrics.items())},
        )

    def _log(self, metrics: Mapping[str, Sequence[tuple[float, int]]]) -> None:
        for name, values in metrics.items():
            self.metrics.setdefault(name, []).extend(values)

    def _place(self, function: int, columns: Mapping[str, Sequence[Any]], *, first: int) -> None:
        for name, values in columns.items():
            whole = self.extra[function].setdefault(name, [None] * self.num_completions)
            whole[first : first + len(values)] = values

    def _columns(self) -> dict[str, list[Any]]:
        """The columns of all functions; a name that is taken has that of the function before it."""
        found: dict[str, list[Any]] = {}
        for function, columns in zip(self.names, self.extra, strict=True):
            for name, values in sorted(columns.items()):
                found[f"{function}/{name}" if name in found or name in COMPLETION_COLUMNS else name] = values
        return found


def _weighted_sum(row: Sequence[float], weights: Sequence[float]) -> float:
    parts = [weight * value for weight, value in zip(weights, row, strict=True) if not math.isnan(value)]
    return math.fsum(parts) if parts else math.nan


def _weighted_mean(values: Sequence[tuple[float, int]]) -> float:
    """Sums are exact, so that the order in which calls come back is no matter."""
    known = [(value, weight) for value, weight in values if math.isfinite(value)]
    total = sum(weight for _, weight in known)
    return math.fsum(value * weight for value, weight in known) / total if known else math.nan


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _std(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
