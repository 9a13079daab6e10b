"""The forms against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grpo_fast.law.forms import (
    AdditiveLogistic,
    Constant,
    ExponentialSaturation,
    Linear,
    exponential_rise,
    exponential_rise_inverse,
    logistic_rise,
    logistic_rise_inverse,
)


def test_additive_logistic_by_hand():
    curve = AdditiveLogistic(alpha=0.5, beta=0.01, gamma=0.6, delta=10.0, t0=0.3, r_init=0.2, size=8.0)
    assert curve.floor == pytest.approx(0.18)
    assert curve.plateau == pytest.approx(0.78)
    assert float(curve(0.3)) == pytest.approx(0.48)  # half the rise at the inflection
    assert float(curve(0.3 + math.log(19) / 10)) == pytest.approx(0.18 + 0.6 * 0.95)
    np.testing.assert_allclose(curve([0.3, 0.3 + math.log(3) / 10]), [0.48, 0.63])


def test_additive_logistic_inverse_is_measured_from_time_zero():
    curve = AdditiveLogistic(alpha=1.0, beta=0.0, gamma=0.5, delta=6.0, t0=0.2, r_init=0.1, size=1.0)
    start = float(curve(0.0))
    for share in (0.0, 0.1, 0.5, 0.8, 0.95):
        assert float(curve(curve.time_to(share))) == pytest.approx(start + share * (curve.plateau - start))
    assert curve.time_to(0.0) == pytest.approx(0.0, abs=1e-12)


def test_exponential_saturation_by_hand():
    printed = ExponentialSaturation(plateau=0.8, timescale=1.0, size=7.0, size_exponent=0.3)
    assert printed.tau == pytest.approx(1.7928, abs=1e-4)
    assert float(printed(1.0)) == pytest.approx(0.8 * (1 - math.exp(-1 / 1.79279)), abs=1e-5)
    offset = ExponentialSaturation(plateau=0.9, timescale=0.2, r_init=0.3)
    assert float(offset(0.0)) == 0.3
    assert float(offset(0.2)) == pytest.approx(0.3 + 0.6 * 0.6321206)
    assert offset.time_to(0.8) == pytest.approx(0.2 * 1.6094379)
    assert offset.time_to(0.95) == pytest.approx(0.2 * 2.9957323)


def test_null_members():
    line = Linear(r_init=0.2, gain=0.4)
    np.testing.assert_allclose(line([0.0, 0.5, 1.0]), [0.2, 0.4, 0.6])
    assert line.plateau == pytest.approx(0.6)
    assert line.time_to(0.8) == 0.8
    level = Constant(0.7)
    np.testing.assert_array_equal(level([0.1, 0.9]), [0.7, 0.7])
    assert level.plateau == 0.7
    assert math.isnan(level.time_to(0.8))


def test_rises_start_at_zero_tend_to_one_and_invert():
    t = np.linspace(0, 1, 11)
    for middle, width in ((0.05, 0.01), (0.3, 0.08), (1.0, 0.3)):
        rise = logistic_rise(t, middle, width)
        assert rise[0] == 0.0
        assert np.all(np.diff(rise) >= 0)
        assert float(logistic_rise(middle + 40 * width, middle, width)) == pytest.approx(1.0)
        assert float(logistic_rise(logistic_rise_inverse(0.8, middle, width), middle, width)) == pytest.approx(0.8)
    assert exponential_rise(0.0, 0.3) == 0.0
    assert float(exponential_rise(exponential_rise_inverse(0.95, 0.3), 0.3)) == pytest.approx(0.95)


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_share_outside_its_range_is_refused(share):
    for curve in (Constant(0.1), Linear(0.0, 1.0), ExponentialSaturation(1.0, 0.1), AdditiveLogistic(1, 0, 1, 1, 0, 0, 1)):
        with pytest.raises(ValueError, match="share="):
            curve.time_to(share)


def test_parameters_without_meaning_are_refused():
    with pytest.raises(ValueError, match="delta=0"):
        AdditiveLogistic(alpha=1, beta=0, gamma=1, delta=0, t0=0, r_init=0, size=1)
    with pytest.raises(ValueError, match="timescale=-1"):
        ExponentialSaturation(plateau=1.0, timescale=-1.0)
