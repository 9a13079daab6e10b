"""The collapse alarm: it tells a collapsing policy from one that has reached its plateau or had an unlucky batch.

The reward is compared with its own recent level, and signals that tend to move with a collapse with their own recent trends:
entropy (either way), gradient norm, share of truncated completions, KL, share of groups without variance. Each goes through a
one-sided CUSUM (Page 1954) of standardised residuals ``z``, cut at 3 so that no single batch decides::

    S_t = max(0, S_{t-1} + z_t - 1)

``z`` is measured against the last 50 values *before* S left zero, so that a fall does not lower its own baseline. That step is
also the onset. While the reward rises, its level is that of the last ten of them less three quarters of the noise. Two things
confirm a collapse, both only where the reward of the last five steps is at least a fifth (of its height above the least
possible) below its level before the onset, and more than two epsilon:

- the reward's S reaches 9, alone; or
- it reaches 6 while another signal is over its own threshold of 8 and has moved by what matters for it.

Thresholds come from simulated run lengths (``tests/law/test_alarm.py`` repeats a part): beta-binomial rewards, flat or rising,
and five other signals that drift and wander. Of 150 runs of 1,000 quiet steps each with 2x8, 8x8, 16x8 and 64x16 completions a
step, two of the first kind (1.3 %) raised a false alarm and none of the others. A collapse from 0.6 to 0.3 over 20 steps is
confirmed after (median, and 90 % of the runs) 10 and 12 steps with 64x16 completions, 12 and 15 with 16x8, 16 and 20 with 8x8;
its onset is put 2, 5 and 6 steps late. With 2x8 the noise makes that 29 steps, and more than 60 in a tenth of the runs.

Not covered: declines slower than a run's noise shows within 60 steps, and a fall in the first 15 steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALONE, TOGETHER, OTHER = 9.0, 6.0, 8.0
_SLACK = 1.0
_CLIP = 3.0
_CEILING = 20.0
_WINDOW, _LEAST = 50, 15
_RECENT, _TOLD, _SHORTEST, _LONGEST = 5, 10, 3, 60
_LATE = 30
_RISE = 0.75
_DROP = 0.2
_ABSOLUTE_DIFFERENCE_TO_SD = 0.8862269254527580  # of two normals: E|a - b| = 2 sd / sqrt(pi)


@dataclass(frozen=True)
class Signal:
    """A metric other than the reward that moves when a policy collapses.

    Attributes:
        metric: its name among the metrics of a step.
        words: what people call it.
        direction: 1 where a rise is bad, -1 where a fall is.
        change: how far it must have moved to matter: a factor where ``factor``, a difference elsewhere.
        factor: whether it is judged by its logarithm.
        floor: least standard deviation it is taken to have; of the logarithm where ``factor``.
    """

    metric: str
    words: str
    direction: int
    change: float
    factor: bool
    floor: float

    def read(self, value: float) -> float:
        """The value as it is judged."""
        return math.log(max(value, 1e-6)) if self.factor else value

    def show(self, judged: float) -> float:
        """Inverse of :meth:`read`."""
        return math.exp(judged) if self.factor else judged

    @property
    def least(self) -> float:
        """:attr:`change` on the scale of :meth:`read`."""
        return math.log(self.change) if self.factor else self.change


SIGNALS = {
    "entropy_up": Signal("entropy", "entropy", 1, 1.35, factor=True, floor=0.03),
    "entropy_down": Signal("entropy", "entropy", -1, 1.35, factor=True, floor=0.03),
    "grad_norm": Signal("grad_norm", "gradient norm", 1, 2.0, factor=True, floor=0.1),
    "truncation": Signal("completions/clipped_ratio", "share of truncated completions", 1, 0.1, factor=False, floor=0.02),
    "kl": Signal("kl", "KL", 1, 2.0, factor=True, floor=0.1),
    "zero_std": Signal("frac_reward_zero_std", "share of groups without variance", 1, 0.2, factor=False, floor=0.05),
}
"""Signals that are watched in addition to the reward, by their name in states and metrics."""


@dataclass(frozen=True)
class AlarmState:
    """State of the alarm after a step.

    Attributes:
        confirmed: whether a collapse is confirmed at this step.
        onset: first step of the reward's present fall; None while it does not fall.
        levels: each detector's S as a share of its own threshold; "reward" and the names of :data:`SIGNALS`.
        moved: signals other than the reward that are over their thresholds.
        reason: where ``confirmed``, one sentence with numbers on what moved.
    """

    confirmed: bool
    onset: int | None
    levels: Mapping[str, float]
    moved: tuple[str, ...] = ()
    reason: str = ""

    @property
    def level(self) -> float:
        """The reward detector's S as a share of its own threshold; it raises the alarm at 1."""
        return self.levels.get("reward", 0.0)

    @property
    def words(self) -> str:
        """The state in a few words: "quiet", "watching: ..." or "collapse since step ..."."""
        others = ", ".join(dict.fromkeys(SIGNALS[name].words for name in self.moved))
        if self.confirmed:
            return f"collapse since step {self.onset}"
        if self.level >= TOGETHER / ALONE:
            return f"watching: reward falling since step {self.onset}" + (f", {others} moved" if others else "")
        return f"watching: {others} moved" if others else "quiet"


class Cusum:
    """One detector: a reference, an excursion from it, and the sum.

    Args:
        direction: 1 to look for rises, -1 for falls.
        floor: least standard deviation.
        trend: measure against the reference's straight line rather than its mean. Where falls are looked for, what has risen
            in the last ten steps by more than noise counts as the level.
    """

    def __init__(self, direction: int, *, floor: float, trend: bool) -> None:
        self.direction = direction
        self.floor = floor
        self.trend = trend
        self.total = 0.0
        self.onset: int | None = None
        self.reference: list[float] = []
        self.excursion: list[float] = []
        self._fit: tuple[float, float, float, float] | None = None

    def add(self, step: int, value: float) -> None:
        """Takes the value of a step."""
        if len(self.reference) < _LEAST:
            self._learn([value])
            return
        z = min(_CLIP, max(-_CLIP, self.direction * self._standardised(value)))
        self.total = min(_CEILING, max(0.0, self.total + z - _SLACK))
        if self.total == 0.0:
            self._learn([*self.excursion, value])
            self.excursion, self.onset = [], None
            return
        self.onset = step if self.onset is None else self.onset
        self.excursion.append(value)
        if len(self.excursion) > _LONGEST:  # no collapse in all that time: the present level is the normal one now
            self.start_again(self.excursion[-_LATE:])

    def start_again(self, reference: list[float]) -> None:
        """Forgets all but a reference."""
        self.total, self.onset, self.excursion, self.reference, self._fit = 0.0, None, [], [], None
        self._learn(reference)

    @property
    def before(self) -> float:
        """Level before the excursion; with a trend, where its line ends."""
        centre, slope, _, _ = self._reference_fit()
        return centre + slope * (len(self.reference) - 1) / 2

    @property
    def lately(self) -> float:
        """Mean of the last ten values before the excursion."""
        last = self.reference[-_TOLD:]
        return sum(last) / max(len(last), 1)

    @property
    def now(self) -> float:
        """Mean of the last five values of the excursion; the level before where there is none."""
        recent = self.excursion[-_RECENT:]
        return sum(recent) / len(recent) if recent else self.before

    def moved(self, least: float) -> bool:
        """Whether the last values lie at least that far, in the direction looked for, from the level before."""
        return len(self.excursion) >= _SHORTEST and self.direction * (self.now - self.before) >= least

    def state_dict(self) -> dict[str, Any]:
        """State to continue from, as JSON values."""
        return {"total": self.total, "onset": self.onset, "reference": self.reference, "excursion": self.excursion}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""
        self.total, self.onset = state["total"], state["onset"]
        self.reference, self.excursion, self._fit = list(state["reference"]), list(state["excursion"]), None

    def _learn(self, values: list[float]) -> None:
        self.reference = [*self.reference, *values][-_WINDOW:]
        self._fit = None

    def _standardised(self, value: float) -> float:
        """Residual of a value that follows the excursion, over its standard deviation, that of the reference's fit included."""
        centre, slope, scale, inertia = self._reference_fit()
        size = len(self.reference)
        away = (size - 1) / 2 + len(self.excursion) + 1
        spread = 1.0 + 1.0 / size + (away * away / inertia if self.trend else 0.0)
        return (value - centre - slope * away) / (scale * math.sqrt(spread))

    def _reference_fit(self) -> tuple[float, float, float, float]:
        """Mean, slope a step, standard deviation of one value, and sum of squared distances of the steps."""
        if self._fit is None:
            values, size = self.reference, len(self.reference)
            centre, middle = sum(values) / max(size, 1), (size - 1) / 2
            inertia = size * (size * size - 1) / 12
            slope, scale = 0.0, 0.0
            if self.trend and size > 2:
                slope = sum((i - middle) * (v - centre) for i, v in enumerate(values)) / inertia
                left = sum((v - centre - slope * (i - middle)) ** 2 for i, v in enumerate(values))
                scale = math.sqrt(left / (size - 2))
            elif size > 1:
                jumps = sum(abs(b - a) for a, b in itertools.pairwise(values)) / (size - 1)
                scale = max(_ABSOLUTE_DIFFERENCE_TO_SD * jumps, self.floor)
                centre = max(centre, self.lately - _RISE * scale) if self.direction < 0 else centre
            self._fit = (centre, slope, max(scale, self.floor), inertia)
        return self._fit


class CollapseAlarm:
    """Watches a run for collapse, step by step.

    Args:
        epsilon: reward difference that does not matter; a collapse is at least two of them deep.
        least_reward: the lowest possible mean reward, if known. Default: 0, or the lowest reward seen if that is below 0.

    Raises:
        ValueError: an epsilon that is not positive.
    """

    def __init__(self, epsilon: float = 0.01, *, least_reward: float | None = None) -> None:
        if not (epsilon > 0 and math.isfinite(epsilon)):
            raise ValueError(f"epsilon={epsilon} must be a positive reward difference")
        self.epsilon = epsilon
        self.least_reward = least_reward
        self._lowest = 0.0
        self._reward = Cusum(-1, floor=epsilon, trend=False)
        self._others = {name: Cusum(signal.direction, floor=signal.floor, trend=True) for name, signal in SIGNALS.items()}

    def update(self, step: int, reward: float, metrics: Mapping[str, float] | None = None) -> AlarmState:
        """Takes a step. After a confirmed collapse the alarm starts again and learns the usual level from there on.

        Args:
            step: its number, larger than every one before.
            reward: its mean reward; NaN is passed over.
            metrics: the step's other metrics, under TRL's names; only those in :data:`SIGNALS` are read, and missing or
                infinite ones are skipped.
        """
        for name, signal in SIGNALS.items():
            value = (metrics or {}).get(signal.metric, math.nan)
            if math.isfinite(value):
                self._others[name].add(step, signal.read(value))
        if math.isfinite(reward):
            self._lowest = min(self._lowest, reward)
            self._reward.add(step, reward)
        moved = tuple(name for name, other in self._others.items() if other.total >= OTHER and other.moved(SIGNALS[name].least))
        needed = TOGETHER if moved else ALONE
        confirmed = self._reward.total >= needed and self._reward.moved(self._least_drop())
        levels = {"reward": self._reward.total / ALONE} | {name: other.total / OTHER for name, other in self._others.items()}
        state = AlarmState(confirmed, self._reward.onset, levels, moved, self._sentence(step, moved) if confirmed else "")
        if confirmed:
            for detector in (self._reward, *self._others.values()):
                detector.start_again([])
        return state

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on bit for bit, as JSON values."""
        detectors = {"reward": self._reward, **self._others}
        return {"lowest": self._lowest, "detectors": {name: one.state_dict() for name, one in detectors.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""
        self._lowest = state["lowest"]
        for name, detector in {"reward": self._reward, **self._others}.items():
            detector.load_state_dict(state["detectors"][name])

    def _least_drop(self) -> float:
        floor = self._lowest if self.least_reward is None else self.least_reward
        return max(2.0 * self.epsilon, _DROP * (self._reward.before - floor))

    def _sentence(self, step: int, moved: tuple[str, ...]) -> str:
        reward = self._reward
        parts = []
        for name in moved:
            signal, other = SIGNALS[name], self._others[name]
            way = "up" if signal.direction > 0 else "down"
            parts.append(f"{signal.words} {way} from {signal.show(other.lately):.3g} to {signal.show(other.now):.3g}")
        beside = f", with {' and '.join(parts)}" if parts else ""
        return (
            f"The policy is collapsing: the reward fell from {reward.lately:.3f} to {reward.now:.3f} "
            f"from step {reward.onset} to step {step}{beside}"
        )
