from __future__ import annotations

import numpy as np
import pytest

from grpo_fast.law import OnlinePredictor, RunFacts
from grpo_fast.law.posterior import GRID
from grpo_fast.law.prospect import WAYS, Prospect
from grpo_fast.law.shapes import CLASSES

LEVELS = np.array([0.05, 0.5, 0.95])


def made(rise: list[float], shape: list[int]) -> Prospect:
    count = len(rise)
    return Prospect(np.full(count, 1.0 / count), np.array(rise), np.array(shape), 0.01)


def shape_of(name: str) -> int:
    return int(np.flatnonzero(GRID.classes == CLASSES.index(name))[0])


def test_the_ways_a_run_may_go() -> None:
    early, hump = shape_of("exponential, early"), shape_of("rise and fall")
    straight, flat = shape_of("straight"), shape_of("none")
    sample = made([0.5, 0.5, 0.5, -0.3, 0.005, 0.0], [early, hump, straight, early, early, flat])
    ways = sample.ways(0.9)
    assert tuple(ways) == WAYS
    assert sum(ways.values()) == pytest.approx(1.0)
    sixth = pytest.approx(1 / 6)
    assert (ways["rises to a plateau"], ways["peaks and falls back"], ways["still rises at the end"]) == (sixth, sixth, sixth)
    assert (ways["falls"], ways["hardly moves"]) == (sixth, pytest.approx(2 / 6))
    assert sample.ways(1e-6)["still rises at the end"] == pytest.approx(0.5), "nothing is done at once"
    assert sample.ways(np.full(6, 0.9)) == ways, "an end of one's own for each run"


def test_times_are_over_the_runs_that_rise() -> None:
    early, straight = shape_of("exponential, early"), shape_of("straight")
    sample = made([0.5, -0.5, 0.5, 0.0], [early, early, straight, early])
    at = GRID.time_to(0.8)[early]
    assert sample.time_to(0.8).tolist() == [at, np.inf, 0.8, np.inf]
    low, _, high = sample.when(0.8, LEVELS)
    assert (low, high) == (pytest.approx(at), pytest.approx(0.8))
    assert np.isnan(made([0.0, -0.2], [early, early]).when(0.8, LEVELS)).all()


def test_rewards_settle_what_the_prior_leaves_open() -> None:
    predictor = OnlinePredictor(100, reward_range=(0.0, 1.0), facts=RunFacts(size_b=1.0, start=0.1))
    before = Prospect.of(predictor)
    assert before.weight.sum() == pytest.approx(1.0)
    assert 0.02 < before.ways()["rises to a plateau"] < 0.9
    rewards = 0.1 + 0.7 * (1 - np.exp(-np.arange(1, 61) / 8)) + np.random.default_rng(0).normal(0, 0.01, 60)
    for step, reward in enumerate(rewards, 1):
        predictor.absorb(step, step / 100, float(reward), num_prompts=32, num_generations=8)
    after = Prospect.of(predictor)
    assert after.ways()["rises to a plateau"] > 0.8
    assert after.when(0.95, LEVELS)[1] == pytest.approx(0.24, abs=0.08)
