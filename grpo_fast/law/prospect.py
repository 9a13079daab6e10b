"""Probabilities of the ways a run may go, and when, before the first step (as in a plan) or after any step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grpo_fast.law.forms import Array
from grpo_fast.law.posterior import GRID, quantiles
from grpo_fast.law.predictor import OnlinePredictor
from grpo_fast.law.shapes import CLASSES

WAYS = ("hardly moves", "rises to a plateau", "peaks and falls back", "still rises at the end", "falls")
"""Possible outcomes of a run: less than epsilon either way over the whole budget, a rise of which 95 % are done by the end,
one that turns into a decline before it, one that goes on, a loss."""

_HUMP = CLASSES.index("rise and fall")
_BEYOND = 2.0


@dataclass(frozen=True)
class Prospect:
    """A weighted sample of N whole runs as they are believed in now.

    Attributes:
        weight: (N,) weights that sum to 1.
        rise: (N,) gain from the first step to the end of the budget, drift apart.
        shape: int (N,) index into :data:`~grpo_fast.law.posterior.GRID`.
        epsilon: gain that is not worth having.
    """

    weight: Array
    rise: Array
    shape: np.ndarray[tuple[int], np.dtype[np.intp]]
    epsilon: float

    @classmethod
    def of(cls, predictor: OnlinePredictor) -> Prospect:
        """The predictor's present sample of runs, with or without rewards."""
        draws = predictor.posterior.draws(predictor.believed())
        return cls(draws.weight, draws.rise, draws.shape, predictor.epsilon)

    @property
    def rises(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """(N,) whether a run rises by epsilon or more over the whole budget."""
        return np.asarray(self.rise >= self.epsilon)

    def time_to(self, share: float) -> Array:
        """(N,) progress at which a share of the rise is done; infinite without a rise, beyond 1 where it takes longer."""
        return np.where(self.rises, GRID.time_to(share)[self.shape], np.inf)

    def when(self, share: float, levels: Array) -> Array:
        """Quantiles of :meth:`time_to` over the runs that rise, (Q,) at ``levels``; NaN where none does, infinite beyond 1."""
        rising = self.rises & (self.weight > 0)
        if not rising.any():
            return np.full(levels.size, np.nan)
        times, weight = np.minimum(self.time_to(share)[rising], _BEYOND), self.weight[rising]
        found = quantiles(times[:, None], weight / weight.sum(), levels)[:, 0]
        return np.where(found > 1.0, np.inf, found)

    def classes(self) -> dict[str, float]:
        """Probabilities of the classes of shapes; they sum to 1."""
        shares = np.bincount(GRID.classes[self.shape], weights=self.weight, minlength=len(CLASSES))
        return dict(zip(CLASSES, (shares / shares.sum()).tolist(), strict=True))

    def ways(self, end: Array | float = 1.0) -> dict[str, float]:
        """Probabilities of :data:`WAYS`; they sum to 1.

        Args:
            end: progress at which the run ends, one or (N,) of them.
        """
        done = self.time_to(0.95) <= end
        hump = GRID.classes[self.shape] == _HUMP
        which = np.select(
            [self.rise <= -self.epsilon, ~self.rises, done & hump, done],
            [WAYS.index(way) for way in ("falls", "hardly moves", "peaks and falls back", "rises to a plateau")],
            WAYS.index("still rises at the end"),
        )
        shares = np.bincount(which, weights=self.weight, minlength=len(WAYS))
        return dict(zip(WAYS, (shares / shares.sum()).tolist(), strict=True))
