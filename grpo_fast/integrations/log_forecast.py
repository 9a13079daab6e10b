"""The forecast from a log, as an object, as JSON and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from grpo_fast.integrations.logs import RewardLog
from grpo_fast.law import Forecast, RunFacts, Spending

_TOLD = 2
_SIZES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


@dataclass(frozen=True)
class Collapse:
    """A fall that noise does not explain, by the rewards alone.

    Attributes:
        step: at which it was sure.
        onset: first step of the fall; None where that is unknown.
        reason: one sentence with numbers.
    """

    step: int
    onset: int | None
    reason: str


@dataclass(frozen=True)
class LogForecast:
    """The forecast from a log.

    Attributes:
        log: the log, with its notes.
        forecast: after the last step.
        prior: before the first one.
        horizon: steps of the whole budget.
        epsilon: gain that is not worth having, in the log's units.
        confidence: probability that stops a run.
        reward_range: range that was assumed, if any.
        stop_step: step at which the rule would have stopped the run; None where it would not.
        stop_reason: why it would, or what it says after the last step.
        stop_forecast: what was believed at that step.
        rule: settings of the stop besides: patience, min_steps, warmup_steps and reward_value.
        facts: what was known of the run.
        shapes: probabilities of the classes of shapes, before the first reward and after the last.
        prior_origin: where the forecasts' prior comes from; None for the one that ships.
        notes: the log's, and what was assumed here.
        history: forecasts in the order of their steps.
        vetoes: what alone kept the rule from counting each of them; empty where nothing did.
        collapses: what the alarm would have told, one after another.
    """

    log: RewardLog
    forecast: Forecast
    prior: Forecast
    horizon: int
    epsilon: float
    confidence: float
    reward_range: tuple[float, float] | None
    stop_step: int | None
    stop_reason: str
    stop_forecast: Forecast | None = None
    rule: Mapping[str, float | None] = field(default_factory=dict)
    facts: RunFacts = field(default_factory=RunFacts)
    shapes: tuple[Mapping[str, float], Mapping[str, float]] | None = None
    prior_origin: str | None = None
    notes: list[str] = field(default_factory=list)
    history: Sequence[Forecast] = ()
    vetoes: Sequence[str] = ()
    collapses: Sequence[Collapse] = ()

    def rows(self) -> list[dict[str, Any]]:
        """The history as rows of ``forecasts.jsonl``, with the phases' probabilities and vetoes."""
        return [_row(forecast, veto) for forecast, veto in zip(self.history, self.vetoes, strict=True)]

    def prior_row(self) -> dict[str, Any]:
        """The forecast before the first reward, likewise."""
        return _row(self.prior)

    def to_dict(self) -> dict[str, Any]:
        """One JSON object: JSON values only, no NaN."""
        log = self.log
        return {
            "source": log.source,
            "reward_column": log.reward_column,
            "step_column": log.step_column,
            "num_rewards": self.forecast.num_observations,
            "first_step": int(log.steps[0]),
            "last_step": int(log.steps[-1]),
            "max_steps": self.horizon,
            "last_reward": log.last_reward,
            "epsilon": self.epsilon,
            "confidence": self.confidence,
            **self.rule,
            "reward_range": None if self.reward_range is None else list(self.reward_range),
            "prior": self.prior_origin,
            "facts": asdict(self.facts),
            "forecast": self.forecast.to_dict(),
            "shapes": None if self.shapes is None else dict(zip(("before", "after"), map(dict, self.shapes), strict=True)),
            "stop": {
                "would_stop": self.stop_step is not None,
                "step": self.stop_step,
                "saved": None if self.stop_step is None else 1 - self.stop_step / self.horizon,
                "reason": self.stop_reason,
                "forecast": None if self.stop_forecast is None else self.stop_forecast.to_dict(),
            },
            "collapses": [asdict(collapse) for collapse in self.collapses],
            "notes": self.notes,
        }

    def to_words(self) -> dict[str, str]:
        """The forecast as words beside words, for a table."""
        now, log = self.forecast, self.log
        way = "fall" if now.band.median[-1] < now.band.median[0] else "rise"
        seen = f"{now.num_observations} rewards, steps {log.steps[0]} to {log.steps[-1]} of {self.horizon}"
        words = {
            "source": log.source,
            "reward column": log.reward_column,
            "step column": log.step_column or "none (rows are counted)",
            "seen": seen,
            "last reward": f"{log.last_reward:.4g}",
            f"forecast for step {self.horizon}": _interval(now.median, now.low, now.high),
            "plateau": _interval(now.plateau, now.plateau_low, now.plateau_high),
            f"80 % of the {way}": _when(now.x80, now.x80_interval, now.x80_spending),
            f"95 % of the {way}": _when(now.x95, now.x95_interval, now.x95_spending),
            "phase": f"{now.phase} (probability {now.phase_probability:.0%})",
            f"P(gain left < {self.epsilon:g})": f"{now.p_gain_below_eps:.1%}",
            "identifiable": "yes" if now.identifiable else f"no: {now.reason}",
            "would have stopped": self._stop_words(),
        }
        if self.collapses:
            words["collapse"] = " ".join(f"{collapse.reason}." for collapse in self.collapses[:_TOLD])
            words["collapse"] += f" {len(self.collapses) - _TOLD} more." if self.collapses[_TOLD:] else ""
        if self.prior_origin is not None:
            words["prior"] = self.prior_origin
        if spent := _costs(now.spent):
            words["spent so far"] = spent
            words["spent by the end"] = _costs(now.end_spending)
        return words

    def _stop_words(self) -> str:
        if self.stop_step is None:
            return f"no. {self.stop_reason}"
        return f"at step {self.stop_step}, {1 - self.stop_step / self.horizon:.0%} of the budget saved. {self.stop_reason}"


def _row(forecast: Forecast, veto: str = "") -> dict[str, Any]:
    return forecast.to_dict() | {"veto": veto}


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.4g} (90 % interval {low:.4g} to {high:.4g})"


def _when(step: int | None, interval: tuple[int | None, int | None] | None, spending: Spending | None) -> str:
    if step is None or interval is None:
        return "unknown, or after the end of the budget"
    low, high = ("after the end" if end is None else str(end) for end in interval)
    told = f"step {step} (90 % interval {low} to {high})"
    costs = _costs(spending)
    return f"{told}, for {costs}" if costs else told


def _costs(spending: Spending | None) -> str:
    """The known parts of a spending, in words; empty if there are none."""
    if spending is None:
        return ""
    known = (
        (spending.tokens, f"{_shortened(spending.tokens or 0.0)} tokens"),
        (spending.device_hours, f"{spending.device_hours or 0.0:.3g} device hours"),
        (spending.money, f"{spending.money or 0.0:.4g} of money"),
    )
    return ", ".join(words for value, words in known if value is not None)


def _shortened(count: float) -> str:
    size, letter = next(((size, letter) for size, letter in _SIZES if count >= size), (1.0, ""))
    return f"{count / size:.4g}{letter}" if letter else f"{count:.0f}"
