"""Compute spent by step: as measured for past steps, at the recent pace for later ones."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import fields

from grpo_fast.law.clock import RECENT
from grpo_fast.law.forecast import Spending


class SpendingCurve:
    """Compute that a run has spent after each of its steps, kept in order, so that a look-up is a bisection."""

    def __init__(self) -> None:
        self._curves: dict[str, tuple[list[int], list[float]]] = {part.name: ([0], [0.0]) for part in fields(Spending)}

    def add(self, step: int, spent: Spending) -> None:
        """Notes what is spent by a step, later than every step before; what is ``None`` there stays unknown."""
        for name, (steps, values) in self._curves.items():
            value = getattr(spent, name)
            if value is not None:
                steps.append(step)
                values.append(float(value))

    def at(self, step: int | None) -> Spending | None:
        """Compute that is, or will be, spent by a step; ``None`` for no step, or if no spending is known."""
        found = {name: None if step is None else _at(step, *curve) for name, curve in self._curves.items()}
        return Spending(**found) if any(value is not None for value in found.values()) else None


def _at(step: int, steps: list[int], values: list[float]) -> float | None:
    if len(steps) == 1:
        return None
    if step > steps[-1]:
        back = max(0, min(len(steps) - 2, int((1.0 - RECENT) * len(steps))))
        pace = (values[-1] - values[back]) / (steps[-1] - steps[back])
        return values[-1] + pace * (step - steps[-1])
    after = bisect_left(steps, step)
    before = max(0, after - 1)
    share = (step - steps[before]) / max(steps[after] - steps[before], 1)
    return values[before] + (values[after] - values[before]) * share
