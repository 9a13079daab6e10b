"""What a run's rewards say about its end: one observation in, one forecast out.

The predictor is independent of any trainer. It sees a step, the share of the training budget behind it (in summed learning
rate, so that a plateau made by the schedule is not taken for one of the policy), and the mean reward of the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from grpo_fast.law.clock import StepClock
from grpo_fast.law.forms import Array
from grpo_fast.law.posterior import Draws, Posterior, Settings, weighted_quantiles

PHASES = ("slow start", "rapid improvement", "plateau")
NUM_BAND = 25
_ROW = (
    *("step", "median", "low", "high", "plateau", "plateau_low", "plateau_high", "x80", "x95", "p_gain_below_eps"),
    *("phase", "phase_probability", "identifiable", "reason"),
)
_MIN_OBSERVATIONS = 5
_LEVELS = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
_IDENTIFIABLE_WIDTH = 0.6
_VARIANCE_BETWEEN, _VARIANCE_WITHIN = 0.1, 0.12  # of prompts' mean rewards, and inside a group, in squared units of the range
_NOISE_FLOOR = 0.01
_MEMORY = 0.93
_RECENT, _MIN_RECENT = 0.2, 10


@dataclass(frozen=True)
class Band:
    """Mean reward over the run as believed now: (25,) each; 90 % intervals."""

    step: tuple[float, ...]
    low: tuple[float, ...]
    median: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Forecast:
    """What is believed after a step. Rewards are in the units they came in; intervals hold 90 % unless they say otherwise.

    Attributes:
        step: last step seen.
        horizon: last step of the budget.
        median: mean reward at the end of the budget.
        low: lower end of its interval.
        high: upper end.
        interval50: its 50 % interval.
        plateau: level that the law tends to, budget or not.
        plateau_low: lower end of its interval.
        plateau_high: upper end.
        x80: step at which 80 % of the rise to the plateau is done; None when the plateau is unknown or that is beyond the
            budget.
        x95: the same for 95 %.
        p_gain_below_eps: probability that the mean curve gains less than epsilon from here to the end of the budget,
            with the settings' allowance for a surprise: far from the end it stays clearly below 1.
        expected_gain: expected gain of the mean curve from here to the end of the budget.
        epsilon: the gain that is not worth having.
        trend: gain by the end of the budget if the recent slope went on.
        trend_low: lower end of its interval.
        trend_high: upper end.
        phase: the likeliest of "slow start" (under 10 % of the rise done), "rapid improvement" and "plateau" (95 % done, or
            less than epsilon left).
        phase_probabilities: of the three, in that order.
        identifiable: whether the rewards, rather than the prior, decide where the budget ends.
        reason: why it is not, in words; empty when it is.
        num_observations: rewards that were used.
        num_skipped: steps whose reward was NaN.
        band: the mean curve over the whole run.
    """

    step: int
    horizon: int
    median: float
    low: float
    high: float
    interval50: tuple[float, float]
    plateau: float
    plateau_low: float
    plateau_high: float
    x80: int | None
    x95: int | None
    p_gain_below_eps: float
    expected_gain: float
    epsilon: float
    trend: float
    trend_low: float
    trend_high: float
    phase: str
    phase_probabilities: tuple[float, float, float]
    identifiable: bool
    reason: str
    num_observations: int
    num_skipped: int
    band: Band

    @property
    def interval(self) -> tuple[float, float]:
        """90 % interval of the mean reward at the end of the budget."""
        return self.low, self.high

    @property
    def phase_probability(self) -> float:
        """Probability of :attr:`phase`."""
        return max(self.phase_probabilities)

    def to_dict(self) -> dict[str, Any]:
        """One row of ``forecasts.jsonl``: JSON values only, no NaN."""
        row: dict[str, Any] = {name: getattr(self, name) for name in _ROW}
        row["band"] = {name: list(values) for name, values in asdict(self.band).items()}
        return row


class OnlinePredictor:
    """Learns a run's reward curve step by step and says where it will end.

    Args:
        horizon: steps of the whole budget.
        epsilon: remaining gain under which going on is not worth it, in reward units.
        reward_range: least and greatest mean reward that is possible, where that is known. Without one, a unit is taken from
            the data and from ``epsilon`` (1 % of what matters), so that rewards of any scale do; intervals are then wider.
        settings: the prior.

    Raises:
        ValueError: a horizon below 1, an epsilon that is not positive, or an empty range.
    """

    def __init__(
        self,
        horizon: int,
        *,
        epsilon: float = 0.01,
        reward_range: tuple[float, float] | None = None,
        settings: Settings | None = None,
    ) -> None:
        if horizon < 1:
            raise ValueError(f"horizon={horizon} must be at least 1: the steps of the whole budget")
        if not (epsilon > 0 and math.isfinite(epsilon)):
            raise ValueError(f"epsilon={epsilon} must be a positive reward difference")
        if reward_range is not None and not -math.inf < reward_range[0] < reward_range[1] < math.inf:
            raise ValueError(f"reward_range={reward_range} must be (least, greatest) of finite rewards, or None when unknown")
        self.horizon = horizon
        self.epsilon = epsilon
        self.reward_range = None if reward_range is None else (float(reward_range[0]), float(reward_range[1]))
        self.settings = settings or Settings()
        centre = 0.0 if self.reward_range is None else sum(self.reward_range) / 2
        self._posterior = Posterior(self.settings, centre=centre)
        self._width_before = self._prior_end_width()
        self._rows: list[tuple[int, float, float, int, int, float | None]] = []
        self._steps: list[float] = []
        self._progress: list[float] = []
        self._last = (0, 0.0)
        self._num_skipped = 0
        self._extremes = (math.inf, -math.inf)
        self._theory: list[float] = []
        self._noise = (0.0, 0.0)

    @property
    def num_observations(self) -> int:
        """Rewards used so far."""
        return len(self._rows)

    def observe(
        self,
        step: int,
        progress: float,
        reward: float,
        *,
        num_prompts: int = 1,
        num_generations: int = 1,
        reward_std: float | None = None,
    ) -> Forecast:
        """Takes the mean reward of one step.

        Args:
            step: 1 to horizon, larger than every step before.
            progress: share of the budget's summed learning rate that is behind, in (0, 1]; never falls.
            reward: mean reward over the step's completions. NaN is skipped and counted.
            num_prompts: prompts in that mean; they set its noise.
            num_generations: completions per prompt.
            reward_std: standard deviation of rewards inside groups, if known.

        Returns:
            The forecast after this step.

        Raises:
            ValueError: a step that repeats, goes back or exceeds the horizon; progress outside (0, 1] or falling; an infinite
                reward or one outside ``reward_range``; counts below 1.
        """
        self._check(step, progress, reward, num_prompts=num_prompts, num_generations=num_generations)
        if reward_std is not None and (reward_std < 0 or math.isinf(reward_std)):
            raise ValueError(f"reward_std={reward_std} at step {step} must be finite and not negative, or None when unknown")
        self._last = (int(step), float(progress))
        if math.isnan(reward):
            self._num_skipped += 1
        else:
            spread = None if reward_std is None or math.isnan(reward_std) else float(reward_std)
            self._absorb((int(step), float(progress), float(reward), int(num_prompts), int(num_generations), spread))
        return self.forecast()

    def forecast(self) -> Forecast:
        """The forecast from what has been observed; before the first reward it is the prior."""
        step, progress = self._last
        draws = self._draws(self._posterior)
        clock = self._clock()
        marks = np.linspace(0.0, self.horizon, NUM_BAND)
        x = np.concatenate([[progress, 1.0], clock.progress_at(marks)])
        curves = draws.curve(self._posterior.grid.rise(x))
        gain = curves[:, 1] - curves[:, 0]
        reach = np.sqrt(np.clip(x - progress, 0.0, 1.0))[None, :]
        levels = self._within(curves + self._discrepancy(draws, curves[:, 1:2]) * reach)
        plateau = self._plateaus(draws, float(reach[0, 1]))
        q = weighted_quantiles(np.concatenate([levels[:, 1:], plateau[:, None]], axis=1), draws.weight, _LEVELS)
        phases = self._phases(draws, progress)
        identifiable, reason = self._identifiable(q[0, 0], q[4, 0])
        timed = identifiable and self._width(q[0, -1], q[4, -1]) <= _IDENTIFIABLE_WIDTH
        x80, x95 = (self._time_to(share, draws, clock) if timed else None for share in (0.8, 0.95))
        trend = self._trend()
        known = 1.0 - self.settings.surprise * (1.0 - progress) * self._room(draws, curves[:, 0])
        return Forecast(
            step=step,
            horizon=self.horizon,
            low=float(q[0, 0]),
            median=float(q[2, 0]),
            high=float(q[4, 0]),
            interval50=(float(q[1, 0]), float(q[3, 0])),
            plateau=float(q[2, -1]),
            plateau_low=float(q[0, -1]),
            plateau_high=float(q[4, -1]),
            x80=x80,
            x95=x95,
            p_gain_below_eps=min(1.0, float(draws.weight @ (gain < self.epsilon)) * known),
            expected_gain=float(draws.weight @ gain),
            epsilon=self.epsilon,
            trend=trend[0],
            trend_low=trend[1],
            trend_high=trend[2],
            phase=PHASES[int(np.argmax(phases))],
            phase_probabilities=phases,
            identifiable=identifiable,
            reason=reason,
            num_observations=self.num_observations,
            num_skipped=self._num_skipped,
            band=Band(*(tuple(row.tolist()) for row in (marks, q[0, 1:-1], q[2, 1:-1], q[4, 1:-1]))),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on bit for bit, as JSON values."""
        return {
            "horizon": self.horizon,
            "epsilon": self.epsilon,
            "reward_range": None if self.reward_range is None else list(self.reward_range),
            "settings": asdict(self.settings),
            "rows": [list(row) for row in self._rows],
            "last": list(self._last),
            "num_skipped": self._num_skipped,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> OnlinePredictor:
        """Rebuilds a predictor by feeding it the same observations again; later forecasts are bit-identical."""
        bounds = state["reward_range"]
        predictor = cls(
            state["horizon"],
            epsilon=state["epsilon"],
            reward_range=None if bounds is None else (bounds[0], bounds[1]),
            settings=Settings.from_dict(state["settings"]),
        )
        for step, progress, reward, num_prompts, num_generations, spread in state["rows"]:
            predictor._absorb((step, progress, reward, num_prompts, num_generations, spread))
        predictor._last = (state["last"][0], state["last"][1])
        predictor._num_skipped = state["num_skipped"]
        return predictor

    def _check(self, step: int, progress: float, reward: float, *, num_prompts: int, num_generations: int) -> None:
        if not self._last[0] < step <= self.horizon:
            raise ValueError(f"step={step} must lie above the last one ({self._last[0]}) and not beyond horizon={self.horizon}")
        if not (0.0 < progress <= 1.0 and progress >= self._last[1]):
            raise ValueError(f"progress={progress} must lie in (0, 1] and not below the last one ({self._last[1]})")
        if math.isinf(reward):
            raise ValueError(f"reward={reward} at step {step} is infinite; pass NaN for a step without a usable reward")
        if self.reward_range is not None and not (math.isnan(reward) or self.reward_range[0] <= reward <= self.reward_range[1]):
            raise ValueError(
                f"reward={reward} at step {step} is outside reward_range={self.reward_range}; pass None for an unknown range"
            )
        if num_prompts < 1 or num_generations < 1:
            raise ValueError(f"num_prompts={num_prompts} and num_generations={num_generations} must both be at least 1")

    @property
    def _unit(self) -> float:
        if self.reward_range is not None:
            return self.reward_range[1] - self.reward_range[0]
        return max(100.0 * self.epsilon, self._extremes[1] - self._extremes[0])

    def _absorb(self, row: tuple[int, float, float, int, int, float | None]) -> None:
        self._rows.append(row)
        self._steps.append(float(row[0]))
        self._progress.append(row[1])
        self._extremes = (min(self._extremes[0], row[2]), max(self._extremes[1], row[2]))
        self._posterior.add(row[1], row[2], self._noise_variance())

    def _noise_variance(self) -> float:
        """Variance of the newest reward: what its counts say, times how far the scatter of late has been from that.

        Second differences see the scatter through any steady trend.
        """
        _, _, _, num_prompts, num_generations, spread = self._rows[-1]
        within = _VARIANCE_WITHIN if spread is None else (spread / self._unit) ** 2
        self._theory.append((_VARIANCE_BETWEEN + within / num_generations) / num_prompts * self._unit**2)
        if len(self._rows) >= 3:
            before, middle, last = (row[2] for row in self._rows[-3:])
            expected = self._theory[-3] + 4 * self._theory[-2] + self._theory[-1]
            self._noise = (
                _MEMORY * self._noise[0] + (before - 2 * middle + last) ** 2 / expected,
                _MEMORY * self._noise[1] + 1.0,
            )
        pseudo = 2.0 * 0.85 ** len(self._rows)
        ratio = (pseudo + self._noise[0]) / (pseudo + self._noise[1])
        return max(self._theory[-1] * ratio, (_NOISE_FLOOR * self._unit) ** 2)

    def _draws(self, posterior: Posterior) -> Draws:
        low, high = self.reward_range or (-math.inf, math.inf)
        return posterior.draws(unit=self._unit, low=low, high=high)

    def _clock(self) -> StepClock:
        steps, progress = [0.0, *self._steps], [0.0, *self._progress]
        if self._last[0] > steps[-1]:
            steps.append(float(self._last[0]))
            progress.append(self._last[1])
        if len(steps) == 1:
            steps.append(float(self.horizon))
            progress.append(1.0)
        return StepClock(np.array(steps), np.array(progress), self.horizon)

    def _within(self, levels: Array) -> Array:
        return levels if self.reward_range is None else np.clip(levels, *self.reward_range)

    def _room(self, draws: Draws, now: Array) -> float:
        """Probability that the range leaves room for a gain of epsilon at all."""
        return 1.0 if self.reward_range is None else float(draws.weight @ (now <= self.reward_range[1] - self.epsilon))

    def _discrepancy(self, draws: Draws, level: Array) -> Array:
        """What the law may be wrong by at the end of the budget, (N, 1); less where a bounded reward has less room."""
        amount = self.settings.discrepancy * self._unit * draws.unit_discrepancy[:, None]
        if self.reward_range is None:
            return amount
        share = np.clip((level - self.reward_range[0]) / self._unit, 0.0, 1.0)
        return np.asarray(amount * np.maximum(2.0 * np.sqrt(share * (1.0 - share)), 0.25))

    def _plateaus(self, draws: Draws, reach: float) -> Array:
        level = (draws.start + draws.rise)[:, None]
        return self._within(level + reach * self._discrepancy(draws, level))[:, 0]

    def _prior_end_width(self) -> float:
        """Width of the 90 % interval of the level at the budget's end before the first reward, in units of the range."""
        low, high = (0.0, 1.0) if self.reward_range is not None else (-math.inf, math.inf)
        posterior = Posterior(self.settings, centre=0.5)
        prior = posterior.draws(unit=1.0, low=low, high=high)
        ends = weighted_quantiles(prior.curve(posterior.grid.rise(np.ones(1))), prior.weight, _LEVELS)
        return float(ends[4, 0] - ends[0, 0])

    def _phases(self, draws: Draws, progress: float) -> tuple[float, float, float]:
        done = self._posterior.grid.rise(np.array([progress]))[:, 0][draws.shape]
        flat = (np.abs(draws.rise) * (1.0 - done) < self.epsilon) | (done >= 0.95)
        slow = ~flat & (done < 0.1)
        at_rest, at_start = float(draws.weight @ flat), float(draws.weight @ slow)
        return at_start, max(0.0, 1.0 - at_rest - at_start), at_rest

    def _identifiable(self, low: float, high: float) -> tuple[bool, str]:
        if self.num_observations < _MIN_OBSERVATIONS:
            return False, f"only {self.num_observations} rewards so far; {_MIN_OBSERVATIONS} are the least"
        share = self._width(low, high)
        if share > _IDENTIFIABLE_WIDTH:
            return False, f"the end may lie anywhere in {low:.3g} to {high:.3g}, {share:.0%} of the width before the first step"
        return True, ""

    def _width(self, low: float, high: float) -> float:
        return (high - low) / (self._width_before * self._unit)

    def _time_to(self, share: float, draws: Draws, clock: StepClock) -> int | None:
        when = self._posterior.grid.time_to(share)[draws.shape]
        when = np.where(np.abs(draws.rise) >= self.epsilon, np.minimum(when, 2.0), 2.0)
        middle = float(weighted_quantiles(when[:, None], draws.weight, np.array([0.5]))[0, 0])
        return None if middle > 1.0 else math.ceil(clock.step_at(middle) - 1e-9)

    def _trend(self) -> tuple[float, float, float]:
        """Least squares over the latest rewards, carried to the budget's end: value and 90 % interval."""
        size = max(_MIN_RECENT, math.ceil(_RECENT * len(self._rows)))
        if len(self._rows) < _MIN_RECENT:
            return 0.0, -self._unit, self._unit
        x, y = np.array([(row[1], row[2]) for row in self._rows[-size:]]).T
        away, left = x - x.mean(), 1.0 - self._last[1]
        inertia = float(away @ away)
        if inertia == 0.0:
            return 0.0, -self._unit, self._unit
        slope = float(away @ y) / inertia
        noise = y - y.mean() - slope * away
        error = math.sqrt(float(noise @ noise) / (size - 2) / inertia)
        return slope * left, (slope - 1.645 * error) * left, (slope + 1.645 * error) * left
