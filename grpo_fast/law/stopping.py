"""When a forecast is reason enough to stop, and what forbids it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_fast.law.predictor import Forecast

_MAX_SLOW_START = 0.2


@dataclass(frozen=True)
class StopDecision:
    """What the rule says after a step.

    Attributes:
        stop: whether to end the run.
        reason: one sentence with numbers.
        veto: what alone kept the rule from counting this step: "min_steps", "not identifiable", "inflection ahead" or
            "rising slope"; empty when nothing did.
    """

    stop: bool
    reason: str
    veto: str = ""


class StoppingRule:
    """Stops when the probability of a remaining gain below epsilon reaches ``confidence`` on ``patience`` forecasts in a row.

    A veto breaks the row. So does a forecast that falls short. On the last step of the budget nothing is stopped.

    Args:
        epsilon: remaining gain that is not worth having; the forecasts must be made for the same.
        confidence: probability that is demanded, in (0.5, 1).
        patience: forecasts in a row.
        min_steps: steps before which nothing stops a run.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, epsilon: float = 0.01, *, confidence: float = 0.9, patience: int = 3, min_steps: int = 20) -> None:
        if not epsilon > 0:
            raise ValueError(f"epsilon={epsilon} must be a positive reward difference")
        if not 0.5 < confidence < 1:
            raise ValueError(f"confidence={confidence} must lie between 0.5 and 1")
        if patience < 1 or min_steps < 0:
            raise ValueError(f"patience={patience} must be at least 1 and min_steps={min_steps} at least 0")
        self.epsilon = epsilon
        self.confidence = confidence
        self.patience = patience
        self.min_steps = min_steps
        self.count = 0

    def update(self, forecast: Forecast) -> StopDecision:
        """Takes the forecast of one step.

        Raises:
            ValueError: the forecast was made for another epsilon.
        """
        if forecast.epsilon != self.epsilon:
            raise ValueError(f"the forecast is for epsilon={forecast.epsilon}, the rule for {self.epsilon}; give both the same")
        if forecast.step >= forecast.horizon:
            return StopDecision(False, f"The budget ends with step {forecast.step}; there is nothing left to stop")
        if forecast.p_gain_below_eps < self.confidence:
            self.count = 0
            return StopDecision(False, self._gain(forecast) + f"; {self.confidence:.0%} would be enough")
        veto, why = self._veto(forecast)
        if veto:
            self.count = 0
            return StopDecision(False, f"{self._gain(forecast)}, but {why}", veto)
        self.count += 1
        if self.count < self.patience:
            return StopDecision(False, f"{self._gain(forecast)}, {self.count} of {self.patience} times in a row")
        times = "" if self.patience == 1 else f", {self.count} steps in a row"
        return StopDecision(
            True,
            f"{self._gain(forecast)}{times}: the forecast for the end is {forecast.median:.3f} "
            f"(90 % interval {forecast.low:.3f} to {forecast.high:.3f})",
        )

    def state_dict(self) -> dict[str, Any]:
        """Settings and the count, as JSON values."""
        names = ("epsilon", "confidence", "patience", "min_steps", "count")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> StoppingRule:
        """Rebuilds a rule in the middle of its row."""
        rule = cls(state["epsilon"], confidence=state["confidence"], patience=state["patience"], min_steps=state["min_steps"])
        rule.count = state["count"]
        return rule

    def _gain(self, forecast: Forecast) -> str:
        return (
            f"At step {forecast.step} the gain left in the budget is below {self.epsilon:g} "
            f"with probability {forecast.p_gain_below_eps:.1%}"
        )

    def _veto(self, forecast: Forecast) -> tuple[str, str]:
        if forecast.step < self.min_steps:
            return "min_steps", f"nothing stops a run before step {self.min_steps}"
        if not forecast.identifiable:
            return "not identifiable", forecast.reason
        slow = forecast.phase_probabilities[0]
        if slow > _MAX_SLOW_START:
            return "inflection ahead", f"the rise may not have begun (probability {slow:.0%})"
        if forecast.trend_low > 0 and forecast.trend > self.epsilon:
            return (
                "rising slope",
                f"the recent slope would add {forecast.trend:.3f} (at least {forecast.trend_low:.3f}) by the end",
            )
        return "", ""
