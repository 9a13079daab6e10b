"""Laws that were proposed for reinforcement learning of language models, in their own parameters.

Each is called with times of any shape and gives rewards; ``plateau`` is the level it tends to, and ``time_to(share)`` the time
at which a share in [0, 1) of the way from the start to the plateau is done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from grpo_fast.law.forms.protocol import check_positive, checked_share
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
    logistic_rise_inverse,
)


@dataclass(frozen=True)
class AdditiveLogistic:
    """Version 1 of the law: a floor set by the untrained policy and the model size, plus one logistic rise.

    ``R(t) = alpha * r_init + beta * size + gamma / (1 + exp(-delta * (t - t0)))``

    The floor moves with the start and the size; the rise itself does not depend on either. The value at ``t = 0`` is not
    ``r_init`` unless the constants happen to make it so.

    Source: arXiv 2507.18014 v1, as quoted by a later survey; the paper's numeric coefficients are not known to us.

    Attributes:
        alpha: weight of the untrained policy's reward.
        beta: reward per 1e9 parameters.
        gamma: height of the rise; negative for a falling curve.
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
        check_positive(self, "delta")

    @property
    def floor(self) -> float:
        """Level far before the inflection."""
        return self.alpha * self.r_init + self.beta * self.size

    @property
    def plateau(self) -> float:
        """Level far behind the inflection: floor + gamma."""
        return self.floor + self.gamma

    def __call__(self, t: ArrayLike) -> Array:
        """Rewards at times of any shape."""
        return np.asarray(self.floor + self.gamma * expit(self.delta * (np.asarray(t, dtype=np.float64) - self.t0)))

    def time_to(self, share: float) -> float:
        """Time at which ``share`` of the rise is done."""
        return float(logistic_rise_inverse(checked_share(share), self.t0, 1.0 / self.delta))


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
        check_positive(self, "timescale", "size")

    @property
    def tau(self) -> float:
        """Time scale of this model."""
        return float(self.timescale * self.size**self.size_exponent)

    def __call__(self, t: ArrayLike) -> Array:
        """Rewards at times of any shape."""
        return np.asarray(self.r_init + (self.plateau - self.r_init) * exponential_rise(t, self.tau))

    def time_to(self, share: float) -> float:
        """Time at which ``share`` of the rise is done."""
        return float(exponential_rise_inverse(checked_share(share), self.tau))


@dataclass(frozen=True)
class InertialSaturation:
    """The second-order law: momentum is a mass, off-policy lag takes damping away, and the mean reward is let go at rest.

    ``momentum * R'' + damping * R' + stiffness * (R - plateau) = 0``, ``R(0) = r_init``, ``R'(0) = 0``, where
    ``damping = 1 - momentum - curvature * learning_rate * refresh_steps`` and ``stiffness = curvature * learning_rate``.

    Damping squared above ``4 * momentum * stiffness`` gives two exponentials (a slow start, no overshoot), below it a dying
    oscillation; without momentum or lag it is the exponential law.

    Source: arXiv 2606.30789, abstract; the equation is our reconstruction, consistent with the paper's stability threshold
    ``curvature * learning_rate * refresh_steps < 1 - momentum``.

    Attributes:
        plateau: level that is approached.
        r_init: reward of the untrained policy.
        curvature: pull towards the plateau per unit of learning rate; positive.
        learning_rate: positive.
        momentum: in [0, 1).
        refresh_steps: steps between two refreshes of the sampling policy; 0 is on-policy.
    """

    plateau: float
    r_init: float
    curvature: float
    learning_rate: float
    momentum: float = 0.0
    refresh_steps: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "curvature", "learning_rate")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum} must lie in [0, 1)")
        if not self.damping > 0:
            raise ValueError(
                f"curvature * learning_rate * refresh_steps = {self.stiffness * self.refresh_steps:g} must stay below "
                f"1 - momentum = {1 - self.momentum:g}: beyond that it oscillates ever wider; refresh the sampler more often"
            )

    @property
    def stiffness(self) -> float:
        """Pull per step."""
        return self.curvature * self.learning_rate

    @property
    def damping(self) -> float:
        """1 less momentum and lag."""
        return 1.0 - self.momentum - self.stiffness * self.refresh_steps

    @property
    def oscillates(self) -> bool:
        """Whether it overshoots the plateau."""
        return self.damping**2 < 4.0 * self.momentum * self.stiffness

    def __call__(self, t: ArrayLike) -> Array:
        """Rewards at times of any shape."""
        return np.asarray(self.r_init + (self.plateau - self.r_init) * self._rise(t))

    def _rates(self) -> tuple[float, float]:
        """Slower rate and its ratio to the faster one, or the decay and the angular frequency of an oscillation."""
        root = math.sqrt(abs(self.damping**2 - 4.0 * self.momentum * self.stiffness))
        if self.oscillates:
            return self.damping / (2 * self.momentum), root / (2 * self.momentum)
        slow = 2.0 * self.stiffness / (self.damping + root)
        return slow, slow * 2.0 * self.momentum / (self.damping + root)

    def _rise(self, t: ArrayLike) -> Array:
        first, second = self._rates()
        if self.oscillates:
            time = np.asarray(t, dtype=np.float64)
            turn = np.cos(second * time) + first / second * np.sin(second * time)
            return np.asarray(1.0 - np.exp(-first * time) * turn)
        return exponential_rise(t, 1.0 / first) if second == 0 else inertial_rise(t, 1.0 / first, second)

    def time_to(self, share: float) -> float:
        """Time at which ``share`` of the rise is done."""
        share = checked_share(share)
        first, second = self._rates()
        if self.oscillates:  # rises all the way to its first peak, half a turn after the start
            from scipy.optimize import brentq  # noqa: PLC0415 (slow to import, and no forecast needs it)

            return float(brentq(lambda t: float(self._rise(t)) - share, 0.0, math.pi / second, xtol=1e-12))
        if second == 0:
            return float(exponential_rise_inverse(share, 1.0 / first))
        return float(inertial_rise_inverse(share, 1.0 / first, second))


@dataclass(frozen=True)
class ComputeSigmoid:
    """ScaleRL's law: a sigmoid in the logarithm of compute.

    ``R(C) = r_init + (plateau - r_init) / (1 + (midpoint / C) ** efficiency)``

    The tail is a power law: no finite compute ends it, and 95 % of the rise take ``19 ** (1 / efficiency)`` midpoints.

    Source: arXiv 2510.13786, equation 1 and appendices A.4 to A.8 (fitted on a held-out pass rate).

    Attributes:
        plateau: asymptote, A there.
        midpoint: compute at which half the rise is done, C_mid there; positive.
        efficiency: steepness, B there; positive.
        r_init: reward of the untrained policy.
    """

    plateau: float
    midpoint: float
    efficiency: float
    r_init: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "midpoint", "efficiency")

    def __call__(self, t: ArrayLike) -> Array:
        """Rewards at times of any shape."""
        return np.asarray(self.r_init + (self.plateau - self.r_init) * hill_rise(t, self.midpoint, self.efficiency))

    def time_to(self, share: float) -> float:
        """Time at which ``share`` of the rise is done."""
        return float(hill_rise_inverse(checked_share(share), self.midpoint, self.efficiency))


@dataclass(frozen=True)
class PowerInError:
    """The error falls as a power of what was spent.

    ``log10(1 - R) = log_error - k * log10(X)`` with ``k = k_max / (1 + half_size / size)``

    It has no plateau below 1, so it holds only between the knee of a curve and the limit of its data; it starts at ``X = 1``.

    Source: arXiv 2509.25300, equations of the learning efficiency k(N) and the offset E(N).

    Attributes:
        log_error: log10 of the error at ``X = 1``, E there.
        k_max: learning efficiency of an endless model; positive.
        half_size: size at which half of it is reached, N0 there; not negative.
        size: parameters of the model, in the unit of ``half_size``; positive.
    """

    log_error: float
    k_max: float
    half_size: float = 0.0
    size: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "k_max", "size")
        if not self.half_size >= 0:
            raise ValueError(f"half_size={self.half_size} must not be negative")

    @property
    def efficiency(self) -> float:
        """The exponent k of this model."""
        return self.k_max / (1.0 + self.half_size / self.size)

    @property
    def plateau(self) -> float:
        """No error at all: 1."""
        return 1.0

    def __call__(self, t: ArrayLike) -> Array:
        """Rewards at times of any shape."""
        return np.asarray(1.0 - 10.0**self.log_error * np.asarray(t, dtype=np.float64) ** -self.efficiency)

    def time_to(self, share: float) -> float:
        """The spending X at which a share of the error at ``X = 1`` is gone."""
        return float((1.0 - checked_share(share)) ** (-1.0 / self.efficiency))


@dataclass(frozen=True)
class Overoptimised:
    """A rise and a fall: ``R(t) = r_init + (plateau - r_init) * u * (1 - ln u)``, ``u = (t / peak_time) ** power``.

    The effect of an imperfect reward on the true one: ``d * (alpha - beta * ln d)`` in the distance ``d = sqrt(KL)`` from the
    first policy, rewritten with its peak and with ``d`` growing as ``t ** power``. Its plateau is the peak; the start is
    reached again at ``e ** (1 / power)`` peak times.

    Source: Gao et al. 2022 (arXiv 2210.10760), the form for reinforcement learning.

    Attributes:
        plateau: greatest reward.
        peak_time: when; positive.
        power: 1 where the distance grows steadily; positive.
        r_init: reward of the untrained policy.
    """

    plateau: float
    peak_time: float
    power: float = 1.0
    r_init: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "peak_time", "power")

    def __call__(self, t: ArrayLike) -> Array:
        """Rewards at times of any shape."""
        return np.asarray(self.r_init + (self.plateau - self.r_init) * hump_rise(t, self.peak_time, self.power))

    def time_to(self, share: float) -> float:
        """Time, before the peak, at which the share of the way to it is done."""
        return float(hump_rise_inverse(checked_share(share), self.peak_time, self.power))
