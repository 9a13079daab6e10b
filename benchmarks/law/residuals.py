"""Predictive distributions for forecasters that give a bare guess: the errors that the same guess made in other repositories.

A guess plus its past errors, at the same share of a run and scaled by the range seen so far, is a split-conformal forecast over
runs. It makes a strong rival of the plainest guess, and nothing of the tested repository enters it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.law.curves import Array, Curve
from benchmarks.law.evaluate import SHARES, TARGETS, Forecaster, Prediction, Seen, num_seen, seen_of, tail_of
from grpo_fast.law.fitting import weight_by_source

_FLOOR = 0.02


def scale(seen: Seen) -> float:
    """Unit of the errors: the smoothed range seen, at least 2 % of the known range."""
    low, high = seen.reward_range or (0.0, 0.0)
    return max(seen.range, _FLOOR * (high - low), 1e-9)


class Residual:
    """A forecaster whose guesses carry the errors of other repositories. Guesses are made once and remembered."""

    def __init__(self, inner: Forecaster) -> None:
        self.inner = inner
        self.name = inner.name
        self._errors: dict[tuple[str, str], Array] = {}

    def fit(self, curves: Sequence[Curve]) -> Spread:
        """Errors of each target at each share, every repository with the same weight."""
        weights = weight_by_source([curve.repository for curve in curves])
        errors = np.stack([self._errors_of(curve) for curve in curves])
        return Spread(self.inner, errors, weights / weights.sum())

    def forecast(self, seen: Seen, targets: Sequence[Array]) -> Sequence[Prediction]:
        """The bare guess: nothing was fitted."""
        return self.inner.forecast(seen, targets)

    def _errors_of(self, curve: Curve) -> Array:
        key = (curve.repository, curve.name)
        if key not in self._errors:
            tails = [tail_of(curve.rewards.size, target) for target in TARGETS]
            rows = []
            for share in SHARES:
                seen = seen_of(curve, num_seen(curve.rewards.size, share))
                guesses = self.inner.forecast(seen, [curve.steps[-tail:] for tail in tails])
                truths = [float(curve.rewards[-tail:].mean()) for tail in tails]
                rows.append([(truth - guess.point) / scale(seen) for truth, guess in zip(truths, guesses, strict=True)])
            self._errors[key] = np.array(rows)
        return self._errors[key]


@dataclass(frozen=True)
class Spread:
    """The fitted forecaster.

    Attributes:
        inner: makes the guess.
        errors: (curves, shares, targets) in units of :func:`scale`.
        weights: (curves,) that sum to 1.
    """

    inner: Forecaster
    errors: Array = field(repr=False)
    weights: Array = field(repr=False)

    @property
    def name(self) -> str:
        """The inner one's."""
        return self.inner.name

    def forecast(self, seen: Seen, targets: Sequence[Array]) -> list[Prediction]:
        """The guess, and the guess plus each error at the nearest share; targets are those of the harness, in its order."""
        done = float(seen.time(seen.steps[-1:])[0])
        share = int(np.argmin(np.abs(np.array(SHARES) - done)))
        unit = scale(seen)
        return [
            Prediction(guess.point, guess.point + unit * self.errors[:, share, index], self.weights)
            for index, guess in enumerate(self.inner.forecast(seen, targets))
        ]
