"""Exact Bayesian averaging of reward curves with drift, from running sums.

Model of an observation at progress x, with ``v`` the variance that its noise is thought to have:

    y = a + b g_phi(x) + W(x) + e,    Var e = s2 v,    dW ~ N(0, s2 v kappa^2 dx)

The shape ``phi`` and the drift's size ``kappa`` lie on fixed grids. For each pair a Kalman filter with the gains of ``kappa``
takes the drift out of the observations, of the constant and of the shape alike; what comes out has independent errors, and
``(a, b, s2)`` with a normal-inverse-gamma prior are integrated in closed form. The rise ``b`` is a priori one of several
normals, so that "most runs move little and some move all the way" can be said. Everything is running sums: an observation costs
the same at step 10 and at step 10,000. There is no sampler that would have to converge: draws are a fixed low-discrepancy set
pushed through the exact posterior, so equal observations give equal bits.

The drift is also what smoothed rewards are known by: hardly any noise between neighbours, and as much as ever over the whole.

Three deliberate simplifications: evidence counts as ``n / (1 + n / 300)`` observations and ``s2 v`` never falls below a least
variance, because no shape is exactly true, and a level at the budget's end outside the range of rewards is cut off while the
way there is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import gammaincinv, ndtr, ndtri, stdtr

from grpo_fast.law.forms import Array
from grpo_fast.law.shapes import ShapeGrid

DRIFTS = np.array([0.0, 0.4, 1.0, 2.5, 6.3, 16.0, 40.0, 100.0])
"""kappa: standard deviation of the drift over a whole budget, in those of the noise of one reward."""
GRID = ShapeGrid()
NUM_DRAWS = 1024
EVIDENCE_STEPS = 300.0
"""Observations that evidence cannot outgrow: no shape is exactly true."""

_NOISE_DOF = 6.0
_TINY = 1e-12
_DIMENSIONS = 8


@dataclass(frozen=True)
class Believed:
    """The prior of one run in reward units, made by :class:`~grpo_fast.law.prior.Prior`.

    Attributes:
        log_parts: (P,) log probabilities of the normals that ``b`` may come from.
        rise: (P,) their means.
        rise_sd: (P,) their standard deviations.
        log_shapes: (M,) log probabilities of the shapes.
        log_drifts: (K,) log probabilities of :data:`DRIFTS`.
        start_sd: standard deviation of ``a`` around the first reward.
        least_noise: least standard deviation of one reward's noise.
        low: least mean reward that is possible at the budget's end; may be ``-inf``.
        high: greatest; may be ``inf``.
    """

    log_parts: Array
    rise: Array
    rise_sd: Array
    log_shapes: Array
    log_drifts: Array
    start_sd: float
    least_noise: float
    low: float
    high: float


@dataclass(frozen=True)
class Solved:
    """The closed-form posterior of every (part, drift, shape); arrays broadcast to (P, K, M). Rewards less the centre.

    Attributes:
        log_weight: log evidence with the prior's part.
        mean_a: of ``a``.
        mean_b: of ``b``.
        cov_aa: variance of ``a``, in units of s2.
        cov_ab: covariance.
        cov_bb: variance of ``b``.
        dof: degrees of freedom of s2.
        scale: of s2.
        level: mean of the level at the budget's end.
        level_var: its variance, in units of s2.
    """

    log_weight: Array
    mean_a: Array
    mean_b: Array
    cov_aa: Array
    cov_ab: Array
    cov_bb: Array
    dof: float
    scale: Array
    level: Array
    level_var: Array


@dataclass(frozen=True)
class Draws:
    """An evenly weighted sample of N runs from the posterior, in reward units.

    Attributes:
        shape: int (N,) index into :data:`GRID`.
        start: (N,) ``a``.
        rise: (N,) ``b``.
        drift: (N,) drift so far.
        drift_ahead: (N,) drift from now to the budget's end.
        bridge: (N,) standard deviation of a Brownian bridge over what is left, at its middle twice.
        normal: (N,) standard normals for that bridge.
        weight: (N,) weights that sum to 1.
        noise_share: share of noise, rather than drift, in what is new in a reward, in (0, 1]: near 1 where rewards scatter on
            their own, near 0 where they follow one another.
    """

    shape: np.ndarray[tuple[int], np.dtype[np.intp]]
    start: Array
    rise: Array
    drift: Array
    drift_ahead: Array
    bridge: Array
    normal: Array
    weight: Array
    noise_share: float

    def curve(self, table: Array, x: Array, now: float) -> Array:
        """Mean rewards (N, K) of the draws at progress x (K,), from the (M, K) table of shapes; ``now`` is progress so far."""
        done = np.clip(x / now, 0.0, 1.0) if now > 0 else np.ones_like(x)
        ahead = np.clip((x - now) / (1.0 - now), 0.0, 1.0) if now < 1 else np.zeros_like(x)
        wander = self.drift[:, None] * done + self.drift_ahead[:, None] * ahead
        between = np.sqrt(ahead * (1.0 - ahead)) * (self.bridge * self.normal)[:, None]
        return np.asarray(self.start[:, None] + self.rise[:, None] * table[self.shape] + wander + between)


def quantiles(values: Array, weight: Array, probabilities: Array) -> Array:
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


_POINTS = _lattice(NUM_DRAWS, _DIMENSIONS)
_NORMALS: Array = np.asarray(ndtri(_POINTS[:, 3:]), dtype=np.float64)
_END = GRID.rise(np.ones(1))[:, 0]


class Posterior:
    """Running sums of one run, and its posterior under a prior.

    Attributes:
        num_observations: rewards taken.
        centre: reward that all sums count from: the first.
        progress: greatest so far.
        noise: variance of the newest reward, as given.
        ratio: factor of all variances given so far; may change at any time.
    """

    def __init__(self) -> None:
        num_drifts, num_shapes = DRIFTS.size, GRID.num_shapes
        self.num_observations = 0
        self.centre = 0.0
        self.progress = 0.0
        self.noise = 0.0
        self.ratio = 1.0
        self._variance = np.zeros((num_drifts, 1))  # of the drift so far, given a and b
        self._of_one, self._of_y = np.zeros((num_drifts, 1)), np.zeros((num_drifts, 1))
        self._of_shape = np.zeros((num_drifts, num_shapes))  # filtered means of the drift, were y the constant, y, a shape
        self._plain = np.zeros((4, num_drifts, 1))  # sums over observations of 11, 1y, yy, log F
        self._shaped = np.zeros((3, num_drifts, num_shapes))  # of 1g, gg, gy

    def add(self, x: float, y: float, variance: float) -> None:
        """Takes one observation: progress ``x``, reward ``y``, and the variance of its noise (reward units squared)."""
        if self.num_observations == 0:
            self.centre = y  # sums of squares around the first reward lose no digits to its level
        shapes = GRID.rise(np.array([x]))[:, 0]
        predicted = self._variance + DRIFTS[:, None] ** 2 * (variance * max(x - self.progress, 0.0))
        total = predicted + variance
        gain = predicted / total
        one, new, shape = 1.0 - self._of_one, y - self.centre - self._of_y, shapes - self._of_shape
        self._plain += np.stack([one * one / total, one * new / total, new * new / total, np.log(total / variance)])
        self._shaped += np.stack([one * shape / total, shape * shape / total, shape * new / total])
        self._of_one += gain * one
        self._of_y += gain * new
        self._of_shape += gain * shape
        self._variance = predicted * (1.0 - gain)
        self.noise = variance
        self.progress = max(self.progress, x)
        self.num_observations += 1

    def sums(self) -> tuple[Array, Array]:
        """Sums without drift: (3,) of 11, 1y, yy and (3, M) of 1g, gg, gy, rewards less the centre, weighted by 1 / v."""
        return self._plain[:3, 0, 0], self._shaped[:, 0]

    def solve(self, prior: Believed) -> Solved:
        """The posterior of every component in closed form."""
        n = self.num_observations
        discount = 1.0 / (1.0 + n / EVIDENCE_STEPS)
        s11, s1y, syy = discount / self.ratio * self._plain[:3]
        s1g, sgg, sgy = discount / self.ratio * self._shaped
        log_f = discount * self._plain[3]
        prior_a, rise = prior.start_sd**-2, prior.rise[:, None, None]
        prior_b = prior.rise_sd[:, None, None] ** -2
        aa, bb = prior_a + s11, prior_b + sgg
        ca, cb = s1y, prior_b * rise + sgy
        determinant = aa * bb - s1g**2
        mean_a, mean_b = (bb * ca - s1g * cb) / determinant, (aa * cb - s1g * ca) / determinant
        dof, told = _NOISE_DOF + discount * n, self.ratio * self.noise
        residual = _NOISE_DOF + syy + prior_b * rise**2 - (ca * mean_a + cb * mean_b)
        residual = np.maximum(residual, 0.5 * _NOISE_DOF)
        least = min(1.0, prior.least_noise**2 / told) if told > 0.0 else 1.0
        evidence = 0.5 * (np.log(prior_a * prior_b) - np.log(determinant) - dof * np.log(residual) - log_f)
        beliefs = prior.log_parts[:, None, None] + prior.log_drifts[:, None] + prior.log_shapes
        cov_aa, cov_ab, cov_bb = bb / determinant, -s1g / determinant, aa / determinant
        of_a, of_b = 1.0 - self._of_one, _END - self._of_shape
        level = self._of_y + of_a * mean_a + of_b * mean_b
        ahead = DRIFTS[:, None] ** 2 * (self.noise * (1.0 - self.progress))
        level_var = of_a**2 * cov_aa + 2.0 * of_a * of_b * cov_ab + of_b**2 * cov_bb + self.ratio * (self._variance + ahead)
        return Solved(
            evidence + beliefs,
            mean_a,
            mean_b,
            cov_aa,
            cov_ab,
            cov_bb,
            dof,
            np.maximum(residual / dof, least),
            level,
            np.maximum(level_var, _TINY**2),
        )

    def draws(self, prior: Believed) -> Draws:
        """A fixed-size sample of whole runs; levels at the end lie in the prior's bounds."""
        solved = self.solve(prior)
        bounds = (prior.low - self.centre, prior.high - self.centre)
        spread = np.sqrt(solved.scale * solved.level_var)
        inside = stdtr(solved.dof, (bounds[1] - solved.level) / spread) - stdtr(solved.dof, (bounds[0] - solved.level) / spread)
        mass = np.exp(solved.log_weight - solved.log_weight.max()) * np.maximum(inside, _TINY)
        cumulative = np.cumsum(mass.ravel())
        pick = np.minimum(np.searchsorted(cumulative, _POINTS[:, 0] * cumulative[-1]), mass.size - 1)
        part, kind, shape = np.unravel_index(pick, mass.shape)

        def chosen(array: Array) -> Array:
            return np.asarray(np.broadcast_to(array, mass.shape)[part, kind, shape], dtype=np.float64)

        # s2 given the data is inverse gamma.
        s = np.sqrt(chosen(solved.scale) * solved.dof / (2.0 * gammaincinv(solved.dof / 2.0, _POINTS[:, 1])))
        level, level_sd = chosen(solved.level), s * np.sqrt(chosen(solved.level_var))
        floor, ceiling = ndtr((bounds[0] - level) / level_sd), ndtr((bounds[1] - level) / level_sd)
        room = np.maximum(ceiling - floor, _TINY)
        wanted = level + level_sd * ndtri(np.clip(floor + _POINTS[:, 2] * room, 1e-15, 1 - 1e-15))
        wanted = np.clip(wanted, *bounds)

        # A free draw of everything, moved by regression onto the wanted level: an exact draw given that level.
        aa, ab, bb = chosen(solved.cov_aa), chosen(solved.cov_ab), chosen(solved.cov_bb)
        of_a, of_b = chosen(1.0 - self._of_one), chosen(_END - self._of_shape)
        now = self.ratio * chosen(self._variance)
        ahead = (DRIFTS**2)[kind] * (self.ratio * self.noise * (1.0 - self.progress))
        free_a = s * np.sqrt(aa) * _NORMALS[:, 0]
        free_b = s * (ab / np.sqrt(aa) * _NORMALS[:, 0] + np.sqrt(np.maximum(bb - ab**2 / aa, 0.0)) * _NORMALS[:, 1])
        free_now, free_ahead = s * np.sqrt(now) * _NORMALS[:, 2], s * np.sqrt(ahead) * _NORMALS[:, 3]
        short = (wanted - level - (of_a * free_a + of_b * free_b + free_now + free_ahead)) / chosen(solved.level_var)
        a = chosen(solved.mean_a) + free_a + (of_a * aa + of_b * ab) * short
        b = chosen(solved.mean_b) + free_b + (of_a * ab + of_b * bb) * short
        b = np.where(shape == GRID.num_shapes - 1, 0.0, b)  # the flat shape has no rise; its b would be the bare prior
        drift = chosen(self._of_y) - a * chosen(self._of_one) - b * chosen(self._of_shape) + free_now + now * short
        weight = room / np.maximum(chosen(inside), _TINY)
        weight /= weight.sum()
        stride = self.progress / max(self.num_observations, 1)
        return Draws(
            shape=shape,
            start=a + self.centre,
            rise=b,
            drift=drift,
            drift_ahead=free_ahead + ahead * short,
            bridge=s * np.sqrt(ahead),
            normal=_NORMALS[:, 4],
            weight=weight,
            noise_share=float(weight @ (1.0 / (1.0 + (DRIFTS**2)[kind] * stride))),
        )
