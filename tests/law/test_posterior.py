"""The closed-form posterior against dense linear algebra and a textbook density."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy.special import softmax, stdtr
from scipy.stats import multivariate_t

from grpo_fast.law import posterior as module
from grpo_fast.law.posterior import DRIFTS, GRID, NUM_DRAWS, Believed, Posterior, quantiles

NOISE = 0.03
FREE = (-math.inf, math.inf)
FLAT = GRID.num_shapes - 1
SHAPES = (0, 50, 110, 160, 230, FLAT - 1, FLAT)  # stretched, S-shaped, humps, the straight one and the flat one
PARTS = ((0.0, 0.04), (0.3, 0.25))
DOF = 6.0
PRIOR_A = 0.3


def believed(parts=PARTS, low=-math.inf, high=math.inf, *, start_sd=PRIOR_A, least_noise=0.0) -> Believed:
    return Believed(
        log_parts=np.full(len(parts), -math.log(len(parts))),
        rise=np.array([part[0] for part in parts]),
        rise_sd=np.array([part[1] for part in parts]),
        log_shapes=np.full(GRID.num_shapes, -math.log(GRID.num_shapes)),
        log_drifts=np.full(DRIFTS.size, -math.log(DRIFTS.size)),
        start_sd=start_sd,
        least_noise=least_noise,
        low=low,
        high=high,
    )


def observations(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Uneven progress up to half of the budget, with repeats; an S-shape; noise of several sizes."""
    rng = np.random.default_rng(seed)
    x = np.sort(rng.choice(np.arange(1, 41), size=count)) / 80
    variance = rng.uniform(0.5, 2.0, count) * NOISE**2
    y = 0.2 + 0.6 / (1 + np.exp(-(x - 0.25) / 0.05)) + np.sqrt(variance) * rng.standard_normal(count)
    return x, y, variance


def filled(x: np.ndarray, y: np.ndarray, variance: np.ndarray, ratio: float = 1.0) -> Posterior:
    posterior = Posterior()
    for row in zip(x.tolist(), y.tolist(), variance.tolist(), strict=True):
        posterior.add(*row)
    posterior.ratio = ratio
    return posterior


def of_drift(x: np.ndarray, variance: np.ndarray, kappa: float) -> np.ndarray:
    """(n + 2, n + 2) covariance, over s2, of the drift at the observations, at the last again and at the budget's end."""
    until = np.cumsum(variance * np.diff(x, prepend=0.0))
    at_end = until[-1] + variance[-1] * (1.0 - x[-1])
    summed = kappa**2 * np.concatenate([until, [until[-1], at_end]])
    return np.minimum(summed[:, None], summed[None, :])


@pytest.fixture
def undiscounted(monkeypatch):
    monkeypatch.setattr(module, "EVIDENCE_STEPS", math.inf)


@pytest.mark.usefixtures("undiscounted")
@pytest.mark.parametrize("ratio", [1.0, 2.5])
def test_running_sums_equal_dense_generalised_least_squares(ratio):
    """Every part, drift and shape: the two coefficients, their covariance, the scale, and the level with the drift so far."""
    x, y, variance = observations(30)
    solved = filled(x, y, variance, ratio).solve(believed())
    for kind, kappa in enumerate(DRIFTS):
        both = ratio * of_drift(x, variance, kappa)
        total = both[:-2, :-2] + ratio * np.diag(variance)
        inverse = np.linalg.inv(total)
        for shape in SHAPES:
            design = np.stack([np.ones_like(x), GRID.rise(x)[shape]], axis=1)
            at_end = np.array([1.0, GRID.rise(np.ones(1))[shape, 0]])
            for part, (rise, rise_sd) in enumerate(PARTS):
                held = np.diag([PRIOR_A**-2, rise_sd**-2])
                covariance = np.linalg.inv(held + design.T @ inverse @ design)
                target = np.array([0.0, rise / rise_sd**2]) + design.T @ inverse @ (y - y[0])
                mean = covariance @ target
                where = (part, kind, shape)
                np.testing.assert_allclose([solved.mean_a[where], solved.mean_b[where]], mean, rtol=1e-6, atol=1e-9)
                ours = [solved.cov_aa[where], solved.cov_ab[where], solved.cov_bb[where]]
                np.testing.assert_allclose(ours, covariance.ravel()[[0, 1, 3]], rtol=1e-6, atol=1e-12)
                misfit = (y - y[0]) - design @ mean
                away = mean - [0.0, rise]
                scale = (DOF + misfit @ inverse @ misfit + away @ held @ away) / (DOF + x.size)
                assert solved.scale[where] == pytest.approx(scale, rel=1e-6)
                gain = both[-1, :-2] @ inverse  # the drift at the end from what is left of the observations
                level = at_end @ mean + gain @ misfit
                reach = at_end - gain @ design
                level_var = reach @ covariance @ reach + both[-1, -1] - gain @ both[:-2, -1]
                np.testing.assert_allclose(solved.level[where], level, rtol=1e-6, atol=1e-9)
                np.testing.assert_allclose(solved.level_var[where], level_var, rtol=1e-6, atol=1e-12)
    assert solved.dof == DOF + x.size


@pytest.mark.usefixtures("undiscounted")
def test_evidence_equals_the_multivariate_student_density():
    x, y, variance = observations(14)
    weight = filled(x, y, variance, 1.7).solve(believed()).log_weight

    def log_density(part: int, kappa: float, shape: int) -> float:
        rise, rise_sd = PARTS[part]
        design = np.stack([np.ones_like(x), GRID.rise(x)[shape]], axis=1)
        scale = 1.7 * (np.diag(variance) + of_drift(x, variance, kappa)[:-2, :-2])
        scale = scale + design @ np.diag([PRIOR_A**2, rise_sd**2]) @ design.T
        return float(multivariate_t(rise * design[:, 1], scale, df=DOF).logpdf(y - y[0]))

    where = [(part, kind, shape) for part in range(2) for kind in range(DRIFTS.size) for shape in SHAPES]
    ours = np.array([weight[one] for one in where])
    theirs = np.array([log_density(part, DRIFTS[kind], shape) for part, kind, shape in where])
    np.testing.assert_allclose(ours - ours[0], theirs - theirs[0], rtol=1e-6, atol=1e-6)
    assert np.ptp(theirs) > 10, "the components must differ for this to tell"


def test_beliefs_are_added_to_the_evidence():
    posterior, plain = filled(*observations(20)), believed()
    rng = np.random.default_rng(1)
    told = dataclasses.replace(
        plain,
        log_parts=rng.standard_normal(2),
        log_drifts=rng.standard_normal(DRIFTS.size),
        log_shapes=rng.standard_normal(GRID.num_shapes),
    )
    more = told.log_parts[:, None, None] + told.log_drifts[:, None] + told.log_shapes
    less = plain.log_parts[0] + plain.log_drifts[0] + plain.log_shapes[0]
    np.testing.assert_allclose(posterior.solve(told).log_weight - more, posterior.solve(plain).log_weight - less, atol=1e-9)


def test_evidence_counts_for_less_the_more_there_is():
    """300 observations weigh as 150: the same as half of each, from noise of twice the variance."""
    rng = np.random.default_rng(2)
    x = np.arange(1, 301) / 400
    y, variance = 0.4 + 0.3 * x + NOISE * rng.standard_normal(300), np.full(300, NOISE**2)
    solved = filled(x, y, variance).solve(believed())
    assert solved.dof == DOF + 150
    design = np.stack([np.ones_like(x), x], axis=1)
    precision = np.diag([PRIOR_A**-2, PARTS[1][1] ** -2]) + design.T @ design / (2 * NOISE**2)
    got = [solved.cov_aa[1, 0, FLAT - 1], solved.cov_ab[1, 0, FLAT - 1], solved.cov_bb[1, 0, FLAT - 1]]
    np.testing.assert_allclose(got, np.linalg.inv(precision).ravel()[[0, 1, 3]], rtol=1e-8)


def test_ratio_multiplies_every_variance_that_was_told():
    x, y, variance = observations(30)
    late, early = filled(x, y, variance, 3.0), filled(x, y, 3.0 * variance)
    ours, theirs = late.solve(believed()), early.solve(believed())
    for name in ("mean_a", "mean_b", "cov_aa", "cov_ab", "cov_bb", "scale", "level", "level_var"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-8, atol=1e-12)
    apart = ours.log_weight - theirs.log_weight
    np.testing.assert_allclose(apart, apart.ravel()[0], rtol=0, atol=1e-8)
    one, other = late.draws(believed()), early.draws(believed())
    np.testing.assert_allclose(one.drift_ahead, other.drift_ahead, rtol=1e-7, atol=1e-9)


def test_no_shape_is_believed_to_be_truer_than_the_least_noise():
    """A shape of the grid without noise, told to have one of 0.06: half of that is the least, and much less would do."""
    x = np.arange(1, 41) / 80
    posterior = filled(x, 0.2 + 0.4 * GRID.rise(x)[FLAT - 1], np.full(40, NOISE**2), 4.0)
    free, held = (posterior.solve(believed(least_noise=sd)) for sd in (0.0, 0.03))
    right = (1, 0, FLAT - 1)
    least = (0.03 / (2 * NOISE)) ** 2
    assert free.scale[right] < 0.7 * least < free.scale.max()
    np.testing.assert_allclose(held.scale, np.maximum(free.scale, least))
    np.testing.assert_array_equal(held.log_weight, free.log_weight)
    narrow, wide = (exact(posterior, believed(least_noise=sd))[1] for sd in (0.0, 0.06))
    assert wide > narrow
    assert np.isfinite(Posterior().draws(believed(least_noise=0.01)).start).all(), "nor before the first reward"


def test_the_noise_share_tells_rewards_that_scatter_from_rewards_that_follow_one_another():
    x, scatter = np.arange(1, 101) / 100, NOISE * np.random.default_rng(5).standard_normal(100)
    white, following = (filled(x, 0.5 + each, np.full(100, NOISE**2)) for each in (scatter, 3.0 * np.cumsum(scatter)))
    prior = believed()
    assert white.draws(prior).noise_share > 0.9
    # Drift of variance 9 a step, in those of the noise: kappa of 30, of which the grid has 40 (16 a step) and 16 (2.6).
    assert 1 / 17 <= following.draws(prior).noise_share < 1 / 3
    assert Posterior().draws(prior).noise_share == 1.0


def exact(posterior: Posterior, prior: Believed) -> tuple[float, float]:
    """Mean and standard deviation of the level at the budget's end, all components mixed."""
    solved = posterior.solve(prior)
    mass = np.exp(solved.log_weight - solved.log_weight.max())
    mass /= mass.sum()
    mean = float((mass * solved.level).sum())
    variance = solved.scale * solved.dof / (solved.dof - 2) * solved.level_var
    return mean + posterior.centre, math.sqrt(float((mass * (variance + (solved.level - mean) ** 2)).sum()))


@pytest.mark.parametrize("count", [8, 40])
def test_draws_have_the_exact_quantiles_at_the_end(count):
    posterior, prior = filled(*observations(count)), believed()
    draws, solved = posterior.draws(prior), posterior.solve(prior)
    level = draws.curve(GRID.rise(np.ones(1)), np.ones(1), posterior.progress)
    assert draws.weight.sum() == pytest.approx(1.0)
    assert draws.start.shape == (NUM_DRAWS,)
    wanted = np.array([0.02, 0.05, 0.25, 0.5, 0.75, 0.95, 0.98])
    mass = softmax(solved.log_weight)
    spread = np.sqrt(solved.scale * solved.level_var)
    below = [
        float((mass * stdtr(solved.dof, (each - posterior.centre - solved.level) / spread)).sum())
        for each in quantiles(level, draws.weight, wanted)[:, 0]
    ]
    np.testing.assert_allclose(below, wanted, atol=0.01)


def test_draws_have_the_exact_mean_of_every_coefficient():
    posterior, prior = filled(*observations(40)), believed()
    solved, draws = posterior.solve(prior), posterior.draws(prior)
    mass = np.exp(solved.log_weight - solved.log_weight.max())
    mass /= mass.sum()
    rise = np.broadcast_to(solved.mean_b, mass.shape).copy()
    rise[:, :, FLAT] = 0.0
    assert draws.weight @ draws.start == pytest.approx(float((mass * solved.mean_a).sum()) + posterior.centre, abs=0.005)
    assert draws.weight @ draws.rise == pytest.approx(float((mass * rise).sum()), abs=0.02)
    np.testing.assert_allclose(
        np.bincount(draws.shape, weights=draws.weight, minlength=GRID.num_shapes), mass.sum(axis=(0, 1)), atol=2 / NUM_DRAWS
    )


def test_bounds_act_as_conditioning_on_the_level_at_the_end():
    posterior = filled(*observations(20))
    ends, middle = np.ones(1), np.array([0.6, 1.0])
    low, high = exact(posterior, believed())[0] + np.array([-0.3, 0.03])
    free, bounded = posterior.draws(believed()), posterior.draws(believed(low=low, high=high))
    curves, kept = (each.curve(GRID.rise(middle), middle, posterior.progress) for each in (free, bounded))
    inside = (curves[:, 1] >= low) & (curves[:, 1] <= high)
    assert 0.3 < free.weight @ inside < 0.9, "the bounds must bite"
    level = bounded.curve(GRID.rise(ends), ends, posterior.progress)[:, 0]
    assert level.min() >= low - 1e-9
    assert level.max() <= high + 1e-9
    weight = np.where(inside, free.weight, 0.0)
    share = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
    wanted = quantiles(curves[inside], weight[inside] / weight[inside].sum(), share)
    np.testing.assert_allclose(quantiles(kept, bounded.weight, share), wanted, atol=0.03)


def test_a_level_far_outside_the_bounds_ends_at_the_bound():
    draws = filled(*observations(40)).draws(believed(high=0.1))
    assert np.all(np.isfinite(draws.start))
    assert np.all(np.isfinite(draws.weight))
    at = np.ones(1)
    assert draws.curve(GRID.rise(at), at, 0.5).max() <= 0.1 + 1e-9


def test_curves_pass_through_the_drift_so_far_and_end_with_the_drift_ahead():
    posterior = filled(*observations(30))
    draws, x = posterior.draws(believed()), np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    now = posterior.progress
    rises = draws.rise[:, None] * GRID.rise(np.array([0.0, now, 1.0]))[draws.shape] + draws.start[:, None]
    wander = np.stack([np.zeros(NUM_DRAWS), draws.drift, draws.drift + draws.drift_ahead], axis=1)
    at = np.array([0.0, now, 1.0])
    np.testing.assert_allclose(draws.curve(GRID.rise(at), at, now), rises + wander, atol=1e-12)
    curves = draws.curve(GRID.rise(x), x, now)
    half = (0.75 - now) / (1 - now)
    plain = draws.start + draws.rise * GRID.rise(x)[draws.shape, 3] + draws.drift + half * draws.drift_ahead
    away = curves[:, 3] - plain
    np.testing.assert_allclose(away, math.sqrt(half * (1 - half)) * draws.bridge * draws.normal, atol=1e-12)
    assert away.std() > 0


def test_the_flat_shape_has_no_rise():
    prior = believed()
    only = np.where(np.arange(GRID.num_shapes) == FLAT, 0.0, -1e9)
    draws = filled(*observations(30)).draws(dataclasses.replace(prior, log_shapes=only))
    assert np.all(draws.shape == FLAT)
    np.testing.assert_array_equal(draws.rise, 0.0)
    assert np.ptp(draws.start) > 0


def test_a_large_offset_loses_no_digits():
    x, y, variance = observations(40)
    near, far = (filled(x, y + offset, variance).draws(believed()) for offset in (0.0, 1e6))
    np.testing.assert_allclose(far.start - 1e6, near.start, atol=1e-7)
    np.testing.assert_allclose(far.rise, near.rise, atol=1e-6)


def test_equal_observations_give_equal_bits():
    one, other = (filled(*observations(40)).draws(believed(low=0.0, high=1.0)) for _ in range(2))
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_before_the_first_observation_the_prior_speaks():
    posterior = Posterior()
    posterior.centre = 0.5
    draws = posterior.draws(believed(parts=((0.3, 0.1),), start_sd=0.05))
    assert draws.weight @ draws.start == pytest.approx(0.5, abs=0.005)
    rising = draws.shape != FLAT
    assert np.average(draws.rise[rising], weights=draws.weight[rising]) == pytest.approx(0.3, abs=0.01)


def test_the_cost_of_an_observation_does_not_grow():
    posterior = filled(*observations(40))
    sizes = {name: value.shape for name, value in vars(posterior).items() if isinstance(value, np.ndarray)}
    posterior.add(0.9, 0.8, NOISE**2)
    assert sizes == {name: value.shape for name, value in vars(posterior).items() if isinstance(value, np.ndarray)}
    assert not any(isinstance(value, (list, dict)) for value in vars(posterior).values())


def test_quantiles_by_hand():
    values = np.array([[3.0, 0.0], [1.0, 5.0], [2.0, 7.0]])
    weight = np.array([0.5, 0.25, 0.25])
    got = quantiles(values, weight, np.array([0.01, 0.125, 0.375, 0.5625, 0.75, 0.99]))
    # First column: 1, 2, 3 with their middles at 0.125, 0.375, 0.75; second: 0, 5, 7 at 0.25, 0.625, 0.875.
    np.testing.assert_allclose(got[:, 0], [1.0, 1.0, 2.0, 2.5, 3.0, 3.0])
    np.testing.assert_allclose(got[:, 1], [0.0, 0.0, 5 / 3, 25 / 6, 6.0, 7.0])
