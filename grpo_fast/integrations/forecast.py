"""Runs the law over a log, finished or not: what it would have forecast, and when it would have stopped."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from grpo_fast.integrations.log_forecast import Collapse, LogForecast
from grpo_fast.integrations.logs import LogError, RewardLog, RunSettings
from grpo_fast.integrations.logs.log_rows import OWN_RUN
from grpo_fast.integrations.logs.raw_log import counted
from grpo_fast.law import CollapseAlarm, Forecast, OnlinePredictor, Prior, RunFacts, Spending, StopDecision, StoppingRule
from grpo_fast.law.forms import Array
from grpo_fast.law.prospect import Prospect

_T = TypeVar("_T")
_NARROW_SPAN, _NARROWEST = 3.0, 0.03
_TAIL, _FAR = 0.025, 2.0
_MAX_POINTS = 2000
_MAX_FORECASTS = 500
_RULE = ("patience", "min_steps", "warmup_steps", "reward_value")
_SCHEDULE_TOLERANCE = 0.02
_MAX_GRID = 1_000_000
_A_SHARE = re.compile(r"acc|pass|success|solve|correct|percent|rate|%")


def forecast_log(  # noqa: PLR0913 (keywords, each of them the law's own)
    log: RewardLog,
    *,
    max_steps: int | None = None,
    epsilon: float | None = None,
    confidence: float | None = None,
    patience: float | None = None,
    min_steps: int | None = None,
    reward_value: float | None = None,
    prior: Prior | None = None,
    facts: RunFacts | None = None,
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
        confidence: probability of a gain below epsilon that stops a run; the default of :class:`StoppingRule` without one.
        patience: for how long forecasts must say so, below 1 a share of the budget, from 1 on a number of forecasts; likewise.
        min_steps: steps before which nothing stops a run; likewise.
        reward_value: money that one unit of reward is worth, for runs of grpo_fast that know their price.
        prior: what is believed of runs; the one that ships without one.
        facts: what is known of the run; what they leave open is taken from the log.
        reward_range: least and greatest mean reward that is possible; 0 to 1 is assumed, and told, where all rewards lie there.
        num_prompts: prompts a step, 1.
        num_generations: completions per prompt, 1.

    Raises:
        LogError: the log goes beyond ``max_steps`` or leaves ``reward_range``, or the run's own prior cannot be read.
        ValueError: another value out of range.
    """
    notes = list(log.notes)
    own = log.settings
    horizon = _horizon(log, max_steps, notes)
    epsilon = own.epsilon if epsilon is None else epsilon
    epsilon = _epsilon(log, notes) if epsilon is None else epsilon
    facts = facts_of(facts, own)
    bounds = reward_range if reward_range is not None else own.reward_range
    bounds = reward_bounds(log, facts.start, notes) if bounds is None and own == RunSettings() else _checked(log, bounds)
    prior, origin = _prior(prior, own)
    predictor = OnlinePredictor(horizon, epsilon=epsilon, reward_range=bounds, facts=facts, prior=prior)
    rule = _rule(
        own,
        epsilon,
        confidence=confidence,
        patience=patience,
        min_steps=min_steps,
        warmup_steps=None,
        reward_value=reward_value,
    )
    counts = _or(num_prompts, own.num_prompts), _or(num_generations, own.num_generations)
    first, shapes = predictor.forecast(), Prospect.of(predictor).classes()
    history, decisions = _replayed(log, predictor, rule, counts=counts, notes=notes)
    stop = next((place for place, decision in enumerate(decisions) if decision.stop), None)
    return LogForecast(
        log,
        history[-1],
        first,
        horizon,
        epsilon,
        rule.confidence,
        bounds,
        None if stop is None else history[stop].step,
        decisions[-1 if stop is None else stop].reason,
        None if stop is None else history[stop],
        rule={name: getattr(rule, name) for name in _RULE},
        facts=facts,
        shapes=(shapes, Prospect.of(predictor).classes()),
        prior_origin=origin,
        notes=notes,
        history=history,
        vetoes=[decision.veto for decision in decisions],
        collapses=_collapses(log, CollapseAlarm(epsilon, least_reward=None if bounds is None else bounds[0])),
    )


def _rule(own: RunSettings, epsilon: float, **asked: float | None) -> StoppingRule:
    """The rule as it is asked for, completed by what the run itself had, and then by the rule's own defaults."""
    settings: dict[str, Any] = {name: _or(value, getattr(own, name)) for name, value in asked.items()}
    return StoppingRule(epsilon, **{name: value for name, value in settings.items() if value is not None})


def _replayed(
    log: RewardLog, predictor: OnlinePredictor, rule: StoppingRule, *, counts: tuple[int, int], notes: list[str]
) -> tuple[list[Forecast], list[StopDecision]]:
    """Forecasts and decisions, one by one. ``counts`` are prompts a step and completions per prompt."""
    spread = log.reward_std if log.source == OWN_RUN else None
    progress = progress_of(log, predictor.horizon, notes)
    history: list[Forecast] = []
    decisions: list[StopDecision] = []
    groups = _groups(log)
    if len(groups) < log.steps.size:
        notes.append(f"{log.steps.size} rows: the forecast is made from means of {groups[0].size} neighbouring rows")
    stride = _stride(len(groups), log, rule, notes)
    for left, group in zip(reversed(range(len(groups))), groups, strict=True):
        last = group[-1]
        predictor.absorb(
            int(log.steps[last]),
            float(progress[last]),
            _mean(log.rewards[group]),
            num_prompts=counts[0] * len(group),
            num_generations=counts[1],
            reward_std=None if spread is None else _mean(spread[group]),
            spent=_spending(log, int(last)),
        )
        if left % stride:
            continue
        history.append(predictor.forecast())
        all_wrong = None if log.all_wrong is None else _mean(log.all_wrong[group])
        still = 0 if log.still is None else int(np.nan_to_num(log.still[last]))
        decisions.append(rule.update(history[-1], all_wrong=all_wrong, still=still))
    return history, decisions


def _collapses(log: RewardLog, alarm: CollapseAlarm) -> list[Collapse]:
    """Alarms that the collapse alarm would have raised, from the rewards alone."""
    told = []
    for group in _groups(log):
        step = int(log.steps[group[-1]])
        state = alarm.update(step, _mean(log.rewards[group]))
        if state.confirmed:
            told.append(Collapse(step, state.onset, state.reason))
    return told


def _stride(count: int, log: RewardLog, rule: StoppingRule, notes: list[str]) -> int:
    """Number of rewards per forecast: 1, unless a log has many more than a plot can show.

    It stays 1 for runs of grpo_fast, which then get each forecast that they made, and if the patience counts forecasts.
    """
    if log.source == OWN_RUN or rule.patience >= 1:
        return 1
    stride = math.ceil(count / _MAX_FORECASTS)
    if stride > 1:
        notes.append(f"{count} rewards: a forecast is made after every {stride} of them")
    return stride


def _spending(log: RewardLog, place: int) -> Spending | None:
    """Compute spent up to a row; None if unknown."""

    def at(values: Array | None) -> float | None:
        return None if values is None or not values[place] > 0 else float(values[place])

    seconds = at(log.device_seconds)
    spent = Spending(at(log.tokens), None if seconds is None else seconds / 3600, at(log.money))
    return None if spent == Spending() else spent


def facts_of(told: RunFacts | None, own: RunSettings) -> RunFacts:
    """The given facts of a run, completed by those that it wrote itself.

    Raises:
        LogError: its facts.json cannot be used.
    """
    told = told or RunFacts()
    try:
        known = RunFacts(**own.facts)
    except (TypeError, ValueError) as error:
        raise LogError(
            f"facts.json of this run cannot be used ({error}); it was edited, or written by a newer version"
        ) from error
    start, spread = (known.start, known.start_error) if told.start is None else (told.start, told.start_error)
    lora, validation = told.lora or known.lora, told.validation or known.validation
    return RunFacts(_or(told.size_b, known.size_b), start, spread, lora=lora, validation=validation)


def _prior(told: Prior | None, own: RunSettings) -> tuple[Prior, str | None]:
    """The prior that is asked for or that the run had, and where it comes from where that is not the package."""
    path = own.prior if told is None else None
    if path is not None:
        try:
            told = Prior.load(path)
        except (OSError, ValueError) as error:
            raise LogError(f"the prior of this run cannot be read ({error}); give it, or another one, with --prior") from error
    if told is None or told.to_dict() == Prior.default().to_dict():
        return Prior.default(), None
    about = ", ".join(f"{name} {value}" for name, value in told.about.items() if isinstance(value, (str, int, float)))
    return told, "; ".join(part for part in (path, about) if part) or "given"


def _or(asked: _T | None, own: _T) -> _T:
    return own if asked is None else asked


def progress_of(log: RewardLog, horizon: int, notes: list[str]) -> Array:
    """Share of the budget's summed learning rate behind each logged step, (n,) in (0, 1].

    It needs the rest of the schedule. That is known where the log reaches the horizon, and where the rates after their highest
    are constant or fall to zero at the horizon in a line or a half cosine. Otherwise progress is counted in steps, and a note
    says so.
    """
    if log.progress is not None and horizon == log.max_steps:
        if (np.diff(log.progress) >= 0).all():
            return log.progress
        notes.append("the run was resumed with a longer budget; progress is computed again")
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
            notes.append("the learning rate follows no known schedule; progress is counted in steps")
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
            raise LogError(f"max_steps={asked} is below the log's last step, {last}; give the steps of the whole budget")
        return asked
    if log.max_steps is not None:
        return log.max_steps
    notes.append(f"the log does not contain the number of planned steps; {last} is assumed. Set it with --max-steps")
    return last


def _epsilon(log: RewardLog, notes: list[str]) -> float:
    rewards = log.rewards[np.isfinite(log.rewards)]
    alone = _alone(rewards)
    if alone.any():
        worst = rewards[alone][np.argmax(np.abs(rewards[alone] - np.median(rewards)))]
        told = counted(int(alone.sum()), "reward", "is|are far from all others")
        notes.append(f"{told}: {worst:.4g}. Such outliers make intervals wider; remove errors from the log")
    span = float(np.ptp(rewards[~alone]))
    if span <= _NARROW_SPAN:
        if 0 < span < _NARROWEST:
            notes.append(
                f"the rewards span {span:.2g}, and a gain below 0.01 counts as none; choose another limit with --epsilon"
            )
        return 0.01
    epsilon = float(f"{span / 100:.1g}")
    notes.append(f"epsilon is {epsilon:g}, a hundredth of the rewards' span; choose another with --epsilon")
    return epsilon


def _alone(rewards: Array) -> npt.NDArray[np.bool_]:
    """(n,) which rewards lie far outside the range of nearly all others, and those before and after do not."""
    low, high = np.quantile(rewards, (_TAIL, 1.0 - _TAIL))
    reach = _FAR * (high - low)
    far = (reach > 0) & ((rewards < low - reach) | (rewards > high + reach))
    return np.asarray(far & ~np.append(far[1:], True) & ~np.append(True, far[:-1]))


def _checked(log: RewardLog, asked: tuple[float, float] | None) -> tuple[float, float] | None:
    low, high = float(np.nanmin(log.rewards)), float(np.nanmax(log.rewards))
    if asked is not None and not asked[0] < asked[1]:
        raise LogError(f"reward_range={asked} must be the lowest possible reward, then the highest")
    if asked is not None and (low < asked[0] or high > asked[1]):
        raise LogError(f"rewards run from {low:g} to {high:g}, outside reward_range={asked}; correct the range")
    return asked


def reward_bounds(log: RewardLog, start: float | None, notes: list[str]) -> tuple[float, float] | None:
    """The range that a log's rewards, and the start, show, told in ``notes``; None where they show none."""
    seen = log.rewards if start is None else np.append(log.rewards, start)
    low, high = float(np.nanmin(seen)), float(np.nanmax(seen))
    told = "which is taken for their range; give another with --reward-range"
    if low >= 0 and high <= 1 and low < high:
        notes.append(f"all rewards are between 0 and 1, {told}")
        return 0.0, 1.0
    if low >= 0 and _NARROW_SPAN < high <= 100 and _A_SHARE.search(log.reward_column.lower()):
        notes.append(f"{log.reward_column!r} is between 0 and 100, as percentages are, {told}")
        return 0.0, 100.0
    return None


def _groups(log: RewardLog) -> list[npt.NDArray[np.int64]]:
    """Rows that are shown to the law together: one by one, or means of neighbours where a log has thousands."""
    count = log.steps.size
    size = math.ceil(count / _MAX_POINTS)
    return [np.arange(begin, min(begin + size, count)) for begin in range(0, count, size)]


def _mean(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan
