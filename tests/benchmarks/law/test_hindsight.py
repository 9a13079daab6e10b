"""Hindsight: the noise goes, the curve stays, and classes are what they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from benchmarks.law.hindsight import classify, look_back

X = (np.arange(200) + 0.5) / 200
SHAPES = {
    "concave": 0.2 + 0.6 * (1 - np.exp(-X / 0.1)),
    "S-shaped": 0.1 + 0.7 * expit((X - 0.4) / 0.05),
    "still rising": 0.2 + 0.5 * X,
    "second rise": 0.1 + 0.3 * expit((X - 0.15) / 0.02) + 0.4 * expit((X - 0.7) / 0.02),
    "flat": np.full(200, 0.4),
    "collapse": np.where(X < 0.6, 0.2 + 0.5 * (1 - np.exp(-X / 0.1)), 0.1),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_classes(name, noise):
    for seed in range(5 if noise else 1):
        rewards = SHAPES[name] + noise * np.random.default_rng(seed).standard_normal(200)
        assert classify(look_back(rewards)) == name


def test_a_flat_noisy_curve_loses_nothing_by_stopping():
    lost = [look_back(0.5 + 0.1 * np.random.default_rng(seed).standard_normal(200)).lost(40)[0] for seed in range(20)]
    assert np.median(np.abs(lost)) < 0.01
    assert np.mean(np.abs(lost)) < 0.02


def test_the_loss_is_found_within_its_own_standard_error():
    true = SHAPES["concave"][-10:].mean() - SHAPES["concave"][39]
    found = [
        look_back(SHAPES["concave"] + 0.05 * np.random.default_rng(seed).standard_normal(200)).lost(40) for seed in range(40)
    ]
    change, error = np.array(found).T
    assert np.mean(change) == pytest.approx(true, abs=0.01)
    assert 0.6 < np.std(change) / np.mean(error) < 1.5


def test_without_noise_the_level_is_the_curve():
    past = look_back(SHAPES["S-shaped"])
    np.testing.assert_allclose(past.level, SHAPES["S-shaped"], atol=0.01)
    assert past.end == pytest.approx(0.8, abs=1e-3)
    assert past.lost_at_best(100) == pytest.approx(0.8 - past.level[:100].max(), abs=1e-3)
    assert look_back(np.full(50, 0.3)).noise_sd == pytest.approx(0.0, abs=1e-12)
