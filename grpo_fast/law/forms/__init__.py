"""Functional forms of a GRPO reward curve: what the literature fits, written once.

``rises`` holds unit shapes on arrays of parameters, which the posterior averages over; ``laws`` and ``families`` hold whole
curves in their own parameters, with their plateau and the time to a share of the rise. Time ``t`` is what the law's source
counts: mostly the share of the training budget that has been spent, in (0, 1], measured in summed learning rate.

Not covered: forms with more than one rise.
"""

from __future__ import annotations

from grpo_fast.law.forms.families import Constant, DampedTrend, Linear, Logarithmic, PowerSaturation, Weibull
from grpo_fast.law.forms.laws import (
    AdditiveLogistic,
    ComputeSigmoid,
    ExponentialSaturation,
    InertialSaturation,
    Overoptimised,
    PowerInError,
)
from grpo_fast.law.forms.protocol import Law
from grpo_fast.law.forms.rises import (
    Array,
    exponential_rise,
    exponential_rise_inverse,
    hill_rise,
    hill_rise_inverse,
    hump_rise,
    hump_rise_inverse,
    inertial_rise,
    inertial_rise_inverse,
    logarithmic_rise,
    logarithmic_rise_inverse,
    logistic_rise,
    logistic_rise_inverse,
    power_rise,
    power_rise_inverse,
    weibull_rise,
    weibull_rise_inverse,
)

__all__ = [
    "AdditiveLogistic",
    "Array",
    "ComputeSigmoid",
    "Constant",
    "DampedTrend",
    "ExponentialSaturation",
    "InertialSaturation",
    "Law",
    "Linear",
    "Logarithmic",
    "Overoptimised",
    "PowerInError",
    "PowerSaturation",
    "Weibull",
    "exponential_rise",
    "exponential_rise_inverse",
    "hill_rise",
    "hill_rise_inverse",
    "hump_rise",
    "hump_rise_inverse",
    "inertial_rise",
    "inertial_rise_inverse",
    "logarithmic_rise",
    "logarithmic_rise_inverse",
    "logistic_rise",
    "logistic_rise_inverse",
    "power_rise",
    "power_rise_inverse",
    "weibull_rise",
    "weibull_rise_inverse",
]
