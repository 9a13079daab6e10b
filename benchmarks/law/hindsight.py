"""What a finished curve did, noise taken off: the level that a stop is judged by, and the class that a table files it under.

A moving average of noisy rewards moves by itself, and a stop judged by it would seem to lose or to win what is only noise. So
the level is a local line whose width is chosen for each curve by generalised cross-validation, from a twenty-fifth of the run
to a constant; every value comes with the standard error that the curve's own scatter gives it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_WIDTHS = (0.04, 0.06, 0.09, 0.13, 0.2, 0.3, 0.45, 0.7, 1.2)
_PENALTY = 1.4  # of each degree of freedom in the criterion; 1 under-smooths white noise now and then
_CONSTANT = np.inf


@dataclass(frozen=True)
class Hindsight:
    """The mean curve as known afterwards.

    Attributes:
        x: (n,) share of the run's points.
        level: (n,) mean reward.
        weights: (n, n) of the smoother: ``level = weights @ rewards``.
        noise_sd: of one of the n rewards.
        width: half-width of the window as a share of the run; infinite for a constant.
    """

    x: Array
    level: Array
    weights: Array
    noise_sd: float
    width: float

    @property
    def end(self) -> float:
        """Mean of the level over the last 5 %, at least one point."""
        return float(self.level[-self._tail :].mean())

    @property
    def _tail(self) -> int:
        return max(1, round(0.05 * self.level.size))

    def lost(self, size: int) -> tuple[float, float]:
        """What stopping after ``size`` points forgoes: the end's level less the one there, of any sign, and its error."""
        contrast = self.weights[-self._tail :].mean(axis=0) - self.weights[size - 1]
        return self.end - float(self.level[size - 1]), self.noise_sd * float(np.linalg.norm(contrast))

    def lost_at_best(self, size: int) -> float:
        """The same where the best checkpoint is kept with and without the stop: greatest level of all less that before it."""
        return float(self.level.max() - self.level[:size].max())


def look_back(rewards: Array) -> Hindsight:
    """Smooths a finished curve of at least 3 rewards; beyond a few hundred, thin it first (the smoother is a dense matrix)."""
    size = rewards.size
    x = (np.arange(size) + 0.5) / size
    best: tuple[float, Hindsight] | None = None
    for width in (*(width for width in _WIDTHS if width * size >= 1.5), _CONSTANT):
        weights = _local_lines(x, width) if np.isfinite(width) else np.full((size, size), 1.0 / size)
        level = weights @ rewards
        freedom = float(np.trace(weights))
        left = 1.0 - _PENALTY * freedom / size
        if left <= 0.1:
            continue
        squares = float(np.sum((rewards - level) ** 2))
        score = squares / left**2
        if best is None or score < best[0]:
            noise = np.sqrt(squares / max(size - freedom, 1.0))
            best = score, Hindsight(x, level, weights, float(noise), width)
    assert best is not None
    return best[1]


def known_mean(mean: Array) -> Hindsight:
    """Hindsight of a simulated run."""
    size = mean.size
    return Hindsight((np.arange(size) + 0.5) / size, mean, np.eye(size), 0.0, 0.0)


def _local_lines(x: Array, width: float) -> Array:
    """Rows of a local linear smoother with tricube weights; windows at the ends reach as far, one-sided."""
    away = x[None, :] - x[:, None]
    kernel = np.clip(1.0 - np.abs(away / width) ** 3, 0.0, None) ** 3
    s0, s1, s2 = (np.sum(kernel * away**power, axis=1, keepdims=True) for power in (0, 1, 2))
    return np.asarray(kernel * (s2 - s1 * away) / (s0 * s2 - s1**2))


def classify(past: Hindsight) -> str:
    """One of flat, collapse, second rise, S-shaped, still rising, concave, in this order of tests.

    With ``gain`` the greatest level less the first one: flat where the levels span less than four of their standard errors, or
    where the gain is under a quarter of that span; collapse where the end lies below the peak by over half the gain (or below
    the start); second rise where the curve slows down between two rises of at least a fifth of the span each; S-shaped
    where a tenth of the gain takes over a fifth of the time to nine tenths of it; still rising where the last fifth
    of the run adds over a tenth of the gain.
    """
    level, span = past.level, float(np.ptp(past.level))
    error = past.noise_sd * float(np.median(np.linalg.norm(past.weights, axis=1)))
    start, end, peak = float(level[0]), past.end, float(level.max())
    if span <= max(4.0 * error, 1e-12):
        return "flat"
    if end < start - 0.5 * span or peak - end > 0.5 * max(peak - start, 0.5 * span):
        return "collapse"
    gain = peak - start
    if gain < 0.25 * span:
        return "flat"
    if _rises_twice(past, span):
        return "second rise"
    done = (level - start) / gain
    tenth, most = (float(past.x[int(np.argmax(done >= share))]) for share in (0.1, 0.9))
    if tenth > 0.2 * most:
        return "S-shaped"
    fifth = round(0.8 * level.size)
    return "still rising" if end - level[fifth] > 0.1 * gain else "concave"


def _rises_twice(past: Hindsight, span: float) -> bool:
    """Whether a tenth of the run moves less than half its share of the span, between tenths that move thrice as much.

    A fifth of the span must lie on either side.
    """
    level, stretch = past.level, max(2, round(0.1 * past.level.size))
    moved = level[stretch:] - level[:-stretch]
    for begin in range(1, moved.size - 1):
        slow = float(np.ptp(level[begin : begin + stretch + 1]))
        sides = min(level[begin] - level[0], level[-1] - level[begin + stretch])
        fast = min(moved[:begin].max(), moved[begin + 1 :].max())
        if slow <= 0.05 * span and sides >= 0.2 * span and fast >= max(3.0 * slow, 0.1 * span):
            return True
    return False
