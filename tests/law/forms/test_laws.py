"""The laws of the literature against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grpo_fast.law.forms import (
    AdditiveLogistic,
    ComputeSigmoid,
    ExponentialSaturation,
    InertialSaturation,
    Overoptimised,
    PowerInError,
)


def test_additive_logistic_by_hand():
    curve = AdditiveLogistic(alpha=0.5, beta=0.01, gamma=0.6, delta=10.0, t0=0.3, r_init=0.2, size=8.0)
    assert curve.floor == pytest.approx(0.18)
    assert curve.plateau == pytest.approx(0.78)
    assert float(curve(0.3)) == pytest.approx(0.48)  # half the rise at the inflection
    assert float(curve(0.3 + math.log(19) / 10)) == pytest.approx(0.18 + 0.6 * 0.95)
    np.testing.assert_allclose(curve([0.3, 0.3 + math.log(3) / 10]), [0.48, 0.63])


def test_exponential_saturation_by_hand():
    printed = ExponentialSaturation(plateau=0.8, timescale=1.0, size=7.0, size_exponent=0.3)
    assert printed.tau == pytest.approx(1.7928, abs=1e-4)
    assert float(printed(1.0)) == pytest.approx(0.8 * (1 - math.exp(-1 / 1.79279)), abs=1e-5)
    offset = ExponentialSaturation(plateau=0.9, timescale=0.2, r_init=0.3)
    assert float(offset(0.0)) == 0.3
    assert float(offset(0.2)) == pytest.approx(0.3 + 0.6 * 0.6321206)
    assert offset.time_to(0.8) == pytest.approx(0.2 * 1.6094379)
    assert offset.time_to(0.95) == pytest.approx(0.2 * 2.9957323)


def integrated(law: InertialSaturation, end: float, steps: int = 100_000) -> float:
    """The law's own equation by the leapfrog rule."""
    reward, speed, step = law.r_init, 0.0, end / steps
    for _ in range(steps):
        reward += 0.5 * step * speed
        pull = law.stiffness * (law.plateau - reward)
        grip = 0.5 * step * law.damping / law.momentum
        speed = ((1 - grip) * speed + step * pull / law.momentum) / (1 + grip)
        reward += 0.5 * step * speed
    return reward


@pytest.mark.parametrize(
    ("momentum", "refresh", "oscillates"),
    [(0.2, 0.0, False), (0.5, 2.0, False), (0.8, 4.0, True), (0.9, 0.0, True)],
)
def test_inertial_saturation_solves_its_equation(momentum, refresh, oscillates):
    law = InertialSaturation(0.9, 0.2, curvature=2.0, learning_rate=0.015, momentum=momentum, refresh_steps=refresh)
    assert law.oscillates is oscillates
    assert float(law(0.0)) == pytest.approx(0.2)
    for t in (2.0, 10.0, 40.0):
        assert float(law(t)) == pytest.approx(integrated(law, t), abs=1e-7)
    assert float(law(1e4)) == pytest.approx(0.9)


def test_inertial_saturation_without_mass_is_the_exponential_law():
    # Lag alone takes 0.03 * 10 off the damping, so the run is faster by 1 / 0.7.
    law = InertialSaturation(0.9, 0.2, curvature=2.0, learning_rate=0.015, refresh_steps=10.0)
    same = ExponentialSaturation(0.9, 0.7 / 0.03, r_init=0.2)
    t = np.linspace(0, 100, 11)
    np.testing.assert_allclose(law(t), same(t), atol=1e-14)
    assert law.time_to(0.8) == pytest.approx(same.time_to(0.8))


def test_an_oscillating_run_overshoots_and_its_time_is_the_first_passage():
    law = InertialSaturation(0.5, 0.0, curvature=1.0, learning_rate=0.1, momentum=0.9)
    # damping 0.1, stiffness 0.1: decay 1/18, frequency sqrt(0.35)/1.8; the first peak is half a turn after the start.
    turn = math.pi / (math.sqrt(0.35) / 1.8)
    assert float(law(turn)) == pytest.approx(0.5 * (1 + math.exp(-turn / 18)))
    assert law.time_to(0.95) < turn
    assert float(law(law.time_to(0.95))) == pytest.approx(0.475)


def test_a_run_beyond_the_stability_threshold_is_refused():
    with pytest.raises(ValueError, match=r"= 0\.6 must stay below 1 - momentum = 0\.5"):
        InertialSaturation(0.9, 0.2, curvature=2.0, learning_rate=0.03, momentum=0.5, refresh_steps=10)
    with pytest.raises(ValueError, match=r"momentum=1\.0"):
        InertialSaturation(0.9, 0.2, curvature=1.0, learning_rate=0.1, momentum=1.0)


def test_compute_sigmoid_by_hand():
    # The published 8B run: A = .645, B = 1.70. 90 % are done at 3.6 and 95 % at 5.7 midpoints.
    law = ComputeSigmoid(plateau=0.645, midpoint=2000.0, efficiency=1.70, r_init=0.245)
    assert float(law(2000.0)) == pytest.approx(0.445)
    assert law.time_to(0.9) / 2000 == pytest.approx(9 ** (1 / 1.7))
    assert law.time_to(0.9) / 2000 == pytest.approx(3.64, abs=0.01)
    assert law.time_to(0.95) / 2000 == pytest.approx(5.65, abs=0.01)


def test_power_in_error_by_hand():
    law = PowerInError(log_error=-0.5, k_max=0.4, half_size=3.0, size=1.0)
    assert law.efficiency == pytest.approx(0.1)
    assert math.log10(1 - float(law(1e5))) == pytest.approx(-0.5 - 0.1 * 5)
    assert law.plateau == 1.0
    assert law.time_to(0.5) == pytest.approx(2.0**10)
    with pytest.raises(ValueError, match="half_size=-1"):
        PowerInError(log_error=0.0, k_max=1.0, half_size=-1.0)


def test_overoptimised_is_the_form_of_its_source():
    law = Overoptimised(plateau=0.6, peak_time=4.0, power=0.5, r_init=0.2)
    t = np.array([0.5, 2.0, 4.0, 9.0])
    distance, beta = np.sqrt(t), 0.4 / math.sqrt(4.0)
    alpha = beta * (1 + math.log(math.sqrt(4.0)))
    np.testing.assert_allclose(law(t), 0.2 + distance * (alpha - beta * np.log(distance)))
    assert float(law(4.0)) == pytest.approx(law.plateau)
    assert float(law(4.0 * math.e**2)) == pytest.approx(0.2)
    assert law.time_to(0.9) < 4.0


@pytest.mark.parametrize(
    "law",
    [
        AdditiveLogistic(alpha=1.0, beta=0.0, gamma=0.5, delta=6.0, t0=0.2, r_init=0.1, size=1.0),
        ExponentialSaturation(0.9, 0.2, r_init=0.3, size=8.0, size_exponent=0.3),
        InertialSaturation(0.9, 0.2, curvature=1.0, learning_rate=0.02, momentum=0.6, refresh_steps=3.0),
        InertialSaturation(0.9, 0.2, curvature=1.0, learning_rate=0.2, momentum=0.9),
        ComputeSigmoid(0.645, 0.3, 1.7, r_init=0.2),
        Overoptimised(0.6, 0.4, r_init=0.2),
    ],
    ids=lambda law: type(law).__name__,
)
def test_time_to_is_the_inverse_of_the_rise_from_time_zero(law):
    start = float(law(0.0))
    for share in (0.0, 0.1, 0.5, 0.8, 0.95):
        assert float(law(law.time_to(share))) == pytest.approx(start + share * (law.plateau - start))
    assert law.time_to(0.0) == pytest.approx(0.0, abs=1e-9)
    for share in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="share="):
            law.time_to(share)


def test_parameters_without_meaning_are_refused():
    with pytest.raises(ValueError, match="delta=0 must be positive in AdditiveLogistic"):
        AdditiveLogistic(alpha=1, beta=0, gamma=1, delta=0, t0=0, r_init=0, size=1)
    with pytest.raises(ValueError, match=r"timescale=-1\.0"):
        ExponentialSaturation(plateau=1.0, timescale=-1.0)
    with pytest.raises(ValueError, match="midpoint=0"):
        ComputeSigmoid(1.0, midpoint=0, efficiency=1.0)
