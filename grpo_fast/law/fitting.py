"""A prior from finished runs: empirical Bayes over the same grid that forecasts use.

Each curve counts once: the evidence of every (part, class) for the whole of it, everything else averaged out. The tables of
logits then maximise the mean log evidence, each source of curves counting as one whatever its size, less a ridge that pulls the
tables towards "nothing is known". With few curves the shipped prior is what the ridge holds to.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax, logsumexp

from grpo_fast.law.forms import Array
from grpo_fast.law.posterior import GRID, Believed, Posterior, quantiles
from grpo_fast.law.predictor import OnlinePredictor
from grpo_fast.law.prior import FEATURES, PARTS, SHARES, Prior, RunFacts, RunScale, features
from grpo_fast.law.shapes import CLASSES
from grpo_fast.law.stacking import Say

MAX_POINTS = 200
_TAIL = 0.2
_RIDGE = 3.0
_FEWEST_SOURCES = 10
_Z90 = 1.645
_TINY = 1e-12
_LEAST_SPREAD = 1e-3
_NEUTRAL = Prior(np.zeros((len(PARTS), len(FEATURES))), np.zeros((len(CLASSES), len(FEATURES))))


@dataclass(frozen=True)
class RewardCurve:
    """A finished run.

    Attributes:
        rewards: (n,) finite mean rewards, n >= 2.
        progress: (n,) share of the budget's summed learning rate behind each, in (0, 1], ascending.
        horizon: steps of the budget.
        source: runs of one source (a repository, a project) count as one.
        reward_range: as for :class:`~grpo_fast.law.predictor.OnlinePredictor`.
        facts: what was known beforehand.
        num_prompts: prompts behind a reward.
        num_generations: completions per prompt.

    Raises:
        ValueError: too few rewards, or some that are not finite.
    """

    rewards: Array
    progress: Array
    horizon: int
    source: str = ""
    reward_range: tuple[float, float] | None = None
    facts: RunFacts = field(default_factory=RunFacts)
    num_prompts: int = 1
    num_generations: int = 1

    def __post_init__(self) -> None:
        if self.rewards.shape != self.progress.shape or self.rewards.size < 2:
            raise ValueError(
                f"{self.rewards.size} rewards with {self.progress.size} values of progress; a curve needs at least 2 of each, "
                "and as many of one as of the other"
            )
        if not np.all(np.isfinite(self.rewards)):
            raise ValueError("a curve's rewards must be finite; leave steps without one out")

    def thinned(self) -> RewardCurve:
        """The curve in at most 200 points: means of neighbours, each at the last of their places."""
        size = self.rewards.size
        if size <= MAX_POINTS:
            return self
        edges = np.linspace(0, size, MAX_POINTS + 1).round().astype(int)
        return dataclasses.replace(
            self,
            rewards=np.add.reduceat(self.rewards, edges[:-1]) / np.diff(edges),
            progress=self.progress[edges[1:] - 1],
            num_prompts=round(self.num_prompts * size / MAX_POINTS),
        )


class Seen(NamedTuple):
    """State of knowledge about a run at one time: the posterior's sums, the units, and the plain forecasts."""

    posterior: Posterior
    scale: RunScale
    say: Say


@dataclass(frozen=True)
class Witness:
    """Evidence of one curve, independent of the prior.

    Attributes:
        source: of the curve.
        facts: known beforehand.
        horizon: of the run.
        scale: its units.
        evidence: (P, C) log evidence of part and class.
        seen: at each share of :data:`~grpo_fast.law.prior.SHARES`.
        level: mean reward over the last 20 %.
        tail: (J,) progress at those points.
    """

    source: str
    facts: RunFacts
    horizon: int
    scale: RunScale
    evidence: Array
    seen: tuple[Seen, ...]
    level: float
    tail: Array


def witness(curve: RewardCurve) -> Witness:
    """Computes the evidence of a curve; takes about 0.3 ms per point.

    Its evidence is that of at most 200 points, so that how often a run was logged matters little; forecasts are what they would
    have been on the way.
    """
    few, size = curve.thinned(), curve.rewards.size
    whole, tail = _followed(few), max(1, round(_TAIL * size))
    last = whole[few.rewards.size]
    seen = whole if few is curve else _followed(curve)
    return Witness(
        source=curve.source,
        facts=curve.facts,
        horizon=curve.horizon,
        scale=last.scale,
        evidence=_evidence(last.posterior, _NEUTRAL, last.scale),
        seen=tuple(seen[_num_seen(size, share)] for share in SHARES),
        level=float(curve.rewards[-tail:].mean()),
        tail=curve.progress[-tail:],
    )


def _followed(curve: RewardCurve) -> dict[int, Seen]:
    """State of knowledge at the shares of a curve and at its end, by the number of rewards."""
    size = curve.rewards.size
    predictor = OnlinePredictor(max(size, curve.horizon), reward_range=curve.reward_range, facts=curve.facts, prior=_NEUTRAL)
    stops = {size, *(_num_seen(size, share) for share in SHARES)}
    known: dict[int, Seen] = {}
    for k, (x, reward) in enumerate(zip(curve.progress, curve.rewards, strict=True), start=1):
        predictor.absorb(k, float(x), float(reward), num_prompts=curve.num_prompts, num_generations=curve.num_generations)
        if k in stops:
            known[k] = Seen(copy.deepcopy(predictor.posterior), predictor.scale, predictor.say())
    return known


def _num_seen(size: int, share: float) -> int:
    return max(2, round(share * size))


def fit_prior(curves: Sequence[RewardCurve], *, base: Prior | None = None) -> Prior:
    """Learns a prior from finished runs.

    Args:
        curves: at least one.
        base: the prior without them; None takes "nothing is known".

    Raises:
        ValueError: no curve.
    """
    return fit_witnesses([witness(curve) for curve in curves], base=base)


def fit_witnesses(witnesses: Sequence[Witness], *, base: Prior | None = None) -> Prior:
    """As :func:`fit_prior`, from the evidence of the curves."""
    if not witnesses:
        raise ValueError("a prior needs at least one finished run")
    start = base or _NEUTRAL
    weight = weight_by_source([one.source for one in witnesses])
    known = np.stack([features(one.facts, one.scale, horizon=one.horizon) for one in witnesses])
    evidence = np.stack([one.evidence for one in witnesses])
    tables = _fit_tables(known, evidence - evidence.max(axis=(1, 2), keepdims=True), weight, start)
    parts, classes = (np.round(table, 4) for table in tables)  # as a file keeps them
    fitted = dataclasses.replace(start, part_logits=parts, class_logits=classes, spread=(1.0,) * len(SHARES))
    if len({one.source for one in witnesses}) < _FEWEST_SOURCES:
        return dataclasses.replace(fitted, spread=start.spread)
    return dataclasses.replace(fitted, spread=tuple(round(value, 3) for value in _spread(fitted, witnesses, weight)))


def weight_by_source(sources: Sequence[str]) -> Array:
    """(n,) weights under which every source counts as one, whatever the number of its runs."""
    count = Counter(sources)
    return np.array([1.0 / count[source] for source in sources])


def _evidence(posterior: Posterior, prior: Prior, scale: RunScale) -> Array:
    """(P, C) log evidence with drifts and the shapes of a class averaged out."""
    plain = prior.believed(RunFacts(), scale, horizon=100)
    log_shapes = -np.log(GRID.num_in_class)[GRID.classes]
    flat = Believed(**{**vars(plain), "log_parts": np.zeros(len(PARTS)), "log_shapes": log_shapes})
    each = logsumexp(posterior.solve(flat).log_weight, axis=1)
    return np.stack([logsumexp(each[:, GRID.classes == index], axis=1) for index in range(len(CLASSES))], axis=1)


def _fit_tables(known: Array, evidence: Array, weight: Array, base: Prior) -> tuple[Array, Array]:
    """The two tables, by L-BFGS on the concave-enough penalised mean log evidence."""
    from scipy.optimize import minimize  # noqa: PLC0415 (slow to import, and no forecast needs it)

    num_parts = len(PARTS)
    origin = np.concatenate([base.part_logits, base.class_logits])

    def loss(flat: Array) -> tuple[float, Array]:
        table = flat.reshape(origin.shape)
        log_part, log_class = log_softmax(known @ table[:num_parts].T, axis=1), log_softmax(known @ table[num_parts:].T, axis=1)
        joint = evidence + log_part[:, :, None] + log_class[:, None, :]
        total = logsumexp(joint, axis=(1, 2))
        taken = np.exp(joint - total[:, None, None]) * weight[:, None, None]
        pull = np.concatenate(
            [taken.sum(2) - weight[:, None] * np.exp(log_part), taken.sum(1) - weight[:, None] * np.exp(log_class)], axis=1
        )
        away = table - origin
        return float(0.5 * _RIDGE * (away**2).sum() - weight @ total), (_RIDGE * away - pull.T @ known).ravel()

    found = minimize(loss, origin.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    table = found.x.reshape(origin.shape)
    return table[:num_parts], table[num_parts:]


def _spread(prior: Prior, witnesses: Sequence[Witness], weight: Array) -> tuple[float, ...]:
    """Factors by which intervals of the level must be stretched, at each share, to hold nine in ten runs of an unseen source.

    Every source counts as one, the new one among them, which may need more than any: split conformal prediction over sources.
    """
    num_sources = len({one.source for one in witnesses})
    probability = (0.9 * (num_sources + 1) - 0.5) / num_sources  # a rank among one more, at the middle of its mass
    needed = np.array([[_foretold(prior, one, place).needed(one) for place in range(len(SHARES))] for one in witnesses])
    return tuple(max(_weighted_quantile(column, weight, probability), _LEAST_SPREAD) for column in needed.T)


@dataclass(frozen=True)
class _Foretold:
    """Forecast level of a run's last fifth.

    Attributes:
        low: 5 % quantile of the mean curve's level, not stretched.
        middle: median.
        high: 95 % quantile.
        noise: half-width of the 90 % interval of the rewards' mean about that curve, which no prior can stretch.
        noise_share: as for :meth:`~grpo_fast.law.prior.Prior.spread_at`.
    """

    low: float
    middle: float
    high: float
    noise: float
    noise_share: float

    def needed(self, one: Witness) -> float:
        """The least ``spread`` with which the interval, noise and all, holds what came; negative where any does."""
        away = one.level - self.middle
        side = self.high - self.middle if away > 0 else self.middle - self.low
        factor = math.sqrt(max(away**2 - self.noise**2, 0.0)) / max(side, _TINY)
        return 1.0 + (factor - 1.0) / self.noise_share


def level_errors(prior: Prior, one: Witness) -> Array:
    """Judges a prior: its forecast of the mean of a run's last fifth, from the rewards up to each share.

    Returns:
        (4, 2): for each of :data:`~grpo_fast.law.prior.SHARES` the distance of the median, in units of the range, and whether
        the 90 % interval, stretched as the prior says and with the rewards' noise, holds it (0 or 1).
    """
    told = [_foretold(prior, one, place) for place in range(len(SHARES))]
    return np.array(
        [
            [abs(one.level - each.middle) / one.scale.unit, float(each.needed(one) <= stretch)]
            for each, stretch in zip(told, prior.spread, strict=True)
        ]
    )


def _foretold(prior: Prior, one: Witness, place: int) -> _Foretold:
    """The level, after a share of the run."""
    posterior, scale, say = one.seen[place]
    draws = posterior.draws(prior.believed(one.facts, scale, horizon=one.horizon))
    curves = draws.curve(GRID.rise(one.tail), one.tail, posterior.progress)
    levels = np.clip(curves, scale.low, scale.high).mean(axis=1)
    told = quantiles(levels[:, None], draws.weight, np.array([0.05, 0.5, 0.95]))[:, 0]
    middle, width = (np.full(one.tail.size, value) for value in (told[1], told[2] - told[0]))
    moved, wider = (part.mean() for part in say.correction(one.tail, middle, width))
    low, middle_moved, high = np.clip(told[1] + moved + (told - told[1]) * wider, scale.low, scale.high)
    noise = _Z90 * scale.noise_sd / math.sqrt(one.tail.size)
    return _Foretold(float(low), float(middle_moved), float(high), noise, draws.noise_share)


def _weighted_quantile(values: Array, weight: Array, probability: float) -> float:
    return float(quantiles(values[:, None], weight / weight.sum(), np.array([probability]))[0, 0])
