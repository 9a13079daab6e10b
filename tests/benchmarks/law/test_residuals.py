"""Residual forecasts: other repositories' errors around one's own guess."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.law.curves import Curve
from benchmarks.law.evaluate import LEVEL, Prediction, evaluate, pooled, seen_of
from benchmarks.law.residuals import Residual, scale
from benchmarks.law.simulator import simulate


class Still:
    name = "still"

    def forecast(self, seen, targets):
        return [Prediction(float(seen.rewards[-1])) for _ in targets]


def ramp(repository: str, gain: float) -> Curve:
    steps = np.arange(1.0, 101.0)
    rewards = 0.1 + gain * steps / 100
    return Curve(name=repository, repository=repository, steps=steps, rewards=rewards)


def test_errors_are_those_of_others_in_their_own_ranges():
    judged = Residual(Still()).fit([ramp("a", 0.2), ramp("b", 0.8)])
    seen = seen_of(ramp("c", 0.4), 40)
    level, final = judged.forecast(seen, [np.arange(81.0, 101.0), np.arange(96.0, 101.0)])
    assert level.point == pytest.approx(0.1 + 0.4 * 0.4)
    # Every ramp goes from 0.40 to a mean of 0.905 of its gain, over a seen range that grows with it: the truth, exactly.
    np.testing.assert_allclose(level.samples, 0.1 + 0.4 * 0.905, rtol=1e-9)
    np.testing.assert_allclose(final.samples, 0.1 + 0.4 * 0.98, rtol=1e-9)
    assert level.weights.sum() == pytest.approx(1.0)


def test_a_repository_of_many_runs_weighs_as_one():
    judged = Residual(Still()).fit([ramp("a", 0.2), ramp("b", 0.8), ramp("b", 0.7)])
    np.testing.assert_allclose(judged.weights, [0.5, 0.25, 0.25])


def test_a_flat_start_still_has_a_unit():
    flat = Curve(name="f", repository="f", steps=np.arange(1.0, 31.0), rewards=np.full(30, 0.5))
    assert scale(seen_of(flat, 10)) == 0.02


def test_intervals_cover_exchangeable_runs():
    records = evaluate([Residual(Still())], [simulate(seed) for seed in range(60)], shares=(0.4,))
    assert 0.8 <= pooled([r for r in records if r.target == LEVEL], "inside90") <= 0.98
