"""Exact Bayesian averaging of saturating reward curves from running sums.

Model of an observation at progress x: ``y = a + b * g_phi(x) + e``, ``Var e = s2 / w``. The shape ``phi`` lives on a fixed
grid; for each of its points ``(a, b, s2)`` has a normal-inverse-gamma prior and is integrated in closed form, so that six
running sums per shape say everything and a new observation costs the same at step 10 and at step 10,000. There is no sampler to
converge: the draws below are a fixed low-discrepancy set pushed through the exact posterior, so equal observations give equal
bits.

What the family cannot follow (second rises, declines, drifting noise) is carried by three constants, chosen by hand on
published curves of real runs: a discount of evidence beyond ``evidence_steps`` observations, a discrepancy added to forecasts,
and a probability of surprise taken off the certainty that nothing more will come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import gammaincinv, ndtr, ndtri, stdtr, stdtrit

from grpo_fast.law.forms import Array, exponential_rise, exponential_rise_inverse, logistic_rise, logistic_rise_inverse

NUM_DRAWS = 1024


@dataclass(frozen=True)
class Settings:
    """Prior of the curve in units of the reward's range, and what is allowed for its being wrong.

    Attributes:
        rises: prior of the rise ``b`` as a mixture of normals (weight, mean, standard deviation): most runs move little, some
            move all the way.
        start_sd: prior standard deviation of the start ``a`` around the first observation.
        noise_dof: prior degrees of freedom of the noise scale ``s2`` around 1 (weights already hold the noise).
        weights: prior weights of the families (logistic, exponential, linear, constant).
        evidence_steps: n observations count as ``n / (1 + n / evidence_steps)``.
        discrepancy: standard deviation of the level at the end of the budget around the family, for a forecast made at its
            start.
        discrepancy_dof: degrees of freedom of its Student distribution.
        surprise: probability, at the start of a budget, of a rise in it that the family does not hold (a second skill, a harder
            share of the prompts); it falls with what is left of the budget.
    """

    rises: tuple[tuple[float, float, float], ...] = ((0.4, 0.03, 0.08), (0.25, 0.2, 0.25), (0.35, 0.8, 0.25))
    start_sd: float = 0.3
    noise_dof: float = 6.0
    weights: tuple[float, float, float, float] = (0.6, 0.22, 0.06, 0.12)
    evidence_steps: float = 150.0
    discrepancy: float = 0.07
    discrepancy_dof: float = 3.0
    surprise: float = 0.2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Reads back what ``dataclasses.asdict`` wrote, also after a journey through JSON (lists for tuples)."""
        plain = dict(values)
        plain["rises"] = tuple(tuple(part) for part in plain["rises"])
        plain["weights"] = tuple(plain["weights"])
        return cls(**plain)


class ShapeGrid:
    """The grid of shapes: each is 0 at the start of the budget, and tends to 1 (or reaches it at the budget's end: linear).

    Attributes:
        log_prior: (M,) log of the prior weight of each shape.
        num_shapes: M.
    """

    def __init__(self, weights: tuple[float, float, float, float]) -> None:
        midpoints = np.array([2, 4, 7, 10, 13, 16.5, 20, 24, 28, 32.5, 37, 42, 48, 55, 65, 80, 100]) / 100
        widths = np.geomspace(0.008, 0.3, 12)
        self._midpoint = np.repeat(midpoints, widths.size)
        self._width = np.tile(widths, midpoints.size)
        self._timescale = np.geomspace(0.012, 2.5, 28)
        counts = np.array([self._midpoint.size, self._timescale.size, 1, 1])
        self.num_shapes = int(counts.sum())
        self.log_prior: Array = np.repeat(np.log(np.asarray(weights) / counts), counts)

    def rise(self, x: Array) -> Array:
        """Every shape at every ``x``.

        Args:
            x: (K,) progress in [0, 1].

        Returns:
            (M, K) float64.
        """
        at = np.asarray(x, dtype=np.float64)[None, :]
        return np.concatenate(
            [
                logistic_rise(at, self._midpoint[:, None], self._width[:, None]),
                exponential_rise(at, self._timescale[:, None]),
                at,
                np.zeros_like(at),
            ]
        )

    def time_to(self, share: float) -> Array:
        """(M,) progress at which each shape has done ``share`` of its rise; infinite for the constant one."""
        return np.concatenate(
            [
                logistic_rise_inverse(share, self._midpoint, self._width),
                exponential_rise_inverse(share, self._timescale),
                [share, np.inf],
            ]
        )


@dataclass(frozen=True)
class Draws:
    """A weighted sample of the posterior, N draws, in reward units.

    Attributes:
        shape: (N,) index of the shape.
        weight: (N,) weights that sum to 1.
        start: (N,) ``a``.
        rise: (N,) ``b``.
        unit_discrepancy: (N,) standard Student draws, to be scaled.
    """

    shape: np.ndarray[tuple[int], np.dtype[np.intp]]
    weight: Array
    start: Array
    rise: Array
    unit_discrepancy: Array

    def curve(self, table: Array) -> Array:
        """Mean curves (N, K) of the draws, from a (M, K) table of shapes."""
        return np.asarray(self.start[:, None] + self.rise[:, None] * table[self.shape])


def weighted_quantiles(values: Array, weight: Array, probabilities: Array) -> Array:
    """Quantiles of a weighted sample, column by column.

    Args:
        values: (N, K).
        weight: (N,) that sum to 1.
        probabilities: (Q,) in (0, 1).

    Returns:
        (Q, K) float64.
    """
    order = np.argsort(values, axis=0, kind="stable")
    ranked = np.take_along_axis(values, order, axis=0)
    mass = weight[order]
    centre = np.cumsum(mass, axis=0) - 0.5 * mass
    columns = [np.interp(probabilities, centre[:, k], ranked[:, k]) for k in range(values.shape[1])]
    return np.stack(columns, axis=1)


def _lattice(size: int, dimensions: int) -> Array:
    """(size, dimensions) Kronecker points in (0, 1) of the generalised golden ratio; the first coordinate is an even ladder."""
    ratio = 2.0
    for _ in range(64):
        ratio = (1.0 + ratio) ** (1.0 / dimensions)
    steps = ratio ** -np.arange(1.0, dimensions)
    index = np.arange(size)[:, None]
    ladder = (index + 0.5) / size
    return np.concatenate([ladder, np.clip((0.5 + (index + 1) * steps) % 1.0, 1e-6, 1 - 1e-6)], axis=1)


class Posterior:
    """Running sums and what follows from them. All rewards are as observed; units are handed in when a forecast is asked."""

    def __init__(self, settings: Settings, *, centre: float = 0.0) -> None:
        self.settings = settings
        self.grid = ShapeGrid(settings.weights)
        self.num_observations = 0
        self._scalar = np.zeros(3)  # sums of w, w*y, w*y*y
        self._shape = np.zeros((3, self.grid.num_shapes))  # sums of w*g, w*g*g, w*g*y
        self._centre = centre
        self._end = self.grid.rise(np.ones(1))[:, 0]
        points = _lattice(NUM_DRAWS, 5)
        self._points = points
        self._normal: Array = np.asarray(ndtri(points[:, 3]), dtype=np.float64)
        self._student: Array = np.asarray(stdtrit(settings.discrepancy_dof, points[:, 4]), dtype=np.float64)

    def add(self, x: float, y: float, variance: float) -> None:
        """Takes one observation: progress ``x``, reward ``y``, and the variance of its noise (reward units squared)."""
        if self.num_observations == 0:
            self._centre = y  # sums of squares around the first reward lose no digits to its level
        w, z = 1.0 / variance, y - self._centre
        g = self.grid.rise(np.array([x]))[:, 0]
        self._scalar += (w, w * z, w * z * z)
        self._shape += np.stack([w * g, w * g * g, w * z * g])
        self.num_observations += 1

    def draws(self, *, unit: float, low: float, high: float) -> Draws:
        """A fixed-size weighted sample of (shape, start, rise).

        Args:
            unit: reward that the prior calls 1.
            low: smallest mean reward that is possible at the end of the budget; may be ``-inf``.
            high: largest; may be ``inf``.

        Returns:
            Draws in reward units.
        """
        mean_a, mean_b, cov, log_weight, dof, scale = self._solve(unit)
        end = np.broadcast_to(self._end, mean_a.shape)
        level = mean_a + end * mean_b
        var_level = cov[0] + 2 * end * cov[1] + end**2 * cov[2]
        bounds = (low - self._centre, high - self._centre)
        spread = np.sqrt(scale * var_level)
        inside = stdtr(dof, (bounds[1] - level) / spread) - stdtr(dof, (bounds[0] - level) / spread)
        mass = np.exp(log_weight - log_weight.max()) * np.maximum(inside, 1e-12)
        cumulative = np.cumsum(mass.ravel())
        pick = np.searchsorted(cumulative, self._points[:, 0] * cumulative[-1])
        pick = np.minimum(pick, mass.size - 1)

        def chosen(array: Array) -> Array:
            return np.asarray(np.broadcast_to(array, mass.shape).reshape(-1)[pick], dtype=np.float64)

        # s2 | data is inverse gamma; the level at the end of the budget is drawn inside its bounds, then b given that level.
        s2 = chosen(scale) * dof / (2.0 * gammaincinv(dof / 2.0, self._points[:, 1]))
        centre, sd = chosen(level), np.sqrt(s2 * chosen(var_level))
        floor, ceiling = ndtr((bounds[0] - centre) / sd), ndtr((bounds[1] - centre) / sd)
        room = np.maximum(ceiling - floor, 1e-12)
        at_end = centre + sd * ndtri(np.clip(floor + self._points[:, 2] * room, 1e-15, 1 - 1e-15))
        at_end = np.clip(at_end, *bounds)
        slope = chosen((cov[1] + end * cov[2]) / var_level)
        left = np.maximum(chosen(cov[2] - (cov[1] + end * cov[2]) ** 2 / var_level), 0.0)
        rise = chosen(mean_b) + slope * (at_end - centre) + np.sqrt(s2 * left) * self._normal
        shape = pick % self.grid.num_shapes
        rise = np.where(shape == self.grid.num_shapes - 1, 0.0, rise)  # the constant has none; its b would be the bare prior
        start = at_end - rise * chosen(end) + self._centre
        weight = room / np.maximum(chosen(inside), 1e-12)
        return Draws(shape, weight / weight.sum(), start, rise, self._student)

    def _solve(self, unit: float) -> tuple[Array, Array, Array, Array, float, Array]:
        """Closed-form posterior of every (prior scale, shape): means, (co)variances over s2, log evidence, dof, scale of s2."""
        s = self.settings
        n = self.num_observations
        discount = 1.0 / (1.0 + n / s.evidence_steps)
        sw, sy, syy = discount * self._scalar
        sg, sgg, sgy = discount * self._shape
        prior_a = 1.0 / (s.start_sd * unit) ** 2
        share, rise, rise_sd = (column[:, None] for column in np.array(s.rises).T)
        rise, prior_b = rise * unit, 1.0 / (rise_sd * unit) ** 2
        aa, ab, bb = prior_a + sw, sg[None, :], prior_b + sgg
        ca, cb = sy, prior_b * rise + sgy
        determinant = aa * bb - ab * ab
        mean_a = (bb * ca - ab * cb) / determinant
        mean_b = (aa * cb - ab * ca) / determinant
        dof = s.noise_dof + discount * n
        residual = s.noise_dof + syy + prior_b * rise**2 - (ca * mean_a + cb * mean_b)
        residual = np.maximum(residual, 0.5 * s.noise_dof)
        evidence = 0.5 * np.log(prior_b) - 0.5 * np.log(determinant) - 0.5 * dof * np.log(residual)
        log_weight = self.grid.log_prior + np.log(share) + evidence
        cov = np.stack([bb / determinant, -ab / determinant, aa / determinant])
        return mean_a, mean_b, cov, log_weight, dof, residual / dof
