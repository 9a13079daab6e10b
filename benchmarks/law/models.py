"""The package's own predictor as something that can be judged beside the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from benchmarks.law.curves import Array, Curve
from benchmarks.law.evaluate import Prediction, Seen, samples_from_quantiles, seen_of
from grpo_fast.law import Band, Forecast, OnlinePredictor, Settings

EPSILON = 0.01
_NO_BAND = Band((), (), (), ())


class Law:
    """``OnlinePredictor`` with one prior, or with one that is fitted on the repositories that are not tested.

    Args:
        name: its name in the tables.
        settings: the prior.
        fitting: makes the prior from curves; None keeps ``settings`` throughout.
    """

    def __init__(
        self,
        name: str = "grpo_fast.law",
        *,
        settings: Settings | None = None,
        fitting: Callable[[Sequence[Curve]], Settings] | None = None,
    ) -> None:
        self.name = name
        self.settings = settings or Settings()
        self._fitting = fitting
        self._fitted: dict[tuple[tuple[str, str], ...], Law] = {}
        self._online: dict[tuple[str, str], list[Forecast]] = {}

    def fit(self, curves: Sequence[Curve]) -> Law:
        """The law whose prior knows these curves; the same object for the same curves."""
        if self._fitting is None:
            return self
        key = tuple((curve.repository, curve.name) for curve in curves)
        if key not in self._fitted:
            self._fitted[key] = Law(self.name, settings=self._fitting(curves))
        return self._fitted[key]

    def forecast(self, seen: Seen, targets: Sequence[Array]) -> list[Prediction]:
        """The band's median over the target, spread as the interval at the end of the budget is."""
        last = final_forecast(seen, self.settings)
        ends = (last.low, last.interval50[0], last.median, last.interval50[1], last.high)
        samples = samples_from_quantiles((0.05, 0.25, 0.5, 0.75, 0.95), ends)
        at = np.asarray(last.band.step) * (seen.horizon / last.horizon)
        noise = noise_sd(seen.rewards)
        out = []
        for steps in targets:
            point = float(np.interp(steps, at, last.band.median).mean())
            out.append(Prediction(point, samples + (point - last.median), noise_sd=noise))
        return out

    def online(self, curve: Curve) -> list[Forecast]:
        """Forecasts after every point of a run, made once and asked by many rules; without their bands."""
        key = (curve.repository, curve.name)
        if key not in self._online:
            self._online[key] = [replace(forecast, band=_NO_BAND) for forecast in self._observed(curve)]
        return self._online[key]

    def _observed(self, curve: Curve) -> Iterator[Forecast]:
        size = curve.rewards.size
        seen = seen_of(curve, size)
        progress = np.clip(seen.progress(curve.steps), 1e-9, 1.0)
        low, high = curve.reward_range or (-np.inf, np.inf)
        predictor = OnlinePredictor(size, epsilon=EPSILON, reward_range=curve.reward_range, settings=self.settings)
        counts: dict[str, Any] = {"num_prompts": max(seen.num_prompts, 1), "num_generations": max(seen.num_generations, 1)}
        for step, (done, reward) in enumerate(zip(progress, np.clip(curve.rewards, low, high), strict=True), start=1):
            yield predictor.observe(step, float(done), float(reward), **counts)


def noise_sd(rewards: Array) -> float:
    """Scatter of one reward about its mean curve, from second differences of the last half."""
    half = rewards[-max(5, rewards.size // 2) :]
    return float(np.sqrt(np.mean(np.diff(half, 2) ** 2) / 6.0)) if half.size >= 3 else 0.0


def final_forecast(seen: Seen, settings: Settings) -> Forecast:
    """The forecast after the last reward seen, without the ones before it."""
    size = seen.rewards.size
    horizon = max(size + 1, round((seen.horizon - seen.steps[0]) / (seen.steps[-1] - seen.steps[0]) * (size - 1)) + 1)
    progress = np.clip(seen.progress(seen.steps), 1e-9, 1.0)
    low, high = seen.reward_range or (-np.inf, np.inf)
    counts = [max(seen.num_prompts, 1), max(seen.num_generations, 1)]
    rows = [
        [step, float(x), float(np.clip(reward, low, high)), *counts, None]
        for step, (x, reward) in enumerate(zip(progress, seen.rewards, strict=True), start=1)
    ]
    state = {
        "horizon": horizon,
        "epsilon": EPSILON,
        "reward_range": None if seen.reward_range is None else list(seen.reward_range),
        "settings": asdict(settings),
        "rows": rows,
        "last": [rows[-1][0], rows[-1][1]],
        "num_skipped": 0,
    }
    return OnlinePredictor.from_state_dict(state).forecast()
