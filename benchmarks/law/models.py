"""The package's own predictor as something that can be judged beside the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.law.curves import Array, Curve
from benchmarks.law.evaluate import Prediction, Seen, seen_of
from grpo_fast.law import Band, Forecast, OnlinePredictor, Prior, RewardCurve, RunFacts
from grpo_fast.law.fitting import Witness, fit_witnesses, witness

EPSILON = 0.01
_NO_BAND = Band((), (), (), ())


class Law:
    """``OnlinePredictor``, with a prior that is fitted on the repositories that are not tested.

    Args:
        name: its name in the tables.
        prior: to be kept, whatever there is to learn from; None learns.
    """

    def __init__(self, name: str = "grpo_fast.law", *, prior: Prior | None = None) -> None:
        self.name = name
        self.prior = prior
        self._witnesses: dict[tuple[str, str], Witness] = {}
        self._fitted: dict[tuple[tuple[str, str], ...], Law] = {}
        self._online: dict[tuple[str, str], list[Forecast]] = {}

    def fit(self, curves: Sequence[Curve]) -> Law:
        """The law whose prior knows these curves; the same object for the same curves."""
        if self.prior is not None:
            return self
        key = tuple((curve.repository, curve.name) for curve in curves)
        if key not in self._fitted:
            self._fitted[key] = Law(self.name, prior=fit_witnesses(self.witnesses(curves)))
        return self._fitted[key]

    def forecast(self, seen: Seen, targets: Sequence[Array]) -> list[Prediction]:
        """Mean level over each target, from the posterior's sample."""
        predictor = self._predictor(reward_curve_of(seen))
        noise = noise_sd(seen.rewards)
        out = []
        for steps in targets:
            values, weights = predictor.levels(seen.progress(steps))
            levels = values.mean(axis=1)
            order = np.argsort(levels, kind="stable")
            middle = float(np.interp(0.5, np.cumsum(weights[order]) - 0.5 * weights[order], levels[order]))
            out.append(Prediction(middle, levels, weights, noise_sd=noise))
        return out

    def online(self, curve: Curve) -> list[Forecast]:
        """Forecasts after every point of a run, made once and asked by many rules; without their bands."""
        key = (curve.repository, curve.name)
        if key not in self._online:
            run = reward_curve_of(seen_of(curve, curve.rewards.size))
            predictor, steps = self._empty(run), steps_of(run, share=1.0)
            self._online[key] = [
                replace(predictor.observe(step, float(x), float(reward), **_counts(run)), band=_NO_BAND)
                for step, x, reward in zip(steps, run.progress, run.rewards, strict=True)
            ]
        return self._online[key]

    def witnesses(self, curves: Sequence[Curve]) -> list[Witness]:
        """What each curve says, made once."""
        return [self._witness(curve) for curve in curves]

    def _witness(self, curve: Curve) -> Witness:
        key = (curve.repository, curve.name)
        if key not in self._witnesses:
            run = reward_curve_of(seen_of(curve, curve.rewards.size))
            self._witnesses[key] = witness(replace(run, source=curve.repository))
        return self._witnesses[key]

    def _empty(self, run: RewardCurve) -> OnlinePredictor:
        prior = self.prior or Prior.default()
        return OnlinePredictor(run.horizon, epsilon=EPSILON, reward_range=run.reward_range, facts=run.facts, prior=prior)

    def _predictor(self, run: RewardCurve) -> OnlinePredictor:
        predictor, steps = self._empty(run), steps_of(run, share=float(run.progress[-1]))
        for step, x, reward in zip(steps, run.progress, run.rewards, strict=True):
            predictor.absorb(step, float(x), float(reward), **_counts(run))
        return predictor


def steps_of(run: RewardCurve, *, share: float) -> list[int]:
    """A step of the budget for each of a run's points, which are spread over the first ``share`` of it."""
    size = run.rewards.size
    last = max(size, round(share * run.horizon))
    return [-(-point * last // size) for point in range(1, size + 1)]


def reward_curve_of(seen: Seen) -> RewardCurve:
    """What the law takes of a run."""
    low, high = seen.reward_range or (-np.inf, np.inf)
    return RewardCurve(
        rewards=np.clip(seen.rewards, low, high),
        progress=np.clip(seen.progress(seen.steps), 1e-9, 1.0),
        horizon=max(seen.rewards.size, math.ceil(seen.horizon)),
        reward_range=seen.reward_range,
        facts=RunFacts(
            size_b=None if math.isnan(seen.size_b) else seen.size_b,
            lora="lora" in seen.algorithm.lower(),
            validation=seen.validation,
        ),
        num_prompts=max(seen.num_prompts, 1),
        num_generations=max(seen.num_generations, 1),
    )


def _counts(run: RewardCurve) -> dict[str, Any]:
    return {"num_prompts": run.num_prompts, "num_generations": run.num_generations}


def noise_sd(rewards: Array) -> float:
    """Scatter of one reward about its mean curve, from second differences of the last half."""
    half = rewards[-max(5, rewards.size // 2) :]
    return float(np.sqrt(np.mean(np.diff(half, 2) ** 2) / 6.0)) if half.size >= 3 else 0.0
