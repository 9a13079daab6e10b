"""A finished or running log through the law: what it would have said, and when it would have stopped."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from grpo_fast.integrations.logs import LogError, RewardLog, RunSettings
from grpo_fast.integrations.logs.log_rows import OWN_RUN
from grpo_fast.law import Forecast, OnlinePredictor, StoppingRule
from grpo_fast.law.forms import Array

_T = TypeVar("_T")
_NARROW_SPAN = 3.0
_MAX_POINTS = 2000
_SCHEDULE_TOLERANCE = 0.02
_MAX_GRID = 1_000_000
_A_SHARE = re.compile(r"acc|pass|success|solve|correct|percent|rate|%")


@dataclass(frozen=True)
class LogForecast:
    """What the law says of a log.

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
        notes: the log's, and what was assumed here.
        history: forecasts in the order of their steps.
        vetoes: what alone kept the rule from counting each of them; empty where nothing did.
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
    notes: list[str] = field(default_factory=list)
    history: Sequence[Forecast] = ()
    vetoes: Sequence[str] = ()

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
            "reward_range": None if self.reward_range is None else list(self.reward_range),
            "forecast": self.forecast.to_dict(),
            "stop": {
                "would_stop": self.stop_step is not None,
                "step": self.stop_step,
                "saved": None if self.stop_step is None else 1 - self.stop_step / self.horizon,
                "reason": self.stop_reason,
                "forecast": None if self.stop_forecast is None else self.stop_forecast.to_dict(),
            },
            "notes": self.notes,
        }

    def to_words(self) -> dict[str, str]:
        """The forecast as words beside words, for a table."""
        now, log = self.forecast, self.log
        seen = f"{now.num_observations} rewards, steps {log.steps[0]} to {log.steps[-1]} of {self.horizon}"
        return {
            "source": log.source,
            "reward column": log.reward_column,
            "step column": log.step_column or "none: rows are counted",
            "seen": seen,
            "last reward": f"{log.last_reward:.4g}",
            f"forecast for step {self.horizon}": _interval(now.median, now.low, now.high),
            "plateau": _interval(now.plateau, now.plateau_low, now.plateau_high),
            "80 % of the rise": "unknown" if now.x80 is None else f"step {now.x80}",
            "95 % of the rise": "unknown" if now.x95 is None else f"step {now.x95}",
            "phase": f"{now.phase} (probability {now.phase_probability:.0%})",
            f"P(gain left < {self.epsilon:g})": f"{now.p_gain_below_eps:.1%}",
            "identifiable": "yes" if now.identifiable else f"no: {now.reason}",
            "would have stopped": self._stop_words(),
        }

    def _stop_words(self) -> str:
        if self.stop_step is None:
            return f"no. {self.stop_reason}"
        return f"at step {self.stop_step}, {1 - self.stop_step / self.horizon:.0%} of the budget saved. {self.stop_reason}"


def _row(forecast: Forecast, veto: str = "") -> dict[str, Any]:
    return forecast.to_dict() | {"phase_probabilities": list(forecast.phase_probabilities), "veto": veto}


def forecast_log(  # noqa: PLR0913 (keywords, each of them the law's own)
    log: RewardLog,
    *,
    max_steps: int | None = None,
    epsilon: float | None = None,
    confidence: float | None = None,
    patience: int | None = None,
    min_steps: int | None = None,
    reward_range: tuple[float, float] | None = None,
    num_prompts: int | None = None,
    num_generations: int | None = None,
) -> LogForecast:
    """Shows a log's rewards to the law one after another, as if the run were going on.

    What is not given is taken from the run's own configuration where the log has one, as runs of grpo_fast do: they get the
    numbers that they got while they ran.

    Args:
        log: the rewards.
        max_steps: steps of the whole budget; the log's own word without one, and else its last step.
        epsilon: gain that is not worth having; without one 0.01, or a hundredth of the observed span where that exceeds 3.
        confidence: probability of a gain below epsilon that stops a run, 0.9 without one.
        patience: forecasts in a row that must say so, 3.
        min_steps: steps before which nothing stops a run, 20.
        reward_range: least and greatest mean reward that is possible; 0 to 1 is assumed, and told, where all rewards lie there.
        num_prompts: prompts a step, 1.
        num_generations: completions per prompt, 1.

    Raises:
        LogError: the log goes beyond ``max_steps`` or leaves ``reward_range``.
        ValueError: another value out of range.
    """
    notes = list(log.notes)
    horizon = _horizon(log, max_steps, notes)
    own = log.settings
    epsilon = own.epsilon if epsilon is None else epsilon
    epsilon = _epsilon(log, notes) if epsilon is None else epsilon
    confidence = _or(confidence, own.confidence)
    bounds = reward_range if reward_range is not None else own.reward_range
    bounds = _bounds(log, notes) if bounds is None and own == RunSettings() else _checked(log, bounds)
    num_prompts, num_generations = _or(num_prompts, own.num_prompts), _or(num_generations, own.num_generations)
    predictor = OnlinePredictor(horizon, epsilon=epsilon, reward_range=bounds)
    rule = StoppingRule(
        epsilon, confidence=confidence, patience=_or(patience, own.patience), min_steps=_or(min_steps, own.min_steps)
    )
    stopped: tuple[int, str, Forecast] | None = None
    prior = forecast = predictor.forecast()
    reason = ""
    history: list[Forecast] = []
    vetoes: list[str] = []
    spread = log.reward_std if log.source == OWN_RUN else None
    progress = progress_of(log, horizon, notes)
    for group in _groups(log, notes):
        last = group[-1]
        forecast = predictor.observe(
            int(log.steps[last]),
            float(progress[last]),
            _mean(log.rewards[group]),
            num_prompts=num_prompts * len(group),
            num_generations=num_generations,
            reward_std=None if spread is None else _mean(spread[group]),
        )
        decision = rule.update(forecast)
        reason = decision.reason
        history.append(forecast)
        vetoes.append(decision.veto)
        if decision.stop and stopped is None:
            stopped = (forecast.step, decision.reason, forecast)
    step, reason, then = stopped if stopped is not None else (None, reason, None)
    return LogForecast(
        log,
        forecast,
        prior,
        horizon,
        epsilon,
        confidence,
        bounds,
        step,
        reason,
        then,
        notes=notes,
        history=history,
        vetoes=vetoes,
    )


def _or(asked: _T | None, own: _T) -> _T:
    return own if asked is None else asked


def progress_of(log: RewardLog, horizon: int, notes: list[str]) -> Array:
    """Share of the budget's summed learning rate behind each logged step, (n,) in (0, 1].

    It needs the rest of the schedule. That is known where the log reaches the horizon, and where the rates after their highest
    are constant or fall to zero at the horizon in a line or a half cosine. Elsewhere a step is a step, and that is told.
    """
    if log.progress is not None and horizon == log.max_steps:
        if (np.diff(log.progress) >= 0).all():
            return log.progress
        notes.append("the run was resumed with a longer budget; progress is counted anew")
    linear = log.steps / horizon
    rate = log.learning_rate
    if rate is None:
        return np.asarray(linear)
    known = np.isfinite(rate) & (rate >= 0)
    steps: Array = np.linspace(1.0, horizon, min(horizon, _MAX_GRID))
    values: Array = np.interp(steps, log.steps[known], rate[known])
    if log.steps[known][-1] < horizon:
        ahead = _schedule_ahead(log.steps[known].astype(np.float64), rate[known], steps)
        if ahead is None:
            notes.append("the learning rate follows no schedule that is known here; progress is counted in steps")
            return np.asarray(linear)
        name, future = ahead
        if name != "constant":
            notes.append(
                f"the learning rate falls to zero at step {horizon} ({name}); progress is counted in learning rate spent"
            )
        values = np.where(steps <= log.steps[known][-1], values, future)
    spent = np.cumsum(values)
    return np.asarray(np.clip(np.interp(log.steps, steps, spent) / spent[-1], 1e-9, 1.0))


def _schedule_ahead(steps: Array, rate: Array, every: Array) -> tuple[str, Array] | None:
    """The schedule that the rates after their highest follow, at every step, in the rates' units."""
    first = int(np.argmax(rate))
    peak, horizon = float(rate[first]), float(every[-1])
    if first == steps.size - 1 and rate[0] < peak:
        return None  # still warming up
    if rate[-1] >= peak * (1 - _SCHEDULE_TOLERANCE / 10):
        return "constant", np.full(every.size, peak)
    found: list[tuple[float, str, Array]] = []
    shapes: dict[str, Callable[[Array], Array]] = {
        "linear": lambda left: left,
        "cosine": lambda left: 0.5 * (1 - np.cos(np.pi * left)),
    }
    for name, shape in shapes.items():
        for begun, end in itertools.product(
            (float(steps[first]), 0.0), (horizon, horizon + 1)
        ):  # zero at the last step or after
            fitted = shape(np.clip((end - steps[first:]) / (end - begun), 0, 1))
            scale = float(fitted @ rate[first:]) / float(fitted @ fitted)
            error = float(np.abs(rate[first:] - scale * fitted).max())
            found.append((error, name, scale * shape(np.clip((end - every) / (end - begun), 0, 1))))
    error, name, future = min(found, key=lambda item: item[0])
    return (name, future) if error <= _SCHEDULE_TOLERANCE * peak else None


def _horizon(log: RewardLog, asked: int | None, notes: list[str]) -> int:
    last = int(log.steps[-1])
    if asked is not None:
        if asked < last:
            raise LogError(f"max_steps={asked} lies before the log's last step, {last}; it is the steps of the whole budget")
        return asked
    if log.max_steps is not None:
        return log.max_steps
    notes.append(
        f"the log does not tell how many steps were planned; it is taken to end at {last}. Look ahead with --max-steps"
    )
    return last


def _epsilon(log: RewardLog, notes: list[str]) -> float:
    span = float(np.nanmax(log.rewards) - np.nanmin(log.rewards))
    if span <= _NARROW_SPAN:
        return 0.01
    epsilon = float(f"{span / 100:.1g}")
    notes.append(f"epsilon is {epsilon:g}, a hundredth of the rewards' span; choose another with --epsilon")
    return epsilon


def _checked(log: RewardLog, asked: tuple[float, float] | None) -> tuple[float, float] | None:
    low, high = float(np.nanmin(log.rewards)), float(np.nanmax(log.rewards))
    if asked is not None and (low < asked[0] or high > asked[1]):
        raise LogError(f"rewards run from {low:g} to {high:g}, outside reward_range={asked}")
    return asked


def _bounds(log: RewardLog, notes: list[str]) -> tuple[float, float] | None:
    low, high = float(np.nanmin(log.rewards)), float(np.nanmax(log.rewards))
    told = "and that is taken for their range; give another with --reward-range"
    if low >= 0 and high <= 1 and low < high:
        notes.append(f"all rewards lie in 0 to 1, {told}")
        return 0.0, 1.0
    if low >= 0 and _NARROW_SPAN < high <= 100 and _A_SHARE.search(log.reward_column.lower()):
        notes.append(f"{log.reward_column!r} lies in 0 to 100 as per cent do, {told}")
        return 0.0, 100.0
    return None


def _groups(log: RewardLog, notes: list[str]) -> list[npt.NDArray[np.int64]]:
    """Rows that are shown to the law together: one by one, or means of neighbours where a log has thousands."""
    count = log.steps.size
    size = math.ceil(count / _MAX_POINTS)
    if size > 1:
        notes.append(f"{count} rows: the law sees means of {size} neighbours")
    return [np.arange(begin, min(begin + size, count)) for begin in range(0, count, size)]


def _mean(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.4g} (90 % interval {low:.4g} to {high:.4g})"
