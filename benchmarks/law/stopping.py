"""Replayed stops: what each rule would have saved on runs that went on to their end, and what it would have lost.

A rule sees one reward after the other. It may stop after any point but the last, and not within the first tenth of the run.
What a stop loses is measured on the curve without its noise (:mod:`benchmarks.law.hindsight`, or the known mean of a simulated
one): the level at the end less the level at the stop, 0 where the curve fell. Only rewards in [0, 1] are judged: 0.01 of an
unknown scale means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.law.baselines import Fit
from benchmarks.law.curves import Curve, repositories, thinned
from benchmarks.law.evaluate import pooled, seen_of
from benchmarks.law.models import EPSILON, Law
from grpo_fast.law import StoppingRule

FIRST = 0.1
FALSE, BAD = 0.02, 0.05


class Stopper(Protocol):
    """A rule. ``fit`` may be missing, as with a forecaster."""

    name: str

    def stop(self, curve: Curve) -> int | None:
        """Points after which the run is stopped; None where it goes on to its end. Later points must not matter."""
        ...


@dataclass(frozen=True)
class Stop:
    """One rule on one run.

    Attributes:
        rule: its name.
        curve: the run.
        saved: share of the run's points that was not trained.
        lost: level at the end less level at the stop, at least 0.
        change: the same with its sign.
        error: standard error of ``change`` from the curve's own scatter; 0 where the mean is known.
        lost_at_best: what is lost of the best checkpoint.
        stopped: whether the rule stopped at all.
        oracle_saved: what the hindsight oracle saves on this run.
    """

    rule: str
    curve: Curve = field(repr=False)
    saved: float
    lost: float
    change: float
    error: float
    lost_at_best: float
    stopped: bool
    oracle_saved: float

    @property
    def false(self) -> float:
        """1 where over 0.02 are lost."""
        return float(self.lost > FALSE)

    @property
    def bad(self) -> float:
        """1 where over 0.05 are lost."""
        return float(self.lost > BAD)

    @property
    def surely_false(self) -> float:
        """1 where over 0.02 are lost even at the lower end of the loss's 90 % interval."""
        return float(self.change - 1.645 * self.error > FALSE)

    @property
    def missed(self) -> float:
        """1 where the oracle saves at least a fifth of the run and the rule stops nothing; NaN where it saves less."""
        return float(not self.stopped) if self.oracle_saved >= 0.2 else math.nan

    @property
    def utility(self) -> float:
        """Share saved at a price of 0.05 reward for a whole run, less what is lost."""
        return 0.05 * self.saved - self.lost


def first_point(size: int) -> int:
    """Points after which a rule may first stop."""
    return max(2, math.ceil(FIRST * size))


def replay(
    stoppers: Iterable[Stopper],
    curves: Sequence[Curve],
    *,
    told: Callable[[str], None] = lambda _: None,
) -> list[Stop]:
    """Every rule on every run of unit rewards; one that learns is fitted on all repositories but the tested one, if any."""
    judged = [thinned(curve) for curve in curves if curve.unit_interval]
    oracle = {(curve.repository, curve.name): Oracle().stop(curve) for curve in judged}
    stops = []
    for stopper in stoppers:
        fit = getattr(stopper, "fit", None)
        for repository in repositories(judged):
            others = [curve for curve in curves if curve.repository != repository]
            fitted = fit(others) if fit is not None and others else stopper
            stops += [
                judge(stopper.name, curve, fitted.stop(curve), oracle=oracle[curve.repository, curve.name])
                for curve in judged
                if curve.repository == repository
            ]
        told(stopper.name)
    return stops


def judge(rule: str, curve: Curve, size: int | None, *, oracle: int | None = None) -> Stop:
    """A stop after ``size`` points against what came; None is no stop."""
    past = curve.hindsight
    total = curve.rewards.size
    kept = total if size is None else size
    change, error = past.lost(kept) if size is not None else (0.0, 0.0)
    return Stop(
        rule=rule,
        curve=curve,
        saved=1.0 - kept / total,
        lost=max(change, 0.0),
        change=change,
        error=error,
        lost_at_best=past.lost_at_best(kept),
        stopped=size is not None,
        oracle_saved=0.0 if oracle is None else 1.0 - oracle / total,
    )


@dataclass(frozen=True)
class Oracle:
    """Hindsight: the earliest permitted point whose level lies at most 0.01 below the end's."""

    name: str = "hindsight oracle"

    def stop(self, curve: Curve) -> int | None:
        """The point; it knows the future, as nothing else here does."""
        past, size = curve.hindsight, curve.rewards.size
        return next((k for k in range(first_point(size), size) if past.lost(k)[0] <= EPSILON), None)


@dataclass(frozen=True)
class Fixed:
    """A share of the budget, whatever the rewards say: 40 % and 80 % are the two versions of the seed paper."""

    share: float

    @property
    def name(self) -> str:
        """With its share."""
        return f"fixed {self.share:.0%}"

    def stop(self, curve: Curve) -> int:
        """That share."""
        return round(self.share * curve.rewards.size)


@dataclass(frozen=True)
class Patience:
    """Stops when the mean of the last tenth of the budget has not beaten its best by 0.005 for a share of the budget."""

    share: float

    @property
    def name(self) -> str:
        """With its share."""
        return f"patience {self.share:.0%}"

    def stop(self, curve: Curve) -> int | None:
        """The first such point."""
        size = curve.rewards.size
        window = max(5, round(0.1 * size))
        best, since = -math.inf, 0
        for k in range(first_point(size), size):
            mean = float(curve.rewards[max(0, k - window) : k].mean())
            if mean > best + EPSILON / 2:
                best, since = mean, k
            elif k - since >= self.share * size:
                return k
        return None


@dataclass(frozen=True)
class PlugIn:
    """Stops when a least-squares fit leaves a gain under 0.01, three checks in a row; a check every fiftieth of the budget."""

    fit_of: Fit
    checks: int = 3

    @property
    def name(self) -> str:
        """The fit's."""
        return f"plug-in, {self.fit_of.name}"

    def stop(self, curve: Curve) -> int | None:
        """The first such point."""
        size, row = curve.rewards.size, 0
        for k in range(first_point(size), size, max(1, size // 50)):
            now, end = self.fit_of.forecast(seen_of(curve, k), [curve.steps[k - 1 : k], curve.steps[-1:]])
            row = row + 1 if end.point - now.point < EPSILON else 0
            if row >= self.checks:
                return k
        return None


@dataclass(frozen=True)
class LawStop:
    """The package's own rule on its own forecasts.

    Attributes:
        law: where the forecasts come from.
        confidence: demanded probability of a gain below 0.01.
    """

    law: Law = field(repr=False)
    confidence: float = 0.78

    @property
    def name(self) -> str:
        """The law's, with the confidence."""
        return f"{self.law.name}, {self.confidence:g}"

    def fit(self, curves: Sequence[Curve]) -> LawStop:
        """The rule on a law that knows these curves."""
        return LawStop(self.law.fit(curves), self.confidence)

    def stop(self, curve: Curve) -> int | None:
        """The first point at which ``StoppingRule`` stops."""
        forecasts = self.law.online(curve)
        size = len(forecasts)
        rule = StoppingRule(EPSILON, confidence=self.confidence, min_steps=forecasts[first_point(size) - 1].step)
        for k, forecast in enumerate(forecasts[: size - 1], start=1):
            if rule.update(forecast).stop:
                return k
        return None


def summary(stops: Sequence[Stop]) -> dict[str, float]:
    """Figures of one rule, each repository once."""
    oracle, saved = pooled(stops, "oracle_saved"), pooled(stops, "saved")
    names = ("lost", "change", "lost_at_best", "false", "bad", "surely_false", "missed", "utility")
    return {
        "saved": saved,
        "share_of_oracle": saved / oracle if oracle > 0 else math.nan,
        **{name: pooled(stops, name) for name in names},
    }
