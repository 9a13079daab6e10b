"""Plain forecasts beside the posterior's, and their weights: prequential stacking.

The posterior knows how runs in general behave, a plain forecast only this run. Three of these are made from the same running
sums.

Two are a bounded least-squares exponential and the mean of the latest rewards. They are tested: as they stood when 40 and 60 %
of the rewards were known, they forecast the mean of the newest fifth. The smaller its error was, in units of how far the run
has moved, and the better it fits all rewards now, the larger is a forecast's weight beside a constant one of the posterior,

    w_i ~ n / (n + 10) (S_best / S_i) (d / (d + error_i))^2    after n rewards,

with S the sum of squares that a fit leaves. So a run that follows no shape falls back on the best simple predictor, and one
that neither predicted, or that has hardly begun, on the posterior.

The third is the mean over every rising shape, fitted by bounded least squares, and over no rise at all. Each is weighted by its
fit less Schwarz's penalty for its rise, all classes of shapes being equally likely beforehand. The newest reward is scored by
the fit to the others: a rise that rests on one reward is no likelier than none, and still pays the penalty. Early in a run this
mean extrapolates noise. Later there is less to extrapolate, and a prior knows less that the run does not show: from the middle
on it takes over, with odds of

    4 (x / (1 - x))^6 n / (n + 10)    at progress x,

as far as it fits. Its share is divided by 1 + ((m - 1) / 4)^4 if the means of the newest fifth's thirds, without the reward
that is farthest off, lie m > 1 times as far from it, in squares, as noise and half a hundredth of the range explain. So runs
that follow no single rise (second rises, jumps, falls) are left to the posterior, which models drift.

Source: prequential weights are Dawid's (1984), the price is that of Schwarz (1978), errors without the reward itself follow
Allen (1974); the two-fifths and the constants were chosen on published curves, repository by repository left out
(``benchmarks/law``).
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from grpo_fast.law.clock import RECENT
from grpo_fast.law.forms import Array
from grpo_fast.law.posterior import EVIDENCE_STEPS, GRID, Posterior

EXPERTS = ("exponential", "recent mean", "any shape")

_PLACES = np.linspace(0.0, 1.0, 65)
_RISING = np.arange(GRID.num_rising)
_ASYMPTOTE = GRID.asymptote[: GRID.num_rising]
_TABLE: Array = GRID.rise(_PLACES)[: GRID.num_rising] / _ASYMPTOTE[:, None]
_LOG_CLASS: Array = -np.log(GRID.num_in_class[GRID.classes[: GRID.num_rising]])
_HALF_SPAN = 0.5  # beyond what was seen, where the range is unknown; as the rivals' fits have it
_MIN_RECENT = 3
_ASKED = (0.4, 0.6)
_BLOCKS = 4
_FEWEST = 5
_FULL_RECORD, _STRIDE = 20, 1.05
_TRUST, _NEAR, _DOUBT = 0.01, 0.015, 10.0
_ODDS, _STEEPNESS = 4.0, 6
_THIRDS, _DOUBT_OF_FIT, _SHARPNESS = 3, 4.0, 4
_NEAR_ENOUGH = 0.005  # of the range: no shape is exactly true
_LEAST_SEEN = 1e-3  # of a rise: standard deviation of the shape over the rewards
_ALONE = 1.0 - 1e-6  # leverage of a reward that the fit follows exactly
_SD_OF_JUMP = 0.5 * math.sqrt(math.pi)  # of a normal, over the mean distance of two; one jump of the run itself hardly shows
_FADE = 0.05
_SDS_OF_WIDTH = 3.29
_TINY = 1e-12


@dataclass(frozen=True)
class Say:
    """Plain forecasts of the whole budget, and their weights.

    Attributes:
        weights: (3,) of :data:`EXPERTS`; the rest to 1 is the posterior's.
        curves: (3, 65) mean rewards at even places of the budget.
        now: progress so far.
    """

    weights: Array
    curves: Array
    now: float

    def correction(self, x: Array, median: Array, width: Array) -> tuple[Array, Array]:
        """Shift of the posterior's median, and the factor for deviations from it, where the forecasters disagree.

        Args:
            x: (K,) progress.
            median: (K,) the posterior's.
            width: (K,) of its 90 % interval.

        Returns:
            The shift, (K,) in reward units: 0 for what lies behind, and growing to its full size over the next twentieth of the
            budget. The widening, (K,) of at least 1: the mixture's standard deviation over the posterior's, which the interval
            stands for.
        """
        told = np.stack([np.interp(x, _PLACES, curve) for curve in self.curves])
        away = (told - median) * np.clip((x - self.now) / _FADE, 0.0, 1.0)
        shift = np.asarray(self.weights @ away)
        between = np.maximum(self.weights @ away**2 - shift**2, 0.0)
        return shift, np.asarray(np.sqrt(1.0 + between / np.maximum(width / _SDS_OF_WIDTH, _TINY) ** 2), dtype=np.float64)


class Stack:
    """Follows one run: its rewards, and what plain forecasts were made of them."""

    def __init__(self) -> None:
        self._places: list[float] = []
        self._sums = [0.0]
        self._jumps = 0.0
        self._records: list[tuple[int, Array]] = []

    def add(self, posterior: Posterior, reward: float, bounds: tuple[float, float]) -> None:
        """Takes the reward that ``posterior`` took last.

        Args:
            posterior: its running sums.
            reward: the reward.
            bounds: least and greatest level that a fit may have.
        """
        if self._places:
            self._jumps += abs(reward - self._mean(len(self._places) - 1, len(self._places)))
        self._places.append(posterior.progress)
        self._sums.append(self._sums[-1] + reward)
        size = len(self._places)
        if size > 1 and (size <= _FULL_RECORD or size >= self._records[-1][0] * _STRIDE):
            self._records.append((size, self._plain(*least_squares(posterior, bounds))[0]))

    def say(self, posterior: Posterior, bounds: tuple[float, float], unit: float) -> Say:
        """The plain forecasts now; ``unit`` is the range of rewards."""
        size = len(self._places)
        if size < _FEWEST:
            return Say(np.zeros(len(EXPERTS)), np.zeros((len(EXPERTS), _PLACES.size)), posterior.progress)
        fits = least_squares(posterior, bounds)
        plain, fit = self._plain(*fits)
        any_shape = np.clip(self._any_shape(posterior, *fits), *bounds)
        edges = np.linspace(0, size, _BLOCKS + 1).round().astype(int)
        blocks = [self._mean(start, end) for start, end in itertools.pairwise(np.unique(edges))]
        moved = max(max(blocks) - min(blocks), 1e-3 * unit)
        known = size / (size + _DOUBT)
        trust = known * fit * (_NEAR / (_NEAR + self._errors() / moved)) ** 2
        odds = _ODDS * (posterior.progress / max(1.0 - posterior.progress, _TINY)) ** _STEEPNESS * known
        share = odds / (1.0 + odds) * self._fit_now(any_shape, unit)
        weights = np.append((1.0 - share) * trust / (_TRUST + trust.sum()), share)
        return Say(weights, np.vstack([plain, any_shape]), posterior.progress)

    def _errors(self) -> Array:
        """(2,) root mean square errors of the exponential and the recent mean in their tests."""
        size = len(self._places)
        recent = round((1.0 - RECENT) * size)
        asked = []
        for share in _ASKED:
            before = bisect_right(self._records, max(2, round(share * size)), key=lambda record: record[0]) - 1
            count, foretold = self._records[before]
            asked.append(self._missed(foretold, max(count, recent)))
        return np.asarray(np.sqrt(np.mean(np.square(asked), axis=0)))

    def _missed(self, curves: Array, start: int) -> Array:
        """(F,) by how much F curves miss the mean of the rewards from a place on."""
        told = [np.interp(self._places[start:], _PLACES, curve).mean() for curve in curves]
        return np.array(told) - self._mean(start, len(self._places))

    def _fit_now(self, curve: Array, unit: float) -> float:
        """1 if the newest rewards scatter about a curve as noise explains, towards 0 the farther they lie from it."""
        count = self._num_recent()
        missed = np.diff(self._sums[-count - 1 :]) - np.interp(self._places[-count:], _PLACES, curve)
        missed[np.abs(missed).argmax()] = 0.0
        noise = (_SD_OF_JUMP * self._jumps / (len(self._places) - 1)) ** 2
        thirds = [(part.mean(), noise / part.size) for part in np.array_split(missed, _THIRDS)]
        apart = np.mean([mean**2 / (variance + (_NEAR_ENOUGH * unit) ** 2) for mean, variance in thirds])
        excess = max(float(apart) - 1.0, 0.0)
        return float(1.0 / (1.0 + (excess / _DOUBT_OF_FIT) ** _SHARPNESS))

    def _mean(self, start: int, end: int) -> float:
        return (self._sums[end] - self._sums[start]) / (end - start)

    def _num_recent(self) -> int:
        size = len(self._places)
        return min(size, max(_MIN_RECENT, round(RECENT * size)))

    def _plain(self, start: Array, end: Array, loss: Array) -> tuple[Array, Array]:
        """(2, 65) exponential and recent mean, and (2,) S_best / S_i; 1 where nothing is fitted."""
        best = GRID.exponentials[np.argmin(loss[GRID.exponentials])]
        size = len(self._places)
        recent = self._mean(size - self._num_recent(), size)
        curves = np.stack([start[best] + (end[best] - start[best]) * _TABLE[best], np.full(_PLACES.size, recent)])
        return curves, np.array([max(float(loss.min()), _TINY) / max(float(loss[best]), _TINY), 1.0])

    def _any_shape(self, posterior: Posterior, start: Array, end: Array, loss: Array) -> Array:
        """(65,) mean over all rising shapes and over none."""
        size = len(self._places)
        evidence = size / (1.0 + size / EVIDENCE_STEPS)
        asked = _asked_for_newest(posterior, self._mean(size - 1, size), start, end, loss)
        log_fit = -0.5 * evidence * np.log(np.maximum(asked, _TINY))
        log_fit[:-1] += _LOG_CLASS - 0.5 * np.log(evidence)
        weight = np.exp(log_fit - log_fit.max())
        weight /= weight.sum()
        rising = start[:, None] + (end - start)[:, None] * _TABLE
        return np.asarray(weight[:-1] @ rising + weight[-1] * _level(posterior))


def bounds_of(reward_range: tuple[float, float] | None, seen: tuple[float, float]) -> tuple[float, float]:
    """Bounds of a fit's levels: the known range, or the observed one and half its span on either side."""
    if reward_range is not None:
        return reward_range
    margin = _HALF_SPAN * max(seen[1] - seen[0], 1e-9)
    return seen[0] - margin, seen[1] + margin


def _unit_sums(posterior: Posterior) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Sums of 11, 1y, yy and, for each rising shape u that tends to 1, (R,) of 1u, uu, uy; without drift, less the centre."""
    (one, y, yy), shaped = posterior.sums()
    u, uu, uy = shaped[0, _RISING] / _ASYMPTOTE, shaped[1, _RISING] / _ASYMPTOTE**2, shaped[2, _RISING] / _ASYMPTOTE
    return one, y, yy, u, uu, uy


def _level(posterior: Posterior) -> float:
    one, y, _ = posterior.sums()[0]
    return float(y / one + posterior.centre)


def _asked_for_newest(posterior: Posterior, newest: float, start: Array, end: Array, loss: Array) -> Array:
    """(R + 1,) sums of squares of every rising shape and of no rise, the newest reward foretold by the fit to the others.

    A fit that leaves ``r`` of a reward of leverage ``h`` misses it by ``r / (1 - h)`` when it is not told it. One that has the
    rise from that reward alone foretells nothing else than the mean, which is also the most that any is charged.
    """
    one, y, yy, u, uu, _ = _unit_sums(posterior)
    mean_u, at = u / one, GRID.rise(np.array([posterior.progress]))[_RISING, 0] / _ASYMPTOTE
    scatter = uu - one * mean_u**2
    leverage = (1.0 / one + (at - mean_u) ** 2 / np.maximum(scatter, _TINY)) / posterior.noise
    left, off = newest - start - (end - start) * at, newest - _level(posterior)
    worst = (off / (1.0 - 1.0 / (one * posterior.noise))) ** 2
    foretold = np.where(leverage < _ALONE, (left / np.maximum(1.0 - leverage, 1.0 - _ALONE)) ** 2, worst)
    missed = np.append(np.maximum(np.minimum(foretold, worst), left**2) - left**2, worst - off**2)
    return np.asarray(np.append(loss, yy - y**2 / one) + missed / posterior.noise)


def least_squares(posterior: Posterior, bounds: tuple[float, float]) -> tuple[Array, Array, Array]:
    """Every rising shape, fitted to a run from its running sums, start and end inside their bounds.

    A shape of which the run tells nothing (its rise is to come, or was over before the first reward) is fitted as a level.

    Args:
        posterior: the sums, of which those without drift are used.
        bounds: least and greatest start and end, in reward units.

    Returns:
        (R,) start, end (what the shape tends to, budget or not), and the weighted sum of squares that is left.
    """
    one, y, yy, u, uu, uy = _unit_sums(posterior)
    # y = start (1 - u) + end u.
    aa, ab, ay = one - 2.0 * u + uu, u - uu, y - uy
    low, high = bounds[0] - posterior.centre, bounds[1] - posterior.centre

    def loss(start: Array, end: Array) -> Array:
        left: Array = yy - 2.0 * (start * ay + end * uy) + start**2 * aa + 2.0 * start * end * ab + end**2 * uu
        return left

    def other(fixed: Array, own: Array, product: Array) -> Array:
        return np.asarray(np.clip((product - fixed * ab) / np.maximum(own, _TINY), low, high), dtype=np.float64)

    determinant = aa * uu - ab**2
    told = determinant > (_LEAST_SEEN * one) ** 2
    safe, level = np.where(told, determinant, 1.0), np.clip(y / one, low, high)
    start, end = np.where(told, (uu * ay - ab * uy) / safe, level), np.where(told, (aa * uy - ab * ay) / safe, level)
    inside = (np.minimum(start, end) >= low) & (np.maximum(start, end) <= high)
    tried = [(start, end, np.where(inside, loss(start, end), np.inf))]
    for edge in (np.full_like(aa, low), np.full_like(aa, high)):
        best_end, best_start = other(edge, uu, uy), other(edge, aa, ay)
        pairs = ((edge, best_end), (best_start, edge))
        tried += [(*pair, np.where(told, loss(*pair), np.inf)) for pair in pairs]
    starts, ends, losses = (np.stack(column) for column in zip(*tried, strict=True))
    pick = losses.argmin(axis=0)[None]
    start, end, left = (np.take_along_axis(rows, pick, axis=0)[0] for rows in (starts, ends, losses))
    return start + posterior.centre, end + posterior.centre, left
