"""Runs with known rewards, and predictors that have seen them."""

from __future__ import annotations

import numpy as np
from scipy.special import expit

from grpo_fast.law import Forecast, OnlinePredictor, Spending

UNIT = (0.0, 1.0)
STEPS = np.arange(1, 201) / 200


def fed(rewards, horizon, *, progress=None, num_prompts=16, spent=None, **options) -> OnlinePredictor:
    """A predictor that has seen ``rewards``."""
    predictor = OnlinePredictor(horizon, **options)
    for step, reward in enumerate(map(float, rewards), start=1):
        at = step / horizon if progress is None else float(progress[step - 1])
        paid = None if spent is None else spent(step)
        predictor.absorb(step, at, reward, num_prompts=num_prompts, num_generations=8, spent=paid)
    return predictor


def told(rewards, horizon, **options) -> Forecast:
    return fed(rewards, horizon, **options).forecast()


def logistic(x, start=0.1, top=0.9, middle=0.3, width=0.05):
    floor = expit(-middle / width)
    return start + (top - start) * (expit((x - middle) / width) - floor) / (1 - floor)


def exponential(x, start=0.3, top=0.7, tau=0.15):
    return top - (top - start) * np.exp(-x / tau)


def noisy(mean, seed, noise=0.03):
    return np.clip(mean + noise * np.random.default_rng(seed).standard_normal(len(mean)), 0, 1)


def paid(step: int) -> Spending:
    """10 tokens, 0.5 hours and 2 of money a step for 60 steps, twice as much from there on."""
    times = step + max(0, step - 60)
    return Spending(10.0 * times, 0.5 * times, 2.0 * times)
