"""What the law has to beat: last values, means, damped trends, and least-squares fits of the published forms.

Every fit is separable: for given shape parameters the level and the rise are linear, so each shape of a fine grid is solved
exactly inside its bounds and the best one is refined. That finds the global least-squares optimum and repeats bit for bit,
which optimisers from a handful of starts do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from benchmarks.law.curves import Array
from benchmarks.law.evaluate import Prediction, Seen

MAX_BINS = 80
_REFINEMENTS = 10

Rise = Callable[[Array, Array], Array]


def binned(seen: Seen) -> tuple[Array, Array, Array]:
    """Share of the budget, reward and count of at most 80 bins of neighbouring points."""
    x, y = seen.time(seen.steps), seen.rewards
    if x.size <= MAX_BINS:
        return x, y, np.ones_like(x)
    edges = np.linspace(0, x.size, MAX_BINS + 1).round().astype(int)
    count = np.diff(edges).astype(np.float64)
    return np.add.reduceat(x, edges[:-1]) / count, np.add.reduceat(y, edges[:-1]) / count, count


def level_bounds(seen: Seen) -> tuple[float, float]:
    """Where levels may lie: the known range, or what was seen and half its span on either side.

    Half a span serves the fits best: three make the exponential's error at 20 % of the run 0.56 instead of 0.48.
    """
    if seen.reward_range is not None:
        return seen.reward_range
    low, high = float(seen.rewards.min()), float(seen.rewards.max())
    span = max(high - low, 1e-9)
    return low - 0.5 * span, high + 0.5 * span


def recent(seen: Seen, share: float) -> float:
    """Mean of the last share of the points, at least three."""
    return float(seen.rewards[-max(3, round(share * seen.rewards.size)) :].mean())


@dataclass(frozen=True)
class Recent:
    """The mean of the last share of what was seen goes on for ever; share 0 is the last value alone."""

    name: str
    share: float

    def forecast(self, seen: Seen, targets: Sequence[Array]) -> list[Prediction]:
        """The same number for all targets."""
        value = float(seen.rewards[-1]) if self.share == 0 else recent(seen, self.share)
        return [Prediction(value) for _ in targets]


@dataclass(frozen=True)
class Damped:
    """Holt's linear method with a damped trend; smoothing constants by least squares of one-step errors over a grid."""

    name: str = "Holt, damped trend"

    def forecast(self, seen: Seen, targets: Sequence[Array]) -> list[Prediction]:
        """Level plus the sum of the dying trend, in steps of the mean stride, kept within the bounds."""
        _, y, count = binned(seen)
        alpha, beta, phi = (
            part.ravel() for part in np.meshgrid([0.05, 0.1, 0.2, 0.4, 0.7], [0.02, 0.1, 0.3], [0.8, 0.9, 0.98])
        )
        level, trend, loss = np.full(alpha.size, y[0]), np.zeros(alpha.size), np.zeros(alpha.size)
        for value in y[1:]:
            guess = level + phi * trend
            loss += (value - guess) ** 2
            old, level = level, guess + alpha * (value - guess)
            trend = beta * (level - old) + (1 - beta) * phi * trend
        best = int(np.argmin(loss))
        stride = (seen.steps[-1] - seen.steps[0]) / max(seen.steps.size - 1, 1) * count[0]
        out = []
        for steps in targets:
            ahead = np.maximum((steps - seen.steps[-1]) / stride, 0.0)
            total = phi[best] * (1 - phi[best] ** ahead) / (1 - phi[best])
            out.append(Prediction(float(np.clip(level[best] + trend[best] * total, *level_bounds(seen)).mean())))
        return out


@dataclass(frozen=True)
class Fit:
    """Least squares of ``start + (end - start) * rise(x; p)`` with start and end inside the reward's bounds.

    Attributes:
        name: its name.
        rise: (M, D) parameters and (K,) progress to (M, K).
        grid: one axis of values per parameter; refined around the best one ten times, geometrically where positive.
        zero_start: the start is 0, as in the printed second version of the law.
        averaged: average with the mean of the last 20 % seen.
    """

    name: str
    rise: Rise
    grid: tuple[Array, ...]
    zero_start: bool = False
    averaged: bool = False

    def forecast(self, seen: Seen, targets: Sequence[Array]) -> list[Prediction]:
        """The fitted curve's mean over each target."""
        x, y, weight = binned(seen)
        parameters, start, end = self.fitted(x, y, weight, level_bounds(seen))
        out = []
        for steps in targets:
            value = float((start + (end - start) * self.rise(parameters[None], seen.time(steps))[0]).mean())
            out.append(Prediction(0.5 * (value + recent(seen, 0.2)) if self.averaged else value))
        return out

    def fitted(self, x: Array, y: Array, weight: Array, bounds: tuple[float, float]) -> tuple[Array, float, float]:
        """Best parameters, start and end."""
        axes = self.grid
        best: tuple[float, Array, float, float] | None = None
        for _ in range(1 + _REFINEMENTS):
            points = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
            start, end, loss = solve_levels(self.rise(points, x), y, weight, bounds, zero_start=self.zero_start)
            index = int(np.argmin(loss))
            if best is None or loss[index] < best[0]:
                best = (float(loss[index]), points[index], float(start[index]), float(end[index]))
            axes = tuple(_around(axis, value, whole) for axis, value, whole in zip(axes, best[1], self.grid, strict=True))
        assert best is not None
        return best[1], best[2], best[3]


def _around(axis: Array, value: float, whole: Array) -> Array:
    """Seven values about the best one, half as far apart as before, inside the whole axis."""
    if whole[0] > 0:
        finer = value * (axis[-1] / axis[0]) ** (np.arange(-3, 4) / (2 * (axis.size - 1)))
    else:
        finer = value + (axis[-1] - axis[0]) * np.arange(-3, 4) / (2 * (axis.size - 1))
    return np.asarray(np.clip(finer, whole[0], whole[-1]))


def solve_levels(
    rise: Array, y: Array, weight: Array, bounds: tuple[float, float], *, zero_start: bool = False
) -> tuple[Array, Array, Array]:
    """Least squares of ``start * (1 - rise) + end * rise`` for each row of ``rise``, both levels inside the bounds.

    Returns:
        start, end and the sum of squares, (M,) each.
    """
    low, high = bounds
    u, v = 1.0 - rise, rise
    uu, uv, vv = (u * u) @ weight, (u * v) @ weight, (v * v) @ weight
    uy, vy, yy = u @ (weight * y), v @ (weight * y), float(weight @ (y * y))
    tiny = 1e-12 * float(weight.sum())

    def loss(a: Array, b: Array) -> Array:
        return np.asarray(yy - 2 * (a * uy + b * vy) + a * a * uu + 2 * a * b * uv + b * b * vv)

    def other(fixed: Array, cross: Array, own: Array, product: Array) -> Array:
        return np.clip((product - fixed * cross) / np.maximum(own, tiny), low, high)

    if zero_start:
        end = other(np.zeros_like(uu), uv, vv, vy)
        return np.zeros_like(end), end, loss(np.zeros_like(end), end)
    determinant = np.maximum(uu * vv - uv * uv, tiny * tiny)
    free = np.stack([(vv * uy - uv * vy) / determinant, (uu * vy - uv * uy) / determinant])
    inside = np.all((free >= low) & (free <= high), axis=0) & (uu * vv - uv * uv > 1e-9 * uu * vv)
    candidates = [(np.clip(free[0], low, high), np.clip(free[1], low, high), np.where(inside, loss(*free), np.inf))]
    for edge in (low, high):
        fixed = np.full_like(uu, edge)
        end, start = other(fixed, uv, vv, vy), other(fixed, uv, uu, uy)
        candidates += [(fixed, end, loss(fixed, end)), (start, fixed, loss(start, fixed))]
    losses = np.stack([candidate[2] for candidate in candidates])
    pick, column = np.argmin(losses, axis=0), np.arange(uu.size)
    start = np.stack([candidate[0] for candidate in candidates])[pick, column]
    end = np.stack([candidate[1] for candidate in candidates])[pick, column]
    return start, end, losses[pick, column]


def _exponential(p: Array, x: Array) -> Array:
    return np.asarray(-np.expm1(-x[None] / p[:, :1]))


def _logistic(p: Array, x: Array) -> Array:
    return np.asarray(expit((x[None] - p[:, :1]) / p[:, 1:]))


def _hill(p: Array, x: Array) -> Array:
    return np.asarray(1.0 / (1.0 + (p[:, :1] / x[None]) ** p[:, 1:]))


def _weibull(p: Array, x: Array) -> Array:
    return np.asarray(-np.expm1(-((x[None] / p[:, :1]) ** p[:, 1:])))


@dataclass(frozen=True)
class PowerInError:
    """``log(top - R) = E - k log x`` by least squares (2509.25300): a straight line of the error, without a plateau of its own.

    The top is the greatest reward that is possible; where that is unknown there is no error to take a logarithm of, and the
    greatest bound of a level stands for it.
    """

    name: str = "power law in error"

    def forecast(self, seen: Seen, targets: Sequence[Array]) -> list[Prediction]:
        """The line carried on."""
        x, y, weight = binned(seen)
        low, top = level_bounds(seen)
        error = np.log(np.maximum(top - y, 1e-3 * (top - low)))
        slope, at_one = np.polyfit(np.log(x), error, 1, w=np.sqrt(weight))
        return [
            Prediction(float(np.clip(top - np.exp(at_one + slope * np.log(seen.time(steps))), low, top).mean()))
            for steps in targets
        ]


_TIMES = np.geomspace(0.003, 10.0, 49)
_POWERS = np.geomspace(0.3, 6.0, 16)

BASELINES = (
    Recent("last value", 0.0),
    Recent("mean of last 10 % seen", 0.1),
    Recent("mean of last 20 % seen", 0.2),
    Damped(),
    Fit("logistic (v1)", _logistic, (np.linspace(-1.0, 3.0, 61), np.geomspace(0.003, 1.0, 25))),
    Fit("exponential from zero (v2)", _exponential, (_TIMES,), zero_start=True),
    Fit("exponential + R0", _exponential, (_TIMES,)),
    Fit("exponential + R0, averaged with recent mean", _exponential, (_TIMES,), averaged=True),
    Fit("ScaleRL sigmoid", _hill, (_TIMES, _POWERS)),
    Fit("Weibull", _weibull, (_TIMES, _POWERS)),
    PowerInError(),
)
