"""Noise of a step's mean reward, from its counts and from how far neighbouring rewards scatter.

The counts say how the noise of one step compares with that of another (half the prompts, twice the variance); the second
differences of the rewards, which see the scatter through any steady trend, say how large it is.
"""

from __future__ import annotations

from collections import deque

BETWEEN, WITHIN = 0.1, 0.12
"""Variance of prompts' mean rewards, and of rewards inside a group, in squared units of the range: a run in mid-course."""

_MEMORY = 0.99
_PSEUDO, _FADE = 3.0, 0.85
LEAST_SD = 0.003
"""Least standard deviation of a reward's noise, in units of the range: no shape is exactly true."""


class Scatter:
    """Follows one run's noise.

    Attributes:
        ratio: factor from expected to observed variances, in reward units squared.
    """

    def __init__(self) -> None:
        self.ratio = 1.0
        self._recent: deque[tuple[float, float]] = deque(maxlen=3)
        self._count = 0
        self._found = self._known = 0.0

    def expected(self, reward: float, *, unit: float, num_prompts: int, num_generations: int, spread: float | None) -> float:
        """Takes the newest reward and returns the expected variance of its noise, up to the factor :attr:`ratio`.

        Variances are shares of the squared range: where the range is unknown and grows with what is seen, the first rewards
        would count most if it stood in them.

        Args:
            reward: the newest.
            unit: range of rewards.
            num_prompts: prompts in the mean.
            num_generations: completions per prompt.
            spread: standard deviation of rewards inside groups; None where unknown.

        Returns:
            Variance in squared units of the range.
        """
        within = WITHIN if spread is None else (spread / unit) ** 2
        theory = (BETWEEN + within / num_generations) / num_prompts
        self._recent.append((reward, theory))
        self._count += 1
        if len(self._recent) == 3:
            (before, v0), (middle, v1), (last, v2) = self._recent
            self._found = _MEMORY * self._found + (before - 2.0 * middle + last) ** 2 / (v0 + 4.0 * v1 + v2)
            self._known = _MEMORY * self._known + 1.0
        pseudo = _PSEUDO * _FADE**self._count
        ratio = (pseudo * unit**2 + self._found) / (pseudo + self._known)
        self.ratio = max(ratio, (LEAST_SD * unit) ** 2 / theory)
        return theory
