"""Values that know how to reduce over micro-batches and ranks, and the clock that charges seconds to phases."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch

Phase: TypeAlias = Literal["rollout", "reward", "score", "train", "sync", "other"]
PHASES: tuple[Phase, ...] = ("rollout", "reward", "score", "train", "sync", "other")
Reduction: TypeAlias = Literal["sum", "min", "max"]


_COMBINE: dict[Reduction, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}


Held: TypeAlias = dict[str, tuple[Reduction, str | None, float]]
"""Sums of one rank: reduction, weight and value by name."""


def mean_known(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN where there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


class MetricSums:
    """Sums, minima and maxima gathered on the device, read once.

    ``add`` takes tensors without synchronising; ``compute`` does the one transfer. A mean is two sums: its numerator under its
    own name and its denominator under ``weight``.
    """

    def __init__(self) -> None:
        self._values: dict[str, tuple[Reduction, str | None, torch.Tensor]] = {}

    def add(self, name: str, value: torch.Tensor, *, weight: str | None = None, reduction: Reduction = "sum") -> None:
        """Adds one micro-batch's part.

        Args:
            name: metric name.
            value: scalar tensor, any device.
            weight: name of the summed metric that divides it in :meth:`compute`.
            reduction: how parts combine.
        """
        value = value.detach().float()
        if name in self._values:
            _, _, held = self._values[name]
            value = _COMBINE[reduction](held, value)
        self._values[name] = (reduction, weight, value)

    def compute(self, gather: Callable[[Callable[[], Held]], list[Held]] = lambda own: [own()]) -> dict[str, float]:
        """The reduced values as Python floats; a mean over nothing is NaN.

        Args:
            gather: gives what every rank holds, by rank, where there are several.
        """
        raw: dict[str, float] = {}
        weights: dict[str, str | None] = {}
        for held in gather(self._held):
            for name, (reduction, weight, value) in held.items():
                raw[name] = _combined(reduction, raw[name], value) if name in raw else value
                weights[name] = weight
        result = {}
        for name, weight in weights.items():
            divisor = raw[weight] if weight is not None else 1.0
            result[name] = raw[name] / divisor if divisor else float("nan")
        return result

    def _held(self) -> Held:
        if not self._values:
            return {}
        numbers = torch.stack([value for _, _, value in self._values.values()]).tolist()
        return {
            name: (reduction, weight, number)
            for (name, (reduction, weight, _)), number in zip(self._values.items(), numbers, strict=True)
        }


def _combined(reduction: Reduction, first: float, second: float) -> float:
    pair = (torch.tensor(value, dtype=torch.float64) for value in (first, second))
    return _COMBINE[reduction](*pair).item()


class PhaseTimer:
    """Seconds of wall-clock time by phase. Phases do not nest; time outside any is ``other``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._mark = time.perf_counter()
        self._inside: Phase = "other"

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Charges the time inside to ``name``."""
        self._charge()
        self._inside = name
        try:
            yield
        finally:
            self._charge()
            self._inside = "other"

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap."""
        self._charge()
        lap, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return lap

    def _charge(self) -> None:
        if torch.cuda.is_initialized():  # a run on the CPU must not touch a GPU
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._inside] += now - self._mark
        self._mark = now
