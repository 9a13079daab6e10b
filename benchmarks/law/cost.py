"""What an observation costs on one core: the predictor is handed a long run and timed at several places in it."""

from __future__ import annotations

import statistics
import time

import numpy as np

from benchmarks.law.models import EPSILON
from grpo_fast.law import OnlinePredictor

PLACES = (100, 1_000, 10_000)
_REPEATS = 15


def cost_ms(places: tuple[int, ...] = PLACES) -> dict[str, dict[str, float]]:
    """Median and worst milliseconds of ``observe`` (update and whole forecast) at given steps of runs of that length."""
    return {str(place): _at(place) for place in places}


def _at(place: int) -> dict[str, float]:
    horizon = place + _REPEATS + 1
    rng = np.random.default_rng(0)
    rewards = np.clip(
        0.8 - 0.6 * np.exp(-np.arange(1, horizon + 1) / (0.2 * horizon)) + 0.05 * rng.standard_normal(horizon), 0, 1
    )
    predictor = OnlinePredictor(horizon, epsilon=EPSILON, reward_range=(0.0, 1.0))
    for step in range(1, place + 1):
        predictor.absorb(step, step / horizon, float(rewards[step - 1]), num_prompts=16, num_generations=8)
    taken = []
    for step in range(place + 1, horizon):
        begun = time.perf_counter()
        predictor.observe(step, step / horizon, float(rewards[step - 1]), num_prompts=16, num_generations=8)
        taken.append(1e3 * (time.perf_counter() - begun))
    return {"median": round(statistics.median(taken), 2), "worst": round(max(taken), 2)}
