from __future__ import annotations

import numpy as np
import pytest

from grpo_fast.law import Prior, RewardCurve
from grpo_fast.law.beliefs import RISES, rise_shares, shape_shares, typical, witnessed_shape
from grpo_fast.law.fitting import level_errors, witness
from grpo_fast.law.prior import FEATURES, PARTS
from grpo_fast.law.shapes import CLASSES

ORDINARY = np.eye(len(FEATURES))[0]


def prior(part: int | None = None, kind: str | None = None) -> Prior:
    """All rises from one of the normals, all shapes of one class; even where left open."""
    parts, classes = np.zeros((len(PARTS), len(FEATURES))), np.zeros((len(CLASSES), len(FEATURES)))
    if part is not None:
        parts[part, 0] = 50.0
    if kind is not None:
        classes[CLASSES.index(kind), 0] = 50.0
    return Prior(parts, classes)


def curve(rise: float, *, seed: int = 0, size: int = 100) -> RewardCurve:
    x = np.arange(1, size + 1) / size
    rewards = 0.1 + rise * (1 - np.exp(-x / 0.1)) + np.random.default_rng(seed).normal(0, 0.01, size)
    return RewardCurve(rewards, x, size, source=str(seed), reward_range=(0.0, 1.0), num_prompts=32, num_generations=8)


def test_sizes_of_rises() -> None:
    even = rise_shares(prior(), ORDINARY)
    assert list(even) == list(RISES)
    assert sum(even.values()) == pytest.approx(1.0)
    sure = rise_shares(prior(part=4, kind="straight"), ORDINARY)
    assert sure["by more than 0.6"] == pytest.approx(0.788, abs=1e-3), "N(0.8, 0.25) above 0.6"
    assert rise_shares(prior(part=4, kind="none"), ORDINARY)["hardly moves"] == pytest.approx(1.0)
    assert sum(rise_shares(Prior.default(), ORDINARY).values()) == pytest.approx(1.0)


def test_shares_of_shapes() -> None:
    assert shape_shares(prior(kind="straight"), ORDINARY)["straight"] == pytest.approx(1.0)
    assert list(shape_shares(prior(), ORDINARY).values()) == pytest.approx([1 / len(CLASSES)] * len(CLASSES))


def test_what_a_curve_speaks_for() -> None:
    shape, sure = witnessed_shape(witness(curve(0.7)), prior())
    assert shape == "exponential, early"
    assert sure > 0.5


def test_a_typical_run_is_the_mean_of_what_is_known() -> None:
    found = typical([witness(curve(0.7)), witness(curve(0.3, size=50))])
    assert found[0] == 1.0
    assert found[FEATURES.index("steps")] == pytest.approx((0.0 + np.log10(0.5)) / 2)


def test_a_prior_that_knows_the_shape_errs_less() -> None:
    """Except at first, where drift makes up for a wrong shape."""
    one = witness(curve(0.7))
    right, wrong = (level_errors(prior(kind=kind), one) for kind in ("exponential, early", "straight"))
    assert right.shape == (4, 2)
    assert right[1:, 0].sum() < wrong[1:, 0].sum()
    assert (right[2:, 0] < 0.02).all()
    assert set(np.unique(right[:, 1])) <= {0.0, 1.0}
