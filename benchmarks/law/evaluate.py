"""How far forecasts are from what came, and how often their intervals hold it.

A forecaster sees the first 20, 40, 60 or 80 % of a run's points and is asked for two things: the mean of the last 20 % of the
points (the *level*, whose error over the smoothed range is the headline measure) and the mean of the last 5 % (the *final*
reward). Figures are averaged inside each repository first and over repositories then, so that no large sweep decides them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from scipy.special import ndtri

from benchmarks.law.curves import Array, Curve, repositories, smoothed

SHARES = (0.2, 0.4, 0.6, 0.8)
LEVEL, FINAL = "level", "final"
TARGETS = (LEVEL, FINAL)
_TAIL = {LEVEL: 0.2, FINAL: 0.05}


@dataclass(frozen=True)
class Seen:
    """What a forecaster may know: the run so far, its budget, and what stands in its configuration.

    Attributes:
        steps: (k,) steps so far.
        rewards: (k,) their rewards.
        horizon: last step of the budget.
        reward_range: bounds of a mean reward; None where unknown.
        validation: whether these are held-out accuracies.
        size_b: parameters in 1e9; NaN where unknown.
        num_prompts: prompts behind a point; 0 where unknown.
        num_generations: completions per prompt; 0 where unknown.
        algorithm: as published.
        schedule: (steps, share of the summed learning rate behind each) of the whole budget, which a run knows beforehand; None
            where the learning rate is unknown and taken to be constant.
    """

    steps: Array
    rewards: Array
    horizon: float
    reward_range: tuple[float, float] | None = None
    validation: bool = False
    size_b: float = math.nan
    num_prompts: int = 0
    num_generations: int = 0
    algorithm: str = ""
    schedule: tuple[Array, Array] | None = None

    @property
    def range(self) -> float:
        """Smoothed range of what was seen."""
        return float(np.ptp(smoothed(self.rewards)))

    def time(self, steps: Array) -> Array:
        """Share of the budget's steps in (0, 1] at given steps; a run that counts from 0 is moved by one step."""
        shift = 1.0 if self.steps[0] <= 0 else 0.0
        return np.asarray((steps + shift) / (self.horizon + shift))

    def progress(self, steps: Array) -> Array:
        """Share of the budget's summed learning rate, where the schedule is known; else :meth:`time`."""
        return self.time(steps) if self.schedule is None else np.asarray(np.interp(steps, *self.schedule))


def seen_of(curve: Curve, size: int) -> Seen:
    """The first ``size`` points of a curve."""
    generations = max(curve.group_size, 1)
    return Seen(
        steps=curve.steps[:size],
        rewards=curve.rewards[:size],
        horizon=curve.horizon,
        reward_range=curve.reward_range,
        validation=curve.validation,
        size_b=curve.size_b,
        num_prompts=curve.rollouts // generations,
        num_generations=curve.group_size,
        algorithm=curve.algorithm,
        schedule=None if curve.clock is None else (curve.steps, curve.clock),
    )


@dataclass(frozen=True)
class Prediction:
    """What is believed of the mean reward over a set of steps.

    Attributes:
        point: the best guess; the median of the samples where there are any.
        samples: (N,) possible mean rewards, without the noise of the points themselves; None for a bare guess.
        weights: (N,) that sum to 1; None for equal ones.
        noise_sd: standard deviation of one reward around the mean curve, as believed; 0 leaves it out.
    """

    point: float
    samples: Array | None = None
    weights: Array | None = None
    noise_sd: float = 0.0


class Forecaster(Protocol):
    """Anything that can be judged. ``fit`` may be missing; it returns the forecaster to be used, and changes nothing else."""

    name: str

    def forecast(self, seen: Seen, targets: Sequence[Array]) -> Sequence[Prediction]:
        """One prediction of the mean reward for each (J,) array of steps."""
        ...


@dataclass(frozen=True)
class Record:
    """One forecast against what came. Errors are in units of the curve's smoothed range, ``unit`` of them in reward.

    Attributes:
        forecaster: its name.
        curve: the curve.
        share: share of the points that was seen.
        target: LEVEL or FINAL.
        error: |guess - truth|.
        signed: guess - truth.
        crps: continuous ranked probability score; NaN for a bare guess, as are the following.
        inside50: whether the 50 % interval held the truth.
        inside90: the 90 % interval.
        width90: its width.
        log_score: log density at the truth, in units of the smoothed range, of a kernel estimate.
    """

    forecaster: str
    curve: Curve = field(repr=False)
    share: float
    target: str
    error: float
    signed: float
    crps: float = math.nan
    inside50: float = math.nan
    inside90: float = math.nan
    width90: float = math.nan
    log_score: float = math.nan


def num_seen(size: int, share: float) -> int:
    """Points of ``size`` that count as ``share`` of the run."""
    return max(2, round(share * size))


def tail_of(size: int, target: str) -> int:
    """Points at the end that are the target."""
    return max(1, round(_TAIL[target] * size))


def evaluate(
    forecasters: Iterable[Forecaster],
    curves: Sequence[Curve],
    *,
    shares: Sequence[float] = SHARES,
    told: Callable[[str], None] = lambda _: None,
) -> list[Record]:
    """Every forecaster on every curve; one that learns is fitted on all repositories but the tested one, if there are others.

    Curves whose smoothed range is 0 have no unit and are left out (a fitted forecaster still sees them).
    """
    records: list[Record] = []
    for forecaster in forecasters:
        fit = getattr(forecaster, "fit", None)
        for repository in repositories(curves):
            others = [curve for curve in curves if curve.repository != repository]
            fitted = fit(others) if fit is not None and others else forecaster
            for curve in curves:
                if curve.repository == repository and curve.smoothed_range > 0:
                    records.extend(_judged(fitted, forecaster.name, curve, shares))
        told(forecaster.name)
    return records


def _judged(forecaster: Forecaster, name: str, curve: Curve, shares: Sequence[float]) -> Iterable[Record]:
    size = curve.rewards.size
    tails = {target: tail_of(size, target) for target in TARGETS}
    truths = {target: float(curve.rewards[-tail:].mean()) for target, tail in tails.items()}
    for share in shares:
        seen = seen_of(curve, num_seen(size, share))
        predictions = forecaster.forecast(seen, [curve.steps[-tail:] for tail in tails.values()])
        for (target, tail), prediction in zip(tails.items(), predictions, strict=True):
            yield score(prediction, truths[target], tail, curve=curve, share=share, target=target, forecaster=name)


def score(prediction: Prediction, truth: float, tail: int, **where: Any) -> Record:
    """One prediction against the observed mean of ``tail`` rewards, whose own noise is part of what has to be covered."""
    unit = where["curve"].smoothed_range
    signed = (prediction.point - truth) / unit
    if not math.isfinite(signed):
        raise ValueError(f"{where['forecaster']} forecast {prediction.point} for {where['curve'].name}")
    bare = Record(error=abs(signed), signed=signed, **where)
    if prediction.samples is None:
        return bare
    samples, weights = _with_noise(prediction, tail)
    samples = (samples - truth) / unit
    order = np.argsort(samples, kind="stable")
    samples, weights = samples[order], weights[order]
    q05, q25, q75, q95 = _quantiles(samples, weights, np.array([0.05, 0.25, 0.75, 0.95]))
    return Record(
        error=abs(signed),
        signed=signed,
        crps=_crps(samples, weights),
        inside50=float(q25 <= 0.0 <= q75),
        inside90=float(q05 <= 0.0 <= q95),
        width90=float(q95 - q05),
        log_score=_log_density(samples, weights),
        **where,
    )


def _with_noise(prediction: Prediction, tail: int) -> tuple[Array, Array]:
    samples = np.asarray(prediction.samples, dtype=np.float64)
    size = samples.size
    weights = np.full(size, 1.0 / size) if prediction.weights is None else np.asarray(prediction.weights, dtype=np.float64)
    if prediction.noise_sd <= 0:
        return samples, weights
    golden = (np.arange(1, size + 1) * 0.6180339887498949) % 1.0
    return samples + prediction.noise_sd / math.sqrt(tail) * ndtri(np.clip(golden, 1e-4, 1 - 1e-4)), weights


def _quantiles(ranked: Array, weights: Array, probabilities: Array) -> Array:
    centre = np.cumsum(weights) - 0.5 * weights
    return np.asarray(np.interp(probabilities, centre, ranked))


def _crps(ranked: Array, weights: Array) -> float:
    """E|X - 0| - E|X - X'| / 2 of a weighted, sorted sample."""
    below = np.cumsum(weights) - 0.5 * weights
    return float(weights @ np.abs(ranked) - weights @ (ranked * (2.0 * below - 1.0)))


def _log_density(ranked: Array, weights: Array) -> float:
    """Log density at 0 of a Gaussian kernel estimate: Silverman's width on the 50 % interval, mixed with 1 % of a wide one."""
    q25, q75 = _quantiles(ranked, weights, np.array([0.25, 0.75]))
    effective = 1.0 / float(weights @ weights)
    width = max(0.9 * (q75 - q25) / 1.349 * effective**-0.2, 1e-3)
    near = float(weights @ np.exp(-0.5 * (ranked / width) ** 2)) / (width * math.sqrt(2 * math.pi))
    middle = float(weights @ ranked)
    far = math.exp(-0.5 * middle**2) / math.sqrt(2 * math.pi)
    return math.log(0.99 * near + 0.01 * far + 1e-12)


def pooled(records: Iterable[Record], measure: str = "error") -> float:
    """Mean of a measure: inside each repository first, then over repositories. NaN without records."""
    groups: dict[str, list[float]] = defaultdict(list)
    for record in records:
        value = float(getattr(record, measure))
        if math.isfinite(value):
            groups[record.curve.repository].append(value)
    return float(np.mean([np.mean(values) for values in groups.values()])) if groups else math.nan


def table(
    records: Sequence[Record],
    *,
    measure: str = "error",
    target: str = LEVEL,
    chosen: Callable[[Curve], bool] = lambda _: True,
) -> Mapping[str, list[float]]:
    """Pooled measure of each forecaster at each share seen."""
    names = list(dict.fromkeys(record.forecaster for record in records))
    shares = sorted({record.share for record in records})
    of: dict[tuple[str, float], list[Record]] = defaultdict(list)
    for record in records:
        if record.target == target and chosen(record.curve):
            of[record.forecaster, record.share].append(record)
    return {name: [pooled(of[name, share], measure) for share in shares] for name in names}


def samples_from_quantiles(probabilities: Sequence[float], values: Sequence[float], size: int = 199) -> Array:
    """Evenly spaced quantiles of a distribution that is known at a few: straight in normal scores between and beyond them."""
    scores, wanted = ndtri(np.asarray(probabilities)), ndtri((np.arange(size) + 0.5) / size)
    known = np.asarray(values, dtype=np.float64)
    inner = np.interp(wanted, scores, known)
    left = known[0] + (wanted - scores[0]) * (known[1] - known[0]) / (scores[1] - scores[0])
    right = known[-1] + (wanted - scores[-1]) * (known[-1] - known[-2]) / (scores[-1] - scores[-2])
    return np.asarray(np.where(wanted < scores[0], left, np.where(wanted > scores[-1], right, inner)))
