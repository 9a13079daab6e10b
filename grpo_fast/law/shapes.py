"""The grid of unit shapes that the posterior averages over.

A shape says how a rise is spread over the budget: 0 before the first step, 1 at the budget's end (a hump: 1 at its peak),
whatever is still to come behind that. So the rise that multiplies it is what the budget buys, which a prior can know something
of, while the level that a slow shape tends to beyond the budget is anybody's guess.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grpo_fast.law.forms import (
    Array,
    hill_rise,
    hill_rise_inverse,
    hump_rise,
    logistic_rise,
    logistic_rise_inverse,
    weibull_rise,
    weibull_rise_inverse,
)

CLASSES = (
    "none",
    "straight",
    "stretched, early",
    "stretched, late",
    "exponential, early",
    "exponential, late",
    "S-shaped, early",
    "S-shaped, late",
    "rise and fall",
)
"""Classes of shapes that the prior distinguishes: no rise; one that never slows; rises with a long tail, an exponential one
or a slow start, half done before or after a share of the budget; and rises that turn into a decline."""

_EARLY, _EARLY_S = 0.15, 0.3
_STRETCHED, _SLOW_START = 0.95, 1.45

_TIMESCALES = np.geomspace(0.012, 2.5, 18)
_POWERS = np.array([0.5, 0.7, 1.0, 1.3, 2.0, 3.0])
_HILL_MIDPOINTS = np.geomspace(0.03, 1.2, 12)
_HILL_POWERS = np.array([1.0, 1.5, 2.2, 3.2])
_MIDPOINTS = np.array([0.05, 0.1, 0.15, 0.2, 0.26, 0.32, 0.39, 0.46, 0.54, 0.62, 0.7, 0.78, 0.87, 0.97])
_WIDTHS = np.array([0.01, 0.02, 0.035, 0.06, 0.1, 0.16])
_PEAKS = np.array([0.12, 0.2, 0.3, 0.45, 0.6, 0.8])
_HUMP_POWERS = np.array([0.7, 1.2, 2.0])


@dataclass(frozen=True)
class _Family:
    """Parameters of the shapes of one form."""

    first: Array
    second: Array


class ShapeGrid:
    """M shapes over progress.

    Attributes:
        num_shapes: M.
        classes: int (M,) index of each shape's class in :data:`CLASSES`.
        num_in_class: (9,) shapes of each class.
        num_rising: the first so many shapes rise for ever towards their asymptote.
        exponentials: indices of the plain exponentials among them.
        asymptote: (M,) limit of a shape, budget or not; 1 where it never settles, and a hump's value at the budget's end.
    """

    def __init__(self) -> None:
        self._weibull, self._hill = _pairs(_TIMESCALES, _POWERS), _pairs(_HILL_MIDPOINTS, _HILL_POWERS)
        self._logistic, self._hump = _pairs(_MIDPOINTS, _WIDTHS), _pairs(_PEAKS, _HUMP_POWERS)
        one = np.ones(1)
        self._norms = [1.0 / rise(one)[:, 0] for rise in (self._weibulls, self._hills, self._logistics)]
        bounded = np.concatenate(self._norms)
        self.num_rising = bounded.size
        self.exponentials = np.flatnonzero(self._weibull.second == 1.0)
        num_humps = self._hump.first.size
        self.num_shapes = bounded.size + num_humps + 2
        self.asymptote: Array = np.concatenate([bounded, hump_rise(1.0, *self._columns(self._hump))[:, 0], [1.0, 0.0]])
        half = self.time_to(0.5)
        steep = np.concatenate(
            [self._weibull.second, np.full(self._hill.first.size, 0.9), np.full(self._logistic.first.size, 9.0)]
        )
        self.classes = self._classify(steep, half[: steep.size], num_humps)
        self.num_in_class = np.bincount(self.classes, minlength=len(CLASSES))

    def rise(self, x: Array) -> Array:
        """Every shape at every ``x``.

        Args:
            x: (K,) progress in [0, 1].

        Returns:
            (M, K) float64.
        """
        at = np.asarray(x, dtype=np.float64)
        weibull, hill, logistic = (norm[:, None] for norm in self._norms)
        return np.concatenate(
            [
                self._weibulls(at) * weibull,
                self._hills(at) * hill,
                self._logistics(at) * logistic,
                hump_rise(at[None, :], *self._columns(self._hump)),
                at[None, :],
                np.zeros((1, at.size)),
            ]
        )

    def time_to(self, share: float) -> Array:
        """(M,) progress at which ``share`` of the way to the asymptote is done, in a hump the way to its peak.

        Infinite for the shape that does not rise; beyond 1 where it is not done inside the budget.
        """
        return np.concatenate(
            [
                weibull_rise_inverse(share, self._weibull.first, self._weibull.second),
                hill_rise_inverse(share, self._hill.first, self._hill.second),
                logistic_rise_inverse(share, self._logistic.first, self._logistic.second),
                self._hump.first * share,
                [share, np.inf],
            ]
        )

    @staticmethod
    def _columns(family: _Family) -> tuple[Array, Array]:
        return family.first[:, None], family.second[:, None]

    def _weibulls(self, at: Array) -> Array:
        return weibull_rise(at[None, :], *self._columns(self._weibull))

    def _hills(self, at: Array) -> Array:
        # 0 at 0 without a division by it.
        return hill_rise(np.maximum(at, 1e-12)[None, :], *self._columns(self._hill))

    def _logistics(self, at: Array) -> Array:
        return logistic_rise(at[None, :], *self._columns(self._logistic))

    @staticmethod
    def _classify(steep: Array, half: Array, num_humps: int) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        name = np.where(
            steep < _STRETCHED,
            np.where(half < _EARLY, "stretched, early", "stretched, late"),
            np.where(
                steep < _SLOW_START,
                np.where(half < _EARLY, "exponential, early", "exponential, late"),
                np.where(half < _EARLY_S, "S-shaped, early", "S-shaped, late"),
            ),
        )
        names = [*name.tolist(), *["rise and fall"] * num_humps, "straight", "none"]
        return np.array([CLASSES.index(each) for each in names])


def _pairs(first: Array, second: Array) -> _Family:
    return _Family(np.repeat(first, second.size), np.tile(second, first.size))
