"""The unit shapes against values worked out by hand, their inverses, and their behaviour on arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grpo_fast.law import forms

SATURATING = {
    "exponential": [(0.02,), (0.3,), (2.5,)],
    "logistic": [(0.05, 0.01), (0.3, 0.08), (1.0, 0.3)],
    "weibull": [(0.1, 0.5), (0.3, 1.0), (0.6, 4.5)],
    "hill": [(0.05, 0.7), (0.3, 1.7), (1.0, 4.0)],
    "inertial": [(0.2, 1e-6), (0.2, 0.3), (0.4, 0.999999), (0.4, 1.0)],
    "power": [(0.02, 0.3), (0.3, 1.0), (1.0, 3.0)],
}
CASES = [(name, parameters) for name, many in SATURATING.items() for parameters in many]
SHARES = np.array([0.0, 1e-9, 0.1, 0.5, 0.8, 0.95, 0.999])


def shape(name: str):
    return getattr(forms, f"{name}_rise"), getattr(forms, f"{name}_rise_inverse")


@pytest.mark.parametrize(
    ("name", "t", "parameters", "expected"),
    [
        ("exponential", 0.2, (0.2,), 1 - 1 / math.e),
        ("logistic", 0.3, (0.3, 0.1), (0.5 - 1 / (1 + math.e**3)) / (1 - 1 / (1 + math.e**3))),
        ("weibull", 0.6, (0.3, 2.0), 1 - math.e**-4),
        ("weibull", 0.3, (0.3, 0.7), 1 - 1 / math.e),  # whatever the power
        ("hill", 0.3, (0.3, 1.7), 0.5),
        ("hill", 0.6, (0.3, 2.0), 0.8),
        ("inertial", 0.4, (0.4, 1.0), 1 - 2 / math.e),
        ("inertial", 0.4, (0.4, 0.5), 1 - 2 * (math.exp(-1) - 0.5 * math.exp(-2))),
        ("power", 0.3, (0.1, 0.5), 0.5),
        ("logarithmic", 0.1, (0.1,), math.log(2) / math.log(11)),
        ("hump", 0.2, (0.4, 1.0), 0.5 * (1 + math.log(2))),
        ("hump", 0.1, (0.4, 0.5), 0.5 * (1 + math.log(2))),
        ("hump", 0.4 * math.e, (0.4, 1.0), 0.0),
    ],
)
def test_values_by_hand(name, t, parameters, expected):
    assert float(shape(name)[0](t, *parameters)) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_a_rise_starts_at_zero_never_falls_tends_to_one_and_inverts(name, parameters):
    rise, inverse = shape(name)
    t = np.linspace(0, 3, 301)
    values = rise(t, *parameters)
    assert values[0] == 0.0
    assert np.all(np.diff(values) >= 0)
    assert 0.9 < float(rise(1e6, *parameters)) <= 1.0
    np.testing.assert_allclose(rise(inverse(SHARES, *parameters), *parameters), SHARES, rtol=2e-7, atol=1e-12)


def test_the_two_that_do_not_saturate_invert_too():
    for scale in (0.01, 0.3, 100.0):
        assert float(forms.logarithmic_rise(1.0, scale)) == pytest.approx(1.0)
        there = forms.logarithmic_rise_inverse(SHARES, scale)
        np.testing.assert_allclose(forms.logarithmic_rise(there, scale), SHARES, atol=1e-14)
    np.testing.assert_allclose(forms.logarithmic_rise([0.2, 0.7], 1e6), [0.2, 0.7], rtol=1e-5)  # straight in the limit
    for power in (0.5, 1.0, 2.0):
        before = forms.hump_rise_inverse(SHARES, 0.4, power)
        assert np.all(before < 0.4)
        np.testing.assert_allclose(forms.hump_rise(before, 0.4, power), SHARES, rtol=1e-10)
        assert float(forms.hump_rise(0.4, 0.4, power)) == 1.0
        assert float(forms.hump_rise(0.8, 0.4, power)) < 1.0


def test_limits_join_their_neighbours():
    t = np.linspace(0, 2, 41)
    np.testing.assert_allclose(forms.inertial_rise(t, 0.3, 1e-9), forms.exponential_rise(t, 0.3), atol=1e-8)
    np.testing.assert_allclose(forms.inertial_rise(t, 0.3, 1 - 1e-9), forms.inertial_rise(t, 0.3, 1.0), atol=1e-8)
    np.testing.assert_allclose(forms.weibull_rise(t, 0.3, 1.0), forms.exponential_rise(t, 0.3), atol=1e-15)
    np.testing.assert_allclose(forms.power_rise(t, 0.3e6, 1e6), forms.exponential_rise(t, 0.3), atol=1e-5)


def test_a_mass_at_rest_starts_level_and_a_second_order_equation_holds():
    tau, ratio, step = 0.3, 0.4, 1e-4
    t = np.array([0.05, 0.2, 0.7])
    before, now, after = (forms.inertial_rise(t + move, tau, ratio) for move in (-step, 0.0, step))
    first, second = (after - before) / (2 * step), (after - 2 * now + before) / step**2
    # (tau D + 1) (ratio tau D + 1) (1 - rise) = 0
    np.testing.assert_allclose(ratio * tau**2 * second + (1 + ratio) * tau * first, 1 - now, atol=1e-5)
    assert float(forms.inertial_rise(1e-6, tau, ratio)) < 1e-10


def test_parameters_and_times_broadcast():
    t, many = np.linspace(0, 1, 7), np.array([0.1, 0.2, 0.5])[:, None]
    for name, extra in [("exponential", ()), ("logarithmic", ()), *((n, (0.7,)) for n in ("logistic", "weibull", "hill"))]:
        grid = shape(name)[0](t, many, *extra)
        assert grid.shape == (3, 7)
        assert grid.dtype == np.float64
        np.testing.assert_array_equal(grid[1], shape(name)[0](t, 0.2, *extra))
    for name in ("inertial", "power", "hump"):
        assert shape(name)[0](t, many, many).shape == (3, 7)
        assert shape(name)[1](0.8, many[:, 0], many[:, 0]).shape == (3,)
