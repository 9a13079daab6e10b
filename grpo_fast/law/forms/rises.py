"""Unit shapes of a rise on arrays of parameters: 0 at ``t = 0`` and 1 at the plateau, and when a share of it is reached.

All arguments broadcast: (M, 1) parameters against (K,) times give (M, K), float64. Times are not negative; an inverse takes
shares in [0, 1). Two shapes end elsewhere: ``logarithmic_rise`` is 1 at ``t = 1`` and rises for ever, ``hump_rise`` is 1 at its
peak and falls behind it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, lambertw

Array = NDArray[np.float64]

_BISECTIONS = 60


def _floats(*values: ArrayLike) -> tuple[Array, ...]:
    return tuple(np.asarray(value, dtype=np.float64) for value in values)


def exponential_rise(t: ArrayLike, timescale: ArrayLike) -> Array:
    """``1 - exp(-t / timescale)``: steepest at its start."""
    time, tau = _floats(t, timescale)
    return np.asarray(-np.expm1(-time / tau))


def exponential_rise_inverse(share: ArrayLike, timescale: ArrayLike) -> Array:
    """``-timescale * ln(1 - share)``."""
    part, tau = _floats(share, timescale)
    return np.asarray(-tau * np.log1p(-part))


def logistic_rise(t: ArrayLike, midpoint: ArrayLike, width: ArrayLike) -> Array:
    """A logistic shifted and scaled to be 0 at ``t = 0``.

    ``(s(t) - s(0)) / (1 - s(0))`` with ``s(t) = 1 / (1 + exp((midpoint - t) / width))``

    Args:
        t: times.
        midpoint: where the steepest rise is (the inflection).
        width: time in which the odds of being done grow by e; positive. 1 / delta of the paper.
    """
    time, middle, wide = _floats(t, midpoint, width)
    start = expit(-middle / wide)
    return np.asarray((expit((time - middle) / wide) - start) / (1.0 - start))


def logistic_rise_inverse(share: ArrayLike, midpoint: ArrayLike, width: ArrayLike) -> Array:
    """Time at which :func:`logistic_rise` reaches ``share``: the logit of the level, moved and stretched."""
    part, middle, wide = _floats(share, midpoint, width)
    start = expit(-middle / wide)
    level = start + part * (1.0 - start)
    return np.asarray(middle + wide * (np.log(level) - np.log1p(-level)))


def weibull_rise(t: ArrayLike, timescale: ArrayLike, power: ArrayLike) -> Array:
    """``1 - exp(-(t / timescale)^power)`` (Janoschek's growth curve): slow start above power 1, stretched tail below it."""
    time, tau, exponent = _floats(t, timescale, power)
    return np.asarray(-np.expm1(-((time / tau) ** exponent)))


def weibull_rise_inverse(share: ArrayLike, timescale: ArrayLike, power: ArrayLike) -> Array:
    """``timescale * (-ln(1 - share))^(1 / power)``."""
    part, tau, exponent = _floats(share, timescale, power)
    return np.asarray(tau * (-np.log1p(-part)) ** (1.0 / exponent))


def hill_rise(t: ArrayLike, midpoint: ArrayLike, power: ArrayLike) -> Array:
    """``1 / (1 + (midpoint / t)^power)``: half done at the midpoint, then a power-law tail. ScaleRL's sigmoid."""
    time, middle, exponent = _floats(t, midpoint, power)
    grown = (time / middle) ** exponent
    return np.asarray(grown / (1.0 + grown))


def hill_rise_inverse(share: ArrayLike, midpoint: ArrayLike, power: ArrayLike) -> Array:
    """``midpoint * (share / (1 - share))^(1 / power)``."""
    part, middle, exponent = _floats(share, midpoint, power)
    return np.asarray(middle * (part / (1.0 - part)) ** (1.0 / exponent))


def inertial_rise(t: ArrayLike, timescale: ArrayLike, ratio: ArrayLike) -> Array:
    """Two exponentials with a level start: an overdamped mass let go at rest.

    ``1 - (exp(-u) - ratio * exp(-u / ratio)) / (1 - ratio)`` with ``u = t / timescale``; at ratio 1 its limit
    ``1 - (1 + u) * exp(-u)``.

    Args:
        t: times.
        timescale: of the slower exponential, which the tail follows; positive.
        ratio: the faster time scale over the slower one, in (0, 1]; towards 0 this is the plain exponential.
    """
    time, tau, fast = _floats(t, timescale, ratio)
    u = time / tau
    apart = u * (1.0 - fast) / fast
    some = np.where(apart > 0, apart, 1.0)
    # (1 - exp(-apart)) / apart keeps its digits where both exponentials are nearly the same.
    mean = np.where(apart > 0, -np.expm1(-some) / some, 1.0)
    return np.asarray(-np.expm1(-u) - np.exp(-u) * u * mean)


def inertial_rise_inverse(share: ArrayLike, timescale: ArrayLike, ratio: ArrayLike) -> Array:
    """Time at which :func:`inertial_rise` reaches ``share``, by bisection to the last bit or so."""
    part, tau, fast = (np.array(value) for value in np.broadcast_arrays(*_floats(share, timescale, ratio)))
    low, high = np.zeros_like(part), 2.0 - 2.0 * np.log1p(-part)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        before = inertial_rise(middle, 1.0, fast) < part
        low, high = np.where(before, middle, low), np.where(before, high, middle)
    return np.asarray(np.where(part == 0, 0.0, 0.5 * (low + high)) * tau)


def power_rise(t: ArrayLike, timescale: ArrayLike, power: ArrayLike) -> Array:
    """``1 - (1 + t / timescale)^-power``: steepest at its start, with a power-law tail. Known as pow4."""
    time, tau, exponent = _floats(t, timescale, power)
    return np.asarray(-np.expm1(-exponent * np.log1p(time / tau)))


def power_rise_inverse(share: ArrayLike, timescale: ArrayLike, power: ArrayLike) -> Array:
    """``timescale * ((1 - share)^(-1 / power) - 1)``."""
    part, tau, exponent = _floats(share, timescale, power)
    return np.asarray(tau * np.expm1(-np.log1p(-part) / exponent))


def logarithmic_rise(t: ArrayLike, scale: ArrayLike) -> Array:
    """``ln(1 + t / scale) / ln(1 + 1 / scale)``: 1 at ``t = 1``, without a plateau; straight where the scale is long."""
    time, length = _floats(t, scale)
    return np.asarray(np.log1p(time / length) / np.log1p(1.0 / length))


def logarithmic_rise_inverse(share: ArrayLike, scale: ArrayLike) -> Array:
    """``scale * ((1 + 1 / scale)^share - 1)``."""
    part, length = _floats(share, scale)
    return np.asarray(length * np.expm1(part * np.log1p(1.0 / length)))


def hump_rise(t: ArrayLike, peak: ArrayLike, power: ArrayLike) -> Array:
    """``u * (1 - ln u)`` with ``u = (t / peak)^power``: 0 at the start, 1 at the peak, 0 again at ``e^(1 / power)`` peaks.

    The course of a true reward while the rewarded one is over-optimised, for a distance from the first policy that grows as
    ``t^power``.
    """
    time, top, exponent = _floats(t, peak, power)
    u = (time / top) ** exponent
    return np.asarray(u * (1.0 - np.log(np.where(u > 0, u, 1.0))))


def hump_rise_inverse(share: ArrayLike, peak: ArrayLike, power: ArrayLike) -> Array:
    """Time before the peak at which :func:`hump_rise` reaches ``share``: ``u = -share / W(-share / e)``, W's lower branch."""
    part, top, exponent = _floats(share, peak, power)
    some = np.where(part > 0, part, 0.5)
    u = np.where(part > 0, -some / lambertw(-some / np.e, k=-1).real, 0.0)
    return np.asarray(top * u ** (1.0 / exponent))
