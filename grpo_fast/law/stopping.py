"""When a forecast is reason enough to stop, and what forbids it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_fast.law.predictor import Forecast

_MAX_SLOW_START = 0.2
_MAX_ALL_WRONG = 0.6
_RECENT = 10


@dataclass(frozen=True)
class StopDecision:
    """What the rule says after a step.

    Attributes:
        stop: whether to end the run.
        reason: one sentence with numbers.
        veto: what alone kept the rule from counting this step: "warm-up", "min_steps", "not identifiable", "inflection ahead",
            "all wrong" or "rising slope"; empty when nothing did.
        count: steps in a row that spoke for stopping, this one included.
    """

    stop: bool
    reason: str
    veto: str = ""
    count: int = 0


class StoppingRule:
    """Stops when ``patience`` forecasts in a row say that going on is not worth it.

    A forecast says so where the probability of a remaining gain below epsilon is at least ``confidence``. A veto breaks the
    row. So does a forecast that falls short. On the last step of the budget nothing is stopped.

    Args:
        epsilon: remaining gain that is not worth having; the forecasts must be made for the same.
        confidence: probability that is demanded, in (0.5, 1).
        patience: forecasts in a row.
        min_steps: steps before which nothing stops a run.
        warmup_steps: steps over which the learning rate rises; nothing stops a run before they are over.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        epsilon: float = 0.01,
        *,
        confidence: float = 0.9,
        patience: int = 3,
        min_steps: int = 20,
        warmup_steps: int = 0,
    ) -> None:
        if not epsilon > 0:
            raise ValueError(f"epsilon={epsilon} must be a positive reward difference")
        if not 0.5 < confidence < 1:
            raise ValueError(f"confidence={confidence} must lie between 0.5 and 1")
        if patience < 1 or min_steps < 0 or warmup_steps < 0:
            raise ValueError(
                f"patience={patience} must be at least 1, min_steps={min_steps} and warmup_steps={warmup_steps} at least 0"
            )
        self.epsilon = epsilon
        self.confidence = confidence
        self.patience = patience
        self.min_steps = min_steps
        self.warmup_steps = warmup_steps
        self.count = 0
        self._all_wrong: list[float] = []

    def update(self, forecast: Forecast, *, all_wrong: float | None = None) -> StopDecision:
        """Takes the forecast of one step.

        Args:
            forecast: what is believed after the step.
            all_wrong: share of the step's groups in which every completion had the least reward, where that is known.

        Raises:
            ValueError: the forecast was made for another epsilon.
        """
        if forecast.epsilon != self.epsilon:
            raise ValueError(f"the forecast is for epsilon={forecast.epsilon}, the rule for {self.epsilon}; give both the same")
        if all_wrong is not None and math.isfinite(all_wrong):
            self._all_wrong = [*self._all_wrong, all_wrong][-_RECENT:]
        if forecast.step >= forecast.horizon:
            return StopDecision(False, f"The budget ends with step {forecast.step}; there is nothing left to stop")
        enough, said = self._probable(forecast)
        if not enough:
            self.count = 0
            return StopDecision(False, said)
        veto, why = self._veto(forecast)
        if veto:
            self.count = 0
            return StopDecision(False, f"{said}, but {why}", veto)
        self.count += 1
        if self.count < self.patience:
            return StopDecision(False, f"{said}, {self.count} of {self.patience} times in a row", count=self.count)
        times = "" if self.patience == 1 else f", {self.count} steps in a row"
        reason = (
            f"{said}{times}: the forecast for the end is {forecast.median:.3f} "
            f"(90 % interval {forecast.low:.3f} to {forecast.high:.3f})"
        )
        return StopDecision(True, reason, count=self.count)

    def state_dict(self) -> dict[str, Any]:
        """Settings and the count, as JSON values."""
        names = ("epsilon", "confidence", "patience", "min_steps", "warmup_steps", "count")
        return {name: getattr(self, name) for name in names} | {"all_wrong": self._all_wrong}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> StoppingRule:
        """Rebuilds a rule in the middle of its row."""
        settings = {name: state[name] for name in ("confidence", "patience", "min_steps", "warmup_steps")}
        rule = cls(state["epsilon"], **settings)
        rule.take_up(state)
        return rule

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Takes what another rule has seen, and leaves its settings."""
        self.count, self._all_wrong = state["count"], list(state["all_wrong"])

    def _probable(self, forecast: Forecast) -> tuple[bool, str]:
        said = (
            f"At step {forecast.step} the gain left in the budget is below {self.epsilon:g} "
            f"with probability {forecast.p_gain_below_eps:.1%}"
        )
        enough = forecast.p_gain_below_eps >= self.confidence
        return enough, said if enough else f"{said}; {self.confidence:.0%} would be enough"

    def _veto(self, forecast: Forecast) -> tuple[str, str]:
        """The first thing that forbids a stop, by name and in words; two empty strings where nothing does."""
        slow = forecast.phase_probabilities[0]
        wrong = sum(self._all_wrong) / len(self._all_wrong) if self._all_wrong else 0.0
        rising = forecast.trend_low > 0 and forecast.trend > self.epsilon
        slope = f"the recent slope would add {forecast.trend:.3f} (at least {forecast.trend_low:.3f}) by the end"
        vetoes = (
            (forecast.step <= self.warmup_steps, "warm-up", f"the learning rate rises until step {self.warmup_steps}"),
            (forecast.step < self.min_steps, "min_steps", f"nothing stops a run before step {self.min_steps}"),
            (not forecast.identifiable, "not identifiable", forecast.reason),
            (slow > _MAX_SLOW_START, "inflection ahead", f"the rise may not have begun (probability {slow:.0%})"),
            (wrong > _MAX_ALL_WRONG, "all wrong", f"{wrong:.0%} of the groups hold no right answer: a rise may be ahead"),
            (rising, "rising slope", slope),
        )
        return next(((name, why) for forbidden, name, why in vetoes if forbidden), ("", ""))
