"""The closed-form posterior against linear algebra and a textbook density."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy.stats import multivariate_t

from grpo_fast.law.posterior import NUM_DRAWS, Posterior, Settings, ShapeGrid, weighted_quantiles

ONE_RISE = Settings(rises=((1.0, 0.1, 0.4),), evidence_steps=math.inf)


def _filled(settings: Settings, count: int = 40, seed: int = 0) -> tuple[Posterior, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = np.arange(1, count + 1) / 80
    variance = rng.uniform(0.5, 2.0, count) * 0.03**2
    y = 0.2 + 0.6 / (1 + np.exp(-(x - 0.25) / 0.05)) + np.sqrt(variance) * rng.standard_normal(count)
    posterior = Posterior(settings)
    for row in zip(x, y, variance, strict=True):
        posterior.add(*map(float, row))
    return posterior, x, y, variance


def test_running_sums_equal_ridge_regression():
    posterior, x, y, variance = _filled(ONE_RISE)
    mean_a, mean_b, cov, _, _, _ = posterior._solve(1.0)
    table = posterior.grid.rise(x)
    for shape in (0, 77, 150, posterior.grid.num_shapes - 2, posterior.grid.num_shapes - 1):
        design = np.stack([np.ones_like(x), table[shape]], axis=1)
        precision = np.diag([1 / 0.3**2, 1 / 0.4**2]) + design.T @ (design / variance[:, None])
        target = np.array([0.0, 0.1 / 0.4**2]) + design.T @ ((y - y[0]) / variance)
        np.testing.assert_allclose([mean_a[0, shape], mean_b[0, shape]], np.linalg.solve(precision, target), rtol=1e-7)
        np.testing.assert_allclose(cov[:, 0, shape], np.linalg.inv(precision).ravel()[[0, 1, 3]], rtol=1e-6)


def test_evidence_equals_the_multivariate_student_density():
    posterior, x, y, variance = _filled(ONE_RISE, count=12)
    _, _, _, log_weight, _, _ = posterior._solve(1.0)
    table = posterior.grid.rise(x)

    def log_density(shape: int) -> float:
        design = np.stack([np.ones_like(x), table[shape]], axis=1)
        scale = np.diag(variance) + design @ np.diag([0.3**2, 0.4**2]) @ design.T
        location = 0.1 * table[shape]
        return float(multivariate_t(location, scale, df=ONE_RISE.noise_dof).logpdf(y - y[0]))

    shapes = [3, 60, 120, 210, posterior.grid.num_shapes - 1]
    ours = log_weight[0, shapes] - posterior.grid.log_prior[shapes]
    theirs = np.array([log_density(shape) for shape in shapes])
    np.testing.assert_allclose(ours - ours[0], theirs - theirs[0], rtol=1e-6, atol=1e-6)


def test_draws_reproduce_the_mean_of_the_posterior():
    posterior, *_ = _filled(ONE_RISE)
    mean_a, mean_b, _, log_weight, _, _ = posterior._solve(1.0)
    mass = np.exp(log_weight - log_weight.max())
    mass /= mass.sum()
    draws = posterior.draws(unit=1.0, low=-math.inf, high=math.inf)
    at_end = float(draws.weight @ draws.curve(posterior.grid.rise(np.ones(1)))[:, 0])
    exact = float((mass * (mean_a + mean_b * posterior._end)).sum()) + posterior._centre
    assert at_end == pytest.approx(exact, abs=2e-3)
    assert draws.weight.sum() == pytest.approx(1.0)
    assert draws.start.shape == (NUM_DRAWS,)


def test_bounds_act_as_conditioning_on_the_end_level():
    posterior, *_ = _filled(ONE_RISE, count=20)
    grid = posterior.grid.rise(np.array([0.5, 1.0]))
    free = posterior.draws(unit=1.0, low=-math.inf, high=math.inf)
    bounded = posterior.draws(unit=1.0, low=0.0, high=0.9)
    curves, kept = free.curve(grid), bounded.curve(grid)
    inside = (curves[:, 1] >= 0.0) & (curves[:, 1] <= 0.9)
    assert 0.3 < inside.mean() < 0.95  # the bound bites
    assert kept[:, 1].min() >= -1e-9
    assert kept[:, 1].max() <= 0.9 + 1e-9
    weight = np.where(inside, free.weight, 0.0)
    levels = np.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(
        weighted_quantiles(kept, bounded.weight, levels),
        weighted_quantiles(curves[inside], weight[inside] / weight.sum(), levels),
        atol=0.04,
    )


def test_a_large_offset_loses_no_digits():
    near, *_ = _filled(ONE_RISE)
    far = Posterior(ONE_RISE)
    _, x, y, variance = _filled(ONE_RISE)
    for one, two, three in zip(x, y, variance, strict=True):
        far.add(float(one), float(two) + 1000.0, float(three))
    ours, theirs = (posterior.draws(unit=1.0, low=-math.inf, high=math.inf) for posterior in (near, far))
    np.testing.assert_allclose(theirs.start - 1000.0, ours.start, atol=1e-6)


def test_grid_shapes_are_rises_and_invert():
    grid = ShapeGrid(Settings().weights)
    table = grid.rise(np.linspace(0, 1, 21))
    assert table.shape == (grid.num_shapes, 21)
    np.testing.assert_array_equal(table[:, 0], 0.0)
    assert np.all(np.diff(table, axis=1) >= 0)
    assert np.exp(grid.log_prior).sum() == pytest.approx(sum(Settings().weights))
    when = grid.time_to(0.8)
    assert math.isinf(when[-1])
    for shape in (0, 100, 220, grid.num_shapes - 2):
        assert grid.rise(when[shape : shape + 1])[shape, 0] == pytest.approx(0.8)


def test_weighted_quantiles_by_hand():
    values = np.array([[3.0], [1.0], [2.0]])
    weight = np.array([0.5, 0.25, 0.25])
    got = weighted_quantiles(values, weight, np.array([0.125, 0.375, 0.5625, 0.75]))
    np.testing.assert_allclose(got[:, 0], [1.0, 2.0, 2.5, 3.0])


def test_settings_survive_json():
    settings = dataclasses.replace(Settings(), surprise=0.3, evidence_steps=80.0)
    assert Settings.from_dict(json.loads(json.dumps(dataclasses.asdict(settings)))) == settings
