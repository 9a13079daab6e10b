"""The general families against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grpo_fast.law.forms import Constant, DampedTrend, Linear, Logarithmic, PowerSaturation, Weibull

ALL = (
    Weibull(0.9, 0.3, 1.8, r_init=0.2),
    PowerSaturation(0.9, a=3.0, b=2.0, power=1.5),
    Logarithmic(0.2, 0.5, scale=0.1),
    Linear(0.2, 0.4),
    DampedTrend(0.4, 0.02, 0.9),
)


def test_weibull_by_hand():
    law = Weibull(plateau=0.9, timescale=0.3, power=2.0, r_init=0.1)
    assert float(law(0.6)) == pytest.approx(0.9 - 0.8 * math.exp(-4))
    assert law.time_to(0.95) == pytest.approx(0.3 * math.sqrt(math.log(20)))


def test_power_saturation_by_hand():
    law = PowerSaturation(plateau=0.9, a=3.0, b=2.0, power=1.5)
    np.testing.assert_allclose(law([0.0, 2.0]), [0.9 - 2**-1.5, 0.9 - 8**-1.5])
    assert law.time_to(0.875) == pytest.approx(2.0)  # 8^-1.5 is an eighth of 2^-1.5


def test_lines_and_logarithms_by_hand():
    line = Linear(r_init=0.2, gain=0.4)
    np.testing.assert_allclose(line([0.0, 0.5, 1.0]), [0.2, 0.4, 0.6])
    assert line.time_to(0.8) == 0.8
    law = Logarithmic(r_init=0.2, gain=0.5, scale=1 / 15)
    np.testing.assert_allclose(law([0.2, 1.0]), [0.45, 0.7])  # ln 4 is half of ln 16
    assert law.time_to(0.5) == pytest.approx(0.2)


def test_constant_has_no_rise():
    level = Constant(0.7)
    np.testing.assert_array_equal(level([0.1, 0.9]), [0.7, 0.7])
    assert level.plateau == 0.7
    assert math.isnan(level.time_to(0.8))


def test_damped_trend_is_the_sum_of_its_steps():
    law = DampedTrend(level=0.4, slope=0.02, damping=0.9)
    sums = 0.4 + 0.02 * np.cumsum(0.9 ** np.arange(1, 6))
    np.testing.assert_allclose(law(np.arange(1, 6)), sums)
    assert law.plateau == pytest.approx(0.58)
    assert law.time_to(0.5) == pytest.approx(math.log(0.5) / math.log(0.9))


@pytest.mark.parametrize("law", ALL, ids=lambda law: type(law).__name__)
def test_time_to_is_the_inverse_of_the_rise(law):
    start = float(law(0.0))
    for share in (0.0, 0.1, 0.5, 0.8, 0.95):
        assert float(law(law.time_to(share))) == pytest.approx(start + share * (law.plateau - start))


@pytest.mark.parametrize("law", [*ALL, Constant(0.1)], ids=lambda law: type(law).__name__)
@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_share_outside_its_range_is_refused(law, share):
    with pytest.raises(ValueError, match="share="):
        law.time_to(share)


def test_parameters_without_meaning_are_refused():
    with pytest.raises(ValueError, match="power=0 must be positive in Weibull"):
        Weibull(1.0, 1.0, power=0)
    with pytest.raises(ValueError, match="scale=-1"):
        Logarithmic(0.0, 1.0, scale=-1)
    with pytest.raises(ValueError, match=r"damping=1\.0"):
        DampedTrend(0.0, 0.1, damping=1.0)
    with pytest.raises(ValueError, match=r"b=0\.0"):
        PowerSaturation(1.0, a=1.0, b=0.0, power=1.0)
