"""The package's own predictor as something that can be judged beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from benchmarks.law.curves import Array
from benchmarks.law.evaluate import Prediction, Seen, samples_from_quantiles
from grpo_fast.law import Forecast, OnlinePredictor, Settings

_EPSILON = 0.01


@dataclass(frozen=True)
class Law:
    """``OnlinePredictor`` with given settings.

    Attributes:
        name: its name.
        settings: its prior.
    """

    name: str = "grpo_fast.law"
    settings: Settings = field(default_factory=Settings)

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
        "epsilon": _EPSILON,
        "reward_range": None if seen.reward_range is None else list(seen.reward_range),
        "settings": asdict(settings),
        "rows": rows,
        "last": [rows[-1][0], rows[-1][1]],
        "num_skipped": 0,
    }
    return OnlinePredictor.from_state_dict(state).forecast()
