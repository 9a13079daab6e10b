"""Converts steps and progress: the law counts in summed learning rate, people count in steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grpo_fast.law.forms import Array

RECENT = 0.2
"""Share of the observed rewards, the newest ones, that counts as recent."""


@dataclass(frozen=True)
class StepClock:
    """Steps and progress as they were up to now, and on to the budget's end.

    What is left of the progress is taken to run out as a power of what is left of the steps, at the rate of the last steps.
    That is exact for a constant learning rate (power 1) and for one that falls linearly to zero (power 2), and close for a
    cosine.

    Attributes:
        steps: (n,) increasing, from 0 to the last step; n >= 2.
        progress: (n,) share of the budget's summed learning rate behind each; never falls, at most 1.
        horizon: last step of the budget.
    """

    steps: Array
    progress: Array
    horizon: int

    def progress_at(self, step: Array) -> Array:
        """Progress at steps between 0 and the horizon (any shape)."""
        now, done, power = self._ahead()
        left = np.clip((self.horizon - step) / max(self.horizon - now, 1.0), 0.0, 1.0)
        return np.where(step <= now, np.interp(step, self.steps, self.progress), 1.0 - (1.0 - done) * left**power)

    def step_at(self, progress: float) -> float:
        """Step at which a progress in [0, 1] is reached."""
        now, done, power = self._ahead()
        if progress <= done:
            return float(np.interp(progress, self.progress, self.steps))
        return now + (self.horizon - now) * (1.0 - float(((1.0 - progress) / (1.0 - done)) ** (1.0 / power)))

    def _ahead(self) -> tuple[float, float, float]:
        """Step and progress now, and the power."""
        step, done = float(self.steps[-1]), float(self.progress[-1])
        if step >= self.horizon or done >= 1.0:
            return step, done, 1.0
        back = max(0, self.steps.size - 3)
        rate = (done - self.progress[back]) / (step - self.steps[back])
        return step, done, float(np.clip(rate * (self.horizon - step) / (1.0 - done), 0.25, 4.0))
