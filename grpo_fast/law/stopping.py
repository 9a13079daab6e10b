"""The stopping rule: when a forecast is reason enough to stop a run, and what forbids it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_fast.law.forecast import Forecast

STILL_STEPS = 20
"""Number of consecutive steps without two different rewards in any group after which no more gain is expected."""
_MAX_SLOW_START = 0.2
_MAX_ALL_WRONG = 0.6
_RECENT = 10
_FEWEST = 3
_ROUNDING = 1e-9
_SETTINGS = ("epsilon", "confidence", "patience", "min_steps", "warmup_steps", "reward_value")


@dataclass(frozen=True)
class StopDecision:
    """The rule's decision after a step.

    Attributes:
        stop: whether to end the run.
        reason: one sentence with numbers.
        veto: the only reason why this step does not count towards a stop: "warm-up", "min_steps", "not identifiable",
            "inflection ahead", "all wrong" or "rising slope"; empty if there is none.
        count: consecutive steps that counted towards a stop, this one included.
    """

    stop: bool
    reason: str
    veto: str = ""
    count: int = 0


class StoppingRule:
    """Stops a run when forecasts say, for a while, that training on is not worth it.

    A forecast says so if the probability of a remaining gain below epsilon is at least ``confidence`` and the expected gain is
    below epsilon too, or, with a ``reward_value``, if the gain of no further number of steps is expected to be worth its cost.
    A veto, or a forecast that does not say so, resets the count. Nothing is stopped on the last step of the budget.

    A policy does not change without a gradient, whatever is forecast: if no group of the last :data:`STILL_STEPS` steps held
    two different rewards, that counts towards a stop too, unless all answers were wrong.

    Args:
        epsilon: remaining gain that is not worth training for; the forecasts must be made for the same.
        confidence: required probability, in (0.5, 1).
        patience: how long forecasts must say so without a break: below 1, a share of the budget, and at least 3 forecasts;
            from 1 on, a number of forecasts.
        min_steps: no stop before this step.
        warmup_steps: steps over which the learning rate rises; no stop before they are over.
        reward_value: money that one unit of reward is worth, for forecasts that know the money spent; None ignores cost.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        epsilon: float = 0.01,
        *,
        confidence: float = 0.78,
        patience: float = 0.07,
        min_steps: int = 20,
        warmup_steps: int = 0,
        reward_value: float | None = None,
    ) -> None:
        if not epsilon > 0:
            raise ValueError(f"epsilon={epsilon} must be a positive reward difference")
        if not 0.5 < confidence < 1:
            raise ValueError(f"confidence={confidence} must lie between 0.5 and 1")
        if not patience > 0 or min_steps < 0 or warmup_steps < 0:
            raise ValueError(
                f"patience={patience} must be above 0, min_steps={min_steps} and warmup_steps={warmup_steps} at least 0"
            )
        if reward_value is not None and not reward_value > 0:
            raise ValueError(f"reward_value={reward_value} must be a positive sum of money, or None to leave cost out")
        self.epsilon = epsilon
        self.confidence = confidence
        self.patience = patience
        self.min_steps = min_steps
        self.warmup_steps = warmup_steps
        self.reward_value = reward_value
        self.count = 0
        self._since: int | None = None
        self._all_wrong: list[float] = []

    def update(self, forecast: Forecast, *, all_wrong: float | None = None, still: int = 0) -> StopDecision:
        """Takes the forecast of one step.

        Args:
            forecast: the forecast after the step.
            all_wrong: share of the step's groups in which every completion had the lowest reward, if known.
            still: consecutive steps, this one included, in which no group held two different rewards and no other loss term
                gave a gradient.

        Raises:
            ValueError: the forecast was made for another epsilon.
        """
        if forecast.epsilon != self.epsilon:
            raise ValueError(
                f"the forecast was made for epsilon={forecast.epsilon}, the rule for {self.epsilon}; give both the same"
            )
        if all_wrong is not None and math.isfinite(all_wrong):
            self._all_wrong = [*self._all_wrong, all_wrong][-_RECENT:]
        if forecast.step >= forecast.horizon:
            return StopDecision(False, f"The budget ends with step {forecast.step}; there is nothing left to stop")
        enough, said = self._not_worth_it(forecast, still)
        if not enough:
            return self._broken(said)
        veto, why = self._veto(forecast, still)
        if veto:
            return self._broken(f"{said}, but {why}", veto)
        self.count += 1
        self._since = forecast.step if self._since is None else self._since
        if not self._long_enough(forecast):
            said = f"{said}; {self.count} forecasts in a row, not enough yet for patience={self.patience:g}"
            return StopDecision(False, said, count=self.count)
        times = "" if self.count == 1 else f"; {self.count} forecasts in a row, since step {self._since}"
        reason = (
            f"{said}{times}. The forecast for the end is {forecast.median:.3f} "
            f"(90 % interval {forecast.low:.3f} to {forecast.high:.3f})"
        )
        return StopDecision(True, reason, count=self.count)

    def _broken(self, said: str, veto: str = "") -> StopDecision:
        self.count, self._since = 0, None
        return StopDecision(False, said, veto)

    def _long_enough(self, forecast: Forecast) -> bool:
        if self.patience >= 1:
            return self.count >= self.patience
        assert self._since is not None
        return self.count >= _FEWEST and forecast.step - self._since + 1 >= self.patience * forecast.horizon - _ROUNDING

    def state_dict(self) -> dict[str, Any]:
        """Settings and the count, as JSON values."""
        return {name: getattr(self, name) for name in (*_SETTINGS, "count")} | {
            "since": self._since,
            "all_wrong": self._all_wrong,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> StoppingRule:
        """Rebuilds a rule with its count."""
        rule = cls(**{name: state[name] for name in _SETTINGS})
        rule.take_up(state)
        return rule

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Takes over the state of another rule, not its settings."""
        self.count, self._since, self._all_wrong = state["count"], state["since"], list(state["all_wrong"])

    def _not_worth_it(self, forecast: Forecast, still: int) -> tuple[bool, str]:
        """Whether a step counts towards a stop, and a sentence with the numbers."""
        if still >= STILL_STEPS:
            return True, (
                f"In the {still} steps up to step {forecast.step} no group held two different rewards, so nothing was learnt"
            )
        if self.reward_value is not None:
            worth = self._best_value(forecast)
            if worth is not None and worth[0] <= 0.0:
                gain, cost = worth[1:]
                return True, (
                    f"At step {forecast.step} no further training is worth its cost: at best it would gain {gain:.4f} reward, "
                    f"worth {gain * self.reward_value:.4g}, for {cost:.4g}"
                )
        said = (
            f"At step {forecast.step} there is a {forecast.p_gain_below_eps:.1%} chance that less than {self.epsilon:g} reward "
            f"is left to gain in the budget (expected gain {forecast.expected_gain:.3f})"
        )
        if forecast.p_gain_below_eps < self.confidence:
            return False, f"{said}; a stop needs a chance of {self.confidence:.0%}"
        if forecast.expected_gain >= self.epsilon:
            return False, f"{said}; a stop needs an expected gain below {self.epsilon:g} too"
        return True, said

    def _best_value(self, forecast: Forecast) -> tuple[float, float, float] | None:
        """Highest (value of the expected gain minus cost, gain, cost) over the steps at which to end; None without prices."""
        if self.reward_value is None or forecast.spent is None or forecast.end_spending is None:
            return None
        now, end = forecast.spent.money, forecast.end_spending.money
        if now is None or end is None or forecast.horizon <= forecast.step:
            return None
        a_step = (end - now) / (forecast.horizon - forecast.step)
        ways = zip(forecast.gain_path.step, forecast.gain_path.gain, strict=True)
        costs = [(gain, a_step * (step - forecast.step)) for step, gain in ways]
        return max((gain * self.reward_value - cost, gain, cost) for gain, cost in costs)

    def _veto(self, forecast: Forecast, still: int) -> tuple[str, str]:
        """The first thing that forbids a stop, by name and in words; two empty strings where nothing does."""
        slow = forecast.phase_probabilities[0]
        wrong = sum(self._all_wrong) / len(self._all_wrong) if self._all_wrong else 0.0
        rising = forecast.trend_low > 0 and forecast.trend > self.epsilon
        slope = f"the recent slope would add {forecast.trend:.3f} (at least {forecast.trend_low:.3f}) by the end"
        moves = still < STILL_STEPS  # else it does not matter what is forecast
        vetoes = (
            (forecast.step <= self.warmup_steps, "warm-up", f"the learning rate warms up until step {self.warmup_steps}"),
            (forecast.step < self.min_steps, "min_steps", f"nothing stops a run before step {self.min_steps}"),
            (moves and not forecast.identifiable, "not identifiable", forecast.reason),
            (moves and slow > _MAX_SLOW_START, "inflection ahead", f"the rise may not have begun (probability {slow:.0%})"),
            (wrong > _MAX_ALL_WRONG, "all wrong", f"{wrong:.0%} of the groups hold no right answer, so a rise may be ahead"),
            (moves and rising, "rising slope", slope),
        )
        return next(((name, why) for forbidden, name, why in vetoes if forbidden), ("", ""))
