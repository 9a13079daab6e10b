"""General families of learning curves: what the laws are compared with, and averaged with.

Each is called with times of any shape and gives rewards; ``plateau`` is the level it tends to, and ``time_to(share)`` the time
at which a share in [0, 1) of the way from the start to the plateau is done (NaN where there is no way to go).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from grpo_fast.law.forms.protocol import check_positive, checked_share
from grpo_fast.law.forms.rises import (
    Array,
    exponential_rise,
    exponential_rise_inverse,
    logarithmic_rise,
    logarithmic_rise_inverse,
    power_rise,
    power_rise_inverse,
    weibull_rise,
    weibull_rise_inverse,
)


@dataclass(frozen=True)
class Weibull:
    """Janoschek's growth curve: ``R(t) = r_init + (plateau - r_init) * (1 - exp(-(t / timescale) ** power))``.

    Power 1 is the exponential law; above it the start is slow (a skill that must first be found), below it the tail is
    stretched (prompts of very unequal difficulty).

    Source: Janoschek 1957; one of the eleven families of Domhan et al. 2015.

    Attributes:
        plateau: level that is approached.
        timescale: time in which 63 % of the way is covered, whatever the power; positive.
        power: positive.
        r_init: reward of the untrained policy.
    """

    plateau: float
    timescale: float
    power: float
    r_init: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "timescale", "power")

    def __call__(self, t: ArrayLike) -> Array:
        """Rewards at times of any shape."""
        return np.asarray(self.r_init + (self.plateau - self.r_init) * weibull_rise(t, self.timescale, self.power))

    def time_to(self, share: float) -> float:
        """Time at which ``share`` of the rise is done."""
        return float(weibull_rise_inverse(checked_share(share), self.timescale, self.power))


@dataclass(frozen=True)
class PowerSaturation:
    """A power law with a plateau, known as pow4: ``R(t) = plateau - (a * t + b) ** -power``.

    Source: one of the families of Domhan et al. 2015.

    Attributes:
        plateau: level that is approached, c there.
        a: pace; positive.
        b: offset, which sets the start ``plateau - b ** -power``; positive.
        power: of the tail; positive.
    """

    plateau: float
    a: float
    b: float
    power: float

    def __post_init__(self) -> None:
        check_positive(self, "a", "b", "power")

    def __call__(self, t: ArrayLike) -> Array:
        """Rewards at times of any shape."""
        rise = self.b**-self.power
        return np.asarray(self.plateau - rise * (1.0 - power_rise(t, self.b / self.a, self.power)))

    def time_to(self, share: float) -> float:
        """Time at which ``share`` of the rise is done."""
        return float(power_rise_inverse(checked_share(share), self.b / self.a, self.power))


@dataclass(frozen=True)
class Logarithmic:
    """``R(t) = r_init + gain * ln(1 + t / scale) / ln(1 + 1 / scale)``: ever slower, never done.

    Attributes:
        r_init: level at ``t = 0``.
        gain: rise over the whole budget.
        scale: time after which the slowing begins; positive.
    """

    r_init: float
    gain: float
    scale: float

    def __post_init__(self) -> None:
        check_positive(self, "scale")

    @property
    def plateau(self) -> float:
        """Level at ``t = 1``."""
        return self.r_init + self.gain

    def __call__(self, t: ArrayLike) -> Array:
        """Rewards at times of any shape."""
        return np.asarray(self.r_init + self.gain * logarithmic_rise(t, self.scale))

    def time_to(self, share: float) -> float:
        """Time at which ``share`` of the rise is done."""
        return float(logarithmic_rise_inverse(checked_share(share), self.scale))


@dataclass(frozen=True)
class Linear:
    """``R(t) = r_init + gain * t``: a rise whose end is not in sight. Its plateau is the level at the end of the budget.

    Attributes:
        r_init: level at ``t = 0``.
        gain: rise over the whole budget.
    """

    r_init: float
    gain: float

    @property
    def plateau(self) -> float:
        """Level at ``t = 1``."""
        return self.r_init + self.gain

    def __call__(self, t: ArrayLike) -> Array:
        """Rewards at times of any shape."""
        return np.asarray(self.r_init + self.gain * np.asarray(t, dtype=np.float64))

    def time_to(self, share: float) -> float:
        """Time at which ``share`` of the rise is done."""
        return checked_share(share)


@dataclass(frozen=True)
class Constant:
    """``R(t) = level``: nothing is learnt, or everything was known.

    Attributes:
        level: the reward at all times.
    """

    level: float

    @property
    def plateau(self) -> float:
        """The level."""
        return self.level

    def __call__(self, t: ArrayLike) -> Array:
        """Rewards at times of any shape."""
        return np.full(np.shape(t), self.level)

    def time_to(self, share: float) -> float:
        """There is no rise to take a share of: NaN."""
        checked_share(share)
        return math.nan


@dataclass(frozen=True)
class DampedTrend:
    """Holt's forecast with a damped trend, in steps from now: ``R(h) = level + slope * (d + d^2 + ... + d^h)``.

    A local law: it claims nothing about the past. As a curve it is the exponential with time scale ``-1 / ln(damping)``.

    Source: Gardner and McKenzie 1985.

    Attributes:
        level: smoothed level now.
        slope: smoothed gain per step now.
        damping: what is left of the gain a step later, in (0, 1).
    """

    level: float
    slope: float
    damping: float

    def __post_init__(self) -> None:
        if not 0.0 < self.damping < 1.0:
            raise ValueError(f"damping={self.damping} must lie in (0, 1); without damping a trend has no plateau")

    @property
    def plateau(self) -> float:
        """Level after endless steps."""
        return self.level + self.slope * self.damping / (1.0 - self.damping)

    def __call__(self, t: ArrayLike) -> Array:
        """Rewards at times of any shape."""
        return np.asarray(self.level + (self.plateau - self.level) * exponential_rise(t, -1.0 / math.log(self.damping)))

    def time_to(self, share: float) -> float:
        """Steps from now until the share of what is ahead is done."""
        return float(exponential_rise_inverse(checked_share(share), -1.0 / math.log(self.damping)))
