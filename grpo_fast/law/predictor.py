"""Forecasts the end of a run from its rewards: one observation in, one forecast out.

The predictor is independent of any trainer. It sees a step, the share of the training budget behind it (in summed learning
rate, so that a plateau made by the schedule is not taken for one of the policy), and the mean reward of the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np

from grpo_fast.law.clock import RECENT, StepClock
from grpo_fast.law.forecast import PHASES, Band, Forecast, GainPath, Spending
from grpo_fast.law.forms import Array
from grpo_fast.law.posterior import GRID, Believed, Draws, Posterior, quantiles
from grpo_fast.law.prior import Prior, RunFacts, RunScale
from grpo_fast.law.scatter import Scatter
from grpo_fast.law.spending import SpendingCurve
from grpo_fast.law.stacking import Say, Stack, bounds_of

NUM_BAND = 25
_NUM_AHEAD = 8
_MIN_OBSERVATIONS = 5
_LAST = 0.1  # share of the budget over which, at least, a plateau brings nothing
_LEVELS = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
_IDENTIFIABLE_WIDTH = 0.6
_MIN_RECENT = 10
_START_ERROR = 0.05
_RECENCY, _RECENCY_OFFSET = 0.4, 0.02  # no shape is true all along: what lies far back says less of the end
_FIRST = 3
_REACH = 2.0  # spans of what was seen, on either side: humps of an unbounded reward fall without end


@dataclass(frozen=True)
class Observation:
    """One observed step whose reward was usable; see :meth:`OnlinePredictor.observe`."""

    step: int
    progress: float
    reward: float
    num_prompts: int
    num_generations: int
    reward_std: float | None
    spent: Spending | None = None


class OnlinePredictor:
    """Learns a run's reward curve step by step and forecasts its end.

    Args:
        horizon: steps of the whole budget.
        epsilon: remaining gain below which training on is not worth it, in reward units.
        reward_range: lowest and highest possible mean reward, if known. Without it, the unit is the range seen so far, so that
            rewards of any scale work; intervals are then wider.
        facts: what is known of the run.
        prior: expectations before the first reward. Default: the prior in the package.

    Attributes:
        rows: the observations, except steps without a usable reward.
        posterior: the running sums.

    Raises:
        ValueError: a horizon below 1, an epsilon that is not positive, or an empty range.
    """

    def __init__(
        self,
        horizon: int,
        *,
        epsilon: float = 0.01,
        reward_range: tuple[float, float] | None = None,
        facts: RunFacts | None = None,
        prior: Prior | None = None,
    ) -> None:
        if horizon < 1:
            raise ValueError(f"horizon={horizon} must be at least 1: the steps of the whole budget")
        if not (epsilon > 0 and math.isfinite(epsilon)):
            raise ValueError(f"epsilon={epsilon} must be a positive reward difference")
        if reward_range is not None and not -math.inf < reward_range[0] < reward_range[1] < math.inf:
            raise ValueError(f"reward_range={reward_range} must be finite numbers (lowest, highest), or None when unknown")
        self.horizon = horizon
        self.epsilon = epsilon
        self.reward_range = None if reward_range is None else (float(reward_range[0]), float(reward_range[1]))
        self.rows: list[Observation] = []
        self._last = (0, 0.0)
        self.prior = prior or Prior.default()
        self.inform(facts or RunFacts())

    def inform(self, facts: RunFacts) -> None:
        """Begins anew with other facts, before the first step.

        Raises:
            ValueError: a step was observed already, or the start lies outside ``reward_range``.
        """
        if self._last[0]:
            raise ValueError(f"step {self._last[0]} was observed already; facts must be known before step 1")
        self._check_range(facts.start, "the start")
        self.facts = facts
        self.posterior = Posterior()
        self._scatter = Scatter()
        self._stack = Stack()
        self._spent = SpendingCurve()
        self._num_skipped = 0
        self._extremes = (math.inf, -math.inf)
        if facts.start is not None:
            self._extremes = (facts.start, facts.start)
            error = facts.start_error or _START_ERROR * self._unit
            self.posterior.ratio = self._unit**2
            self.posterior.add(0.0, facts.start, (error / self._unit) ** 2)
        elif self.reward_range is not None:
            self.posterior.centre = sum(self.reward_range) / 2
        self._width_before = self._end_width()

    @property
    def num_observations(self) -> int:
        """Rewards used so far."""
        return len(self.rows)

    def observe(  # noqa: PLR0913 (a step's facts, each with a name of its own in every log)
        self,
        step: int,
        progress: float,
        reward: float,
        *,
        num_prompts: int = 1,
        num_generations: int = 1,
        reward_std: float | None = None,
        spent: Spending | None = None,
    ) -> Forecast:
        """Takes the mean reward of one step.

        Args:
            step: 1 to horizon, larger than every step before.
            progress: share of the budget's summed learning rate that is behind, in (0, 1]; never falls.
            reward: mean reward over the step's completions. NaN is skipped and counted.
            num_prompts: prompts in that mean; they set its noise.
            num_generations: completions per prompt.
            reward_std: standard deviation of rewards inside groups, if known.
            spent: compute since the first step, if known.

        Returns:
            The forecast after this step.

        Raises:
            ValueError: a step that repeats, goes back or exceeds the horizon; progress outside (0, 1] or falling; an infinite
                reward or one outside ``reward_range``; counts below 1.
        """
        self.absorb(
            step,
            progress,
            reward,
            num_prompts=num_prompts,
            num_generations=num_generations,
            reward_std=reward_std,
            spent=spent,
        )
        return self.forecast()

    def absorb(  # noqa: PLR0913 (as observe)
        self,
        step: int,
        progress: float,
        reward: float,
        *,
        num_prompts: int = 1,
        num_generations: int = 1,
        reward_std: float | None = None,
        spent: Spending | None = None,
    ) -> None:
        """Takes a step as :meth:`observe` does, and makes no forecast: a finished log is read faster so."""
        self._check(step, progress, reward, num_prompts=num_prompts, num_generations=num_generations)
        if reward_std is not None and (reward_std < 0 or math.isinf(reward_std)):
            raise ValueError(f"reward_std={reward_std} at step {step} must be finite and not negative, or None when unknown")
        self._last = (int(step), float(progress))
        if math.isnan(reward):
            self._num_skipped += 1
            return
        spread = None if reward_std is None or math.isnan(reward_std) else float(reward_std)
        self._take(
            Observation(int(step), float(progress), float(reward), int(num_prompts), int(num_generations), spread, spent)
        )

    @property
    def scale(self) -> RunScale:
        """The run's units as known now."""
        low, high = self.reward_range or (-math.inf, math.inf)
        start = self.facts.start
        if start is None and self.rows:
            start = float(np.mean([row.reward for row in self.rows[:_FIRST]]))
        floor = low if self.reward_range is not None else self._extremes[0]
        share = math.nan if start is None else (start - floor) / self._unit
        return RunScale(self._unit, low, high, share, math.sqrt(self.posterior.noise * self.posterior.ratio))

    @property
    def _still(self) -> bool:
        return self._extremes[1] - self._extremes[0] < self.epsilon

    def say(self) -> Say:
        """Plain forecasts of this run, and their weights."""
        return self._stack.say(self.posterior, bounds_of(self.reward_range, self._extremes), self._unit)

    def believed(self) -> Believed:
        """The prior in this run's units; where no range is known, the end lies within reach of what was seen.

        A few rewards, or many of which no two differ by epsilon, show no range: nothing is within reach of them.
        """
        known = self.prior.believed(self.facts, self.scale, horizon=self.horizon)
        if self.reward_range is not None or self.num_observations < _MIN_OBSERVATIONS or self._still:
            return known
        low, high = self._extremes
        reach = _REACH * (high - low)
        return replace(known, low=low - reach, high=high + reach)

    def levels(self, progress: Array) -> tuple[Array, Array]:
        """Mean rewards at (K,) places of the budget as a weighted sample of whole runs: (N, K) values and (N,) weights."""
        draws = self.posterior.draws(self.believed())
        x = np.asarray(progress, dtype=np.float64)
        return self._stretched(self._curves(draws, x), draws, x), draws.weight

    def forecast(self) -> Forecast:
        """The forecast from what has been observed; before the first reward it is the prior's."""
        step, progress = self._last
        draws, clock = self.posterior.draws(self.believed()), self._clock()
        marks = np.linspace(0.0, self.horizon, NUM_BAND)
        ahead = np.linspace(step, self.horizon, _NUM_AHEAD + 1)[1:]
        levels, expected = self._along(draws, clock.progress_at(marks), clock.progress_at(ahead))
        reached, before_last, whole = GRID.rise(np.array([progress, min(progress, 1.0 - _LAST), 1.0]))[draws.shape].T
        gain = draws.rise * (whole - reached)
        phases = self._phases(draws, reached, gain, (before_last, draws.rise * (whole - before_last)))
        identifiable, reason = self._identifiable(levels[0, 0], levels[4, 0])
        timed = identifiable and levels[4, -1] - levels[0, -1] <= _IDENTIFIABLE_WIDTH * self._width_before * self._unit
        trend = self._trend()
        return Forecast(
            step=step,
            horizon=self.horizon,
            **_levels_told(levels, marks),
            **self._times_told(draws, clock, known=timed),
            p_gain_below_eps=min(1.0, float(draws.weight @ (gain < self.epsilon))),
            expected_gain=float(expected[-1]),
            epsilon=self.epsilon,
            gain_path=GainPath(tuple(ahead.tolist()), tuple(expected.tolist())),
            trend=trend[0],
            trend_low=trend[1],
            trend_high=trend[2],
            phase=PHASES[int(np.argmax(phases))],
            phase_probabilities=phases,
            identifiable=identifiable,
            reason=reason,
            num_observations=self.num_observations,
            num_skipped=self._num_skipped,
            spent=self._spent.at(step),
            end_spending=self._spent.at(self.horizon),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on bit for bit, as JSON values."""
        return {
            "horizon": self.horizon,
            "epsilon": self.epsilon,
            "reward_range": None if self.reward_range is None else list(self.reward_range),
            "facts": asdict(self.facts),
            "prior": self.prior.to_dict(),
            "rows": [asdict(row) for row in self.rows],
            "last": list(self._last),
            "num_skipped": self._num_skipped,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """Rebuilds a predictor by feeding it the same observations again; later forecasts are bit-identical."""
        bounds = state["reward_range"]
        predictor = cls(
            state["horizon"],
            epsilon=state["epsilon"],
            reward_range=None if bounds is None else (bounds[0], bounds[1]),
            facts=RunFacts(**state["facts"]),
            prior=Prior.from_dict(state["prior"]),
        )
        for row in state["rows"]:
            spent = None if row["spent"] is None else Spending.from_dict(row["spent"])
            predictor._take(Observation(**{**row, "spent": spent}))
        predictor._last = (state["last"][0], state["last"][1])
        predictor._num_skipped = state["num_skipped"]
        return predictor

    def _check(self, step: int, progress: float, reward: float, *, num_prompts: int, num_generations: int) -> None:
        if not self._last[0] < step <= self.horizon:
            raise ValueError(f"step={step} must be above the last one ({self._last[0]}) and at most horizon={self.horizon}")
        if not (0.0 < progress <= 1.0 and progress >= self._last[1]):
            raise ValueError(f"progress={progress} must be in (0, 1] and not below the last one ({self._last[1]})")
        if math.isinf(reward):
            raise ValueError(f"reward={reward} at step {step} is infinite; pass NaN for a step without a usable reward")
        self._check_range(reward, f"step {step}")
        if num_prompts < 1 or num_generations < 1:
            raise ValueError(f"num_prompts={num_prompts} and num_generations={num_generations} must both be at least 1")

    def _check_range(self, reward: float | None, where: str) -> None:
        if self.reward_range is None or reward is None or math.isnan(reward):
            return
        if not self.reward_range[0] <= reward <= self.reward_range[1]:
            raise ValueError(
                f"reward={reward} at {where} is outside reward_range={self.reward_range}; pass None for an unknown range"
            )

    @property
    def _unit(self) -> float:
        if self.reward_range is not None:
            return self.reward_range[1] - self.reward_range[0]
        return 100.0 * self.epsilon if self._still else self._extremes[1] - self._extremes[0]

    def _take(self, row: Observation) -> None:
        self.rows.append(row)
        if row.spent is not None:
            self._spent.add(row.step, row.spent)
        self._extremes = (min(self._extremes[0], row.reward), max(self._extremes[1], row.reward))
        expected = self._scatter.expected(
            row.reward,
            unit=self._unit,
            num_prompts=row.num_prompts,
            num_generations=row.num_generations,
            spread=row.reward_std,
        )
        recency = (row.progress + _RECENCY_OFFSET) ** _RECENCY
        self.posterior.add(row.progress, row.reward, expected / recency)
        self.posterior.ratio = self._scatter.ratio * recency
        self._stack.add(self.posterior, row.reward, bounds_of(self.reward_range, self._extremes))

    def _clock(self) -> StepClock:
        steps, progress = [0.0, *(float(row.step) for row in self.rows)], [0.0, *(row.progress for row in self.rows)]
        if self._last[0] > steps[-1]:
            steps.append(float(self._last[0]))
            progress.append(self._last[1])
        if len(steps) == 1:
            steps.append(float(self.horizon))
            progress.append(1.0)
        return StepClock(np.array(steps), np.array(progress), self.horizon)

    def _curves(self, draws: Draws, x: Array) -> Array:
        return self._within(draws.curve(GRID.rise(x), x, self._last[1]))

    def _along(self, draws: Draws, marks: Array, ahead: Array) -> tuple[Array, Array]:
        """Beliefs about levels (at the end, at progress ``marks`` (K,), the plateau) and about gains by ``ahead`` (J,).

        Returns:
            (5, 1 + K + 1) quantiles at :data:`_LEVELS`, and (J,) expected gains from now on.
        """
        x = np.concatenate([[self._last[1], 1.0], marks, ahead])
        curves = self._curves(draws, x)
        plateau = self._within(draws.start + draws.rise * GRID.asymptote[draws.shape] + draws.drift + draws.drift_ahead)
        told = slice(1, 2 + marks.size)
        columns, where = np.concatenate([curves[:, told], plateau[:, None]], axis=1), np.concatenate([x[told], [1.0]])
        levels = self._within(quantiles(self._stretched(columns, draws, where), draws.weight, _LEVELS))
        return levels, np.asarray(draws.weight @ (curves[:, told.stop :] - curves[:, :1]))

    def _times_told(self, draws: Draws, clock: StepClock, *, known: bool) -> dict[str, Any]:
        """A forecast's fields of when 80 and 95 % of the rise are done, and at which cost; nothing where that is not known."""
        told: dict[str, Any] = {}
        for name, share in (("x80", 0.8), ("x95", 0.95)):
            middle, interval = self._time_to(share, draws, clock) if known else (None, None)
            told |= {name: middle, f"{name}_interval": interval, f"{name}_spending": self._spent.at(middle)}
        return told

    def _stretched(self, values: Array, draws: Draws, x: Array) -> Array:
        """Samples (N, K), moved and widened by the stack and stretched by the prior's spread; past steps stay unchanged."""
        low, middle, high = quantiles(values, draws.weight, _LEVELS[[0, 2, 4]])
        spread = self.prior.spread_at(self._last[1], draws.noise_share)
        say, factor = self.say(), np.where(x > self._last[1], spread, 1.0)
        moved, wider = say.correction(x, middle, high - low)
        return self._within(middle + moved + (values - middle) * factor * wider)

    def _within(self, levels: Array) -> Array:
        return levels if self.reward_range is None else np.clip(levels, *self.reward_range)

    def _end_width(self) -> float:
        """Width of the 90 % interval of the level at the budget's end, in units of the range."""
        draws = self.posterior.draws(self.believed())
        ends = quantiles(self._curves(draws, np.ones(1)), draws.weight, _LEVELS)
        return float(ends[4, 0] - ends[0, 0]) / self._unit

    def _phases(self, draws: Draws, reached: Array, gain: Array, late: tuple[Array, Array]) -> tuple[float, float, float]:
        """Probabilities of :data:`PHASES`.

        ``late`` are the share of the rise and the gain left a tenth of the budget before its end, or now if that is earlier: at
        the end little is left to gain of any rise, which alone makes no plateau.
        """
        whole = np.maximum(GRID.asymptote[draws.shape], 1e-9)
        slow = (gain >= self.epsilon) & (reached < 0.1 * whole)
        flat = ~slow & ((late[1] < self.epsilon) | (late[0] >= 0.95 * whole))
        at_rest, at_start = float(draws.weight @ flat), float(draws.weight @ slow)
        return at_start, max(0.0, 1.0 - at_rest - at_start), at_rest

    def _identifiable(self, low: float, high: float) -> tuple[bool, str]:
        if self.num_observations < _MIN_OBSERVATIONS:
            return False, f"only {self.num_observations} rewards so far; at least {_MIN_OBSERVATIONS} are needed"
        if self.reward_range is None and self._still:
            said = f"no two rewards so far differ by {self.epsilon:g}, and the range of rewards is not known"
            return False, f"{said}: a first rise may be ahead"
        share = (high - low) / (self._width_before * self._unit)
        if share > _IDENTIFIABLE_WIDTH:
            return False, (
                f"the final reward may be anywhere from {low:.3g} to {high:.3g}, {share:.0%} of the width before the first step"
            )
        return True, ""

    def _time_to(self, share: float, draws: Draws, clock: StepClock) -> tuple[int | None, tuple[int | None, int | None] | None]:
        """Median and 90 % interval of the step at which a share of the rise is done."""
        when = np.where(np.abs(draws.rise) >= self.epsilon, np.minimum(GRID.time_to(share)[draws.shape], 2.0), 2.0)
        low, middle, high = (
            None if at > 1.0 else max(1, math.ceil(clock.step_at(float(at)) - 1e-9))
            for at in quantiles(when[:, None], draws.weight, _LEVELS[[0, 2, 4]])[:, 0]
        )
        return middle, None if middle is None else (low, high)

    def _trend(self) -> tuple[float, float, float]:
        """Least squares over the latest rewards, carried to the budget's end: value and 90 % interval."""
        size = max(_MIN_RECENT, math.ceil(RECENT * len(self.rows)))
        if len(self.rows) < _MIN_RECENT:
            return 0.0, -self._unit, self._unit
        x, y = np.array([(row.progress, row.reward) for row in self.rows[-size:]]).T
        away, left = x - x.mean(), 1.0 - self._last[1]
        inertia = float(away @ away)
        if inertia == 0.0:
            return 0.0, -self._unit, self._unit
        slope = float(away @ y) / inertia
        noise = y - y.mean() - slope * away
        error = math.sqrt(float(noise @ noise) / (size - 2) / inertia)
        return slope * left, (slope - 1.645 * error) * left, (slope + 1.645 * error) * left


def _levels_told(levels: Array, marks: Array) -> dict[str, Any]:
    """A forecast's fields of reward, from (5, 1 + K + 1) quantiles at the end, at steps ``marks`` (K,) and of the plateau."""
    low, low50, median, high50, high = levels.tolist()
    return {
        "low": low[0],
        "median": median[0],
        "high": high[0],
        "interval50": (low50[0], high50[0]),
        "plateau": median[-1],
        "plateau_low": low[-1],
        "plateau_high": high[-1],
        "plateau_interval50": (low50[-1], high50[-1]),
        "band": Band(*(tuple(row) for row in (marks.tolist(), low[1:-1], median[1:-1], high[1:-1]))),
    }
