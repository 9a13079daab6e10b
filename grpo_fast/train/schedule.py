"""Learning rates of a run's steps, by transformers' schedules, and progress measured in learning rate spent."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch

from grpo_fast.config import Config, ConfigError

_OURS = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
"""Arguments of transformers' schedules that do not come from ``lr_scheduler_kwargs``."""
_PLAIN = ("constant", "linear")
"""Schedules without arguments, done here: with transformers' come peft and bitsandbytes, where they are, for seconds."""


def learning_rates(config: Config) -> list[float]:
    """Learning rates of steps 1, 2, ..., ``max_steps``.

    Raises:
        ConfigError: ``lr_scheduler_kwargs`` that the schedule does not have, lacks or cannot work with; or a step whose rate is
            not above 0, and would train nothing, or is above ``learning_rate``, the peak.
    """
    told = f"lr_scheduler_type={config.lr_scheduler_type!r} with lr_scheduler_kwargs={config.lr_scheduler_kwargs}"
    _check_names(config, told)
    try:
        rate_at = _rate_at(config)
        rates = [rate_at(step) for step in range(1, config.max_steps + 1)]
        wrong = [step for step, rate in enumerate(rates, start=1) if not 0 < rate <= config.learning_rate * (1 + 1e-9)]
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{told}: {error}") from error
    if wrong:
        raise ConfigError(
            f"{told}: step {wrong[0]} of max_steps={config.max_steps}, warmup_steps={config.warmup_steps:g}, would have a "
            f"learning rate of {rates[wrong[0] - 1]:g}; it must be above 0, and at most learning_rate={config.learning_rate:g}"
        )
    return rates


def learning_rate_at(step: int, config: Config) -> float:
    """Learning rate of step 1, 2, ...: linear warm-up, then the chosen shape.

    It depends on the step alone, so that a resumed run has the rates of an uninterrupted one. Schedules that fall to 0 do so
    just after ``max_steps``.

    Source: ``transformers.get_scheduler``, one step further on: there the first step of a warm-up has a rate of 0.
    """
    return _rate_at(config)(step)


def progress_schedule(config: Config) -> list[float]:
    """Share of the run's summed learning rate spent after step 1, 2, ..., ``max_steps``; the last is 1.

    Learning curves are functions of learning rate spent rather than of steps, so the forecast reads this clock.

    Raises:
        ConfigError: as :func:`learning_rates`.
    """
    spent = list(itertools.accumulate(learning_rates(config)))
    return [value / spent[-1] for value in spent]


def falls_if_shorter(config: Config, max_steps: int) -> bool:
    """Whether the learning rate of step ``max_steps`` would be lower if the schedule were laid over so many steps."""
    try:
        last = learning_rates(config.replace(max_steps=max_steps))[-1]
    except ConfigError:  # shorter than the warm-up or the decay
        return False
    return last < learning_rate_at(max_steps, config)


def _rate_at(config: Config) -> Callable[[int], float]:
    """The learning rate as a function of the step."""
    kind, given = config.lr_scheduler_type, dict(config.lr_scheduler_kwargs)
    warmup, shift, end = config.num_warmup_steps + 1, 0, config.max_steps + 1
    if kind == "constant":  # transformers' constant_with_warmup
        return lambda step: config.learning_rate * (step / warmup if step < warmup else 1.0)
    if kind == "linear":
        fall = max(1, end - warmup)
        return lambda step: config.learning_rate * (step / warmup if step < warmup else max(0.0, (end - step) / fall))
    from transformers import get_scheduler  # noqa: PLC0415 (see _PLAIN)

    horizon: int | None = end
    match kind:
        case "inverse_sqrt":  # transformers' own default, of the steps of warm-up that were asked for
            given.setdefault("timescale", config.num_warmup_steps or 10_000)
        case "warmup_stable_decay" if "num_stable_steps" in given:  # both would be one too many, and warned of
            horizon = None
        case "cosine_warmup_with_min_lr":  # the one of transformers' that begins above 0
            warmup, horizon, shift = config.num_warmup_steps, config.max_steps, 1
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    scheduler: Any = get_scheduler(kind, optimizer, warmup, horizon, scheduler_specific_kwargs=given)
    (factor,) = scheduler.lr_lambdas
    return lambda step: config.learning_rate * float(factor(step - shift))


def _check_names(config: Config, told: str) -> None:
    """Holds names of arguments against the schedule's own, and lengths of its phases against the run's."""
    kind, given = config.lr_scheduler_type, config.lr_scheduler_kwargs
    if kind == "constant" and not given:
        return
    known = [] if kind in _PLAIN else _arguments(kind)
    unknown = [name for name in given if name not in {each.name for each in known}]
    if unknown:
        there = f"it has {', '.join(each.name for each in known)}" if known else "it has none"
        raise ConfigError(f"{told}: the schedule has no {unknown[0]!r}; {there}")
    missing = [each.name for each in known if each.default is inspect.Parameter.empty and each.name not in given]
    if missing:
        raise ConfigError(f"{told}: the schedule needs {missing[0]}, such as lr_scheduler_kwargs={{{missing[0]!r}: 10}}")
    phases = {name: value for name, value in given.items() if name in ("num_stable_steps", "num_decay_steps")}
    short = [name for name, value in phases.items() if not isinstance(value, int) or isinstance(value, bool) or value < 0]
    if short:
        raise ConfigError(f"{told}: {short[0]}={given[short[0]]!r} must be a number of steps")
    if config.num_warmup_steps + sum(phases.values()) > config.max_steps:
        parts = " + ".join(f"{name}={value}" for name, value in {"num_warmup_steps": config.num_warmup_steps, **phases}.items())
        raise ConfigError(f"{told}: {parts} exceeds max_steps={config.max_steps}; shorten one, or raise max_steps")


def _arguments(kind: str) -> list[inspect.Parameter]:
    """What a schedule of transformers takes in ``lr_scheduler_kwargs``."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION  # noqa: PLC0415 (see _PLAIN)

    schedules: Any = TYPE_TO_SCHEDULER_FUNCTION
    return [each for each in inspect.signature(schedules[kind]).parameters.values() if each.name not in _OURS]
