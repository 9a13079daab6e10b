"""Functional forms of a GRPO reward curve: what the literature fits, written once.

Two of them are the scaling law this package is built on; the other two are honest null members that keep it from seeing a rise
in noise. Time ``t`` is the share of the training budget that has been spent, in (0, 1], measured in summed learning rate.

Not covered: forms that fall again, and forms with more than one rise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

Array = NDArray[np.float64]


def logistic_rise(t: ArrayLike, midpoint: ArrayLike, width: ArrayLike) -> Array:
    """A logistic shifted and scaled to be 0 at ``t = 0`` and to tend to 1.

    ``(s(t) - s(0)) / (1 - s(0))`` with ``s(t) = 1 / (1 + exp(-(t - midpoint) / width))``.

    Args:
        t: times, any shape that broadcasts with the parameters.
        midpoint: where the steepest rise is (the inflection).
        width: time in which the odds of being done grow by e; positive. 1 / delta of the paper.

    Returns:
        float64 array of the broadcast shape.
    """
    moved, middle, wide = (np.asarray(value, dtype=np.float64) for value in (t, midpoint, width))
    start = expit(-middle / wide)
    return np.asarray((expit((moved - middle) / wide) - start) / (1.0 - start))


def logistic_rise_inverse(share: ArrayLike, midpoint: ArrayLike, width: ArrayLike) -> Array:
    """Time at which :func:`logistic_rise` reaches ``share`` (in [0, 1)) of its rise."""
    part, middle, wide = (np.asarray(value, dtype=np.float64) for value in (share, midpoint, width))
    start = expit(-middle / wide)
    level = start + part * (1.0 - start)
    return np.asarray(middle + wide * (np.log(level) - np.log1p(-level)))


def exponential_rise(t: ArrayLike, timescale: ArrayLike) -> Array:
    """``1 - exp(-t / timescale)``: 0 at ``t = 0``, tends to 1, steepest at its start."""
    return np.asarray(-np.expm1(-np.asarray(t, dtype=np.float64) / np.asarray(timescale, dtype=np.float64)))


def exponential_rise_inverse(share: ArrayLike, timescale: ArrayLike) -> Array:
    """Time at which :func:`exponential_rise` reaches ``share`` (in [0, 1)): ``-timescale * ln(1 - share)``."""
    return np.asarray(-np.asarray(timescale, dtype=np.float64) * np.log1p(-np.asarray(share, dtype=np.float64)))


def _check_share(share: float) -> None:
    if not 0.0 <= share < 1.0:
        raise ValueError(f"share={share} must lie in [0, 1): the whole rise is never reached in finite time")


@dataclass(frozen=True)
class AdditiveLogistic:
    """Version 1 of the law: a floor set by the untrained policy and the model size, plus one logistic rise.

    ``R(t) = alpha * r_init + beta * size + gamma / (1 + exp(-delta * (t - t0)))``

    The floor moves with the start and the size; the rise itself does not depend on either. The value at ``t = 0`` is not
    ``r_init`` unless the constants conspire.

    Source: arXiv 2507.18014 v1, as quoted by a later survey; the paper's numeric coefficients are not known to us.

    Attributes:
        alpha: weight of the untrained policy's reward.
        beta: reward per 1e9 parameters.
        gamma: height of the rise.
        delta: steepness, per unit of ``t``; positive.
        t0: inflection.
        r_init: reward of the untrained policy.
        size: parameters of the model, in 1e9.
    """

    alpha: float
    beta: float
    gamma: float
    delta: float
    t0: float
    r_init: float
    size: float

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ValueError(f"delta={self.delta} must be positive; a falling curve has a negative gamma")

    @property
    def floor(self) -> float:
        """Level far before the inflection."""
        return self.alpha * self.r_init + self.beta * self.size

    @property
    def plateau(self) -> float:
        """Level far behind the inflection: floor + gamma."""
        return self.floor + self.gamma

    def __call__(self, t: ArrayLike) -> Array:
        """Reward at ``t`` (any shape)."""
        return np.asarray(self.floor + self.gamma * expit(self.delta * (np.asarray(t, dtype=np.float64) - self.t0)))

    def time_to(self, share: float) -> float:
        """Time at which ``share`` of the rise from ``t = 0`` to the plateau is done.

        Raises:
            ValueError: ``share`` is not in [0, 1).
        """
        _check_share(share)
        return float(logistic_rise_inverse(share, self.t0, 1.0 / self.delta))


@dataclass(frozen=True)
class ExponentialSaturation:
    """Version 2 of the law, with an offset: an exponential approach to a plateau whose time scale grows with the model.

    ``R(t) = r_init + (plateau - r_init) * (1 - exp(-t / tau))`` with ``tau = timescale * size ** size_exponent``

    The printed form is ``r_init = 0``, ``timescale = 1``, ``size_exponent = 0.3``. Without the offset it is wrong for any
    policy that starts above zero. It has no inflection, so it cannot show a slow start.

    Source: arXiv 2507.18014 v2, as quoted in the introduction of arXiv 2606.30789; the offset is ours.

    Attributes:
        plateau: level that is approached.
        timescale: time in which a model of 1e9 parameters covers 63 % of the way; positive.
        r_init: reward of the untrained policy.
        size: parameters of the model, in 1e9; positive.
        size_exponent: growth of the time scale with size; 0 leaves the size out.
    """

    plateau: float
    timescale: float
    r_init: float = 0.0
    size: float = 1.0
    size_exponent: float = 0.0

    def __post_init__(self) -> None:
        if not (self.timescale > 0 and self.size > 0):
            raise ValueError(f"timescale={self.timescale} and size={self.size} must both be positive")

    @property
    def tau(self) -> float:
        """Time scale of this model."""
        return float(self.timescale * self.size**self.size_exponent)

    def __call__(self, t: ArrayLike) -> Array:
        """Reward at ``t`` (any shape)."""
        return np.asarray(self.r_init + (self.plateau - self.r_init) * exponential_rise(t, self.tau))

    def time_to(self, share: float) -> float:
        """Time at which ``share`` of the rise is done: ``-tau * ln(1 - share)``, 1.609 tau for 80 %.

        Raises:
            ValueError: ``share`` is not in [0, 1).
        """
        _check_share(share)
        return float(exponential_rise_inverse(share, self.tau))


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
        """Reward at ``t`` (any shape)."""
        return np.asarray(self.r_init + self.gain * np.asarray(t, dtype=np.float64))

    def time_to(self, share: float) -> float:
        """Time at which ``share`` of the gain over the budget is done: ``share`` itself.

        Raises:
            ValueError: ``share`` is not in [0, 1).
        """
        _check_share(share)
        return share


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
        """Reward at ``t`` (any shape)."""
        return np.full(np.shape(t), self.level)

    def time_to(self, share: float) -> float:
        """There is no rise to take a share of: NaN.

        Raises:
            ValueError: ``share`` is not in [0, 1).
        """
        _check_share(share)
        return math.nan
