"""From a name to a reward function, and from a reward function to checked numbers and what it logs beside them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from grpo_fast import user_code
from grpo_fast.async_code import AsyncCode
from grpo_fast.rewards.functions import BUILT_IN
from grpo_fast.types import Scored
from grpo_fast.user_code import accepted_arguments, import_object, name_of, number_of, shown, single

BATCH_ARGUMENTS = ("prompts", "completions", "completion_ids", "completion_openings", "environment_rewards")
"""Lists that every reward call gets in addition to the dataset's columns, one entry per completion."""

TRAINER_ARGUMENTS = ("trainer_state", "log_extra", "log_metric")
"""Arguments about the trainer, as in TRL."""

GIVEN = (*BATCH_ARGUMENTS, *TRAINER_ARGUMENTS)


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward function and the name its metrics go by."""

    name: str
    function: Callable[..., Any]


class HeldHere:
    """Base of rewards that a pool calls in its own process, however many workers it has: they hold what belongs there.

    No deadline can be kept for them.
    """

    def load(self) -> None:
        """Loads what is needed; called once, before the first call.

        Raises:
            ValueError: it cannot be loaded.
        """
        raise NotImplementedError


class InvalidRewardError(ValueError):
    """A reward call that breaks the contract: a missing column, a wrong length, a value that is no number."""


def names_model(spec: object) -> TypeGuard[str]:
    """Whether a reward is the name of a model: OWNER/NAME or a directory."""
    if not isinstance(spec, str) or spec in BUILT_IN or ":" in spec or "," in spec or spec.endswith(".py"):
        return False
    return "/" in spec or Path(spec).is_dir()


def reward_name(spec: str | Callable[..., Any]) -> str:
    """The metric name of a reward: what follows the colon, the last part of a model's name, or the function's ``__name__``.

    Nothing is imported; a ``module:function`` that does not exist has a name too.

    Raises:
        ValueError: an unknown built-in, or a string that is neither a built-in nor ``module:function`` nor a model.
        TypeError: neither a string nor a callable, or a class in place of an instance.
    """
    if isinstance(spec, str):
        if spec in BUILT_IN:
            return spec
        module, colon, attribute = spec.partition(":")
        if module.endswith(".py") and attribute and "/" not in module:
            raise ValueError(f"reward {spec!r} names a file; a function of it is '{module.removesuffix('.py')}:{attribute}'")
        if colon and module and attribute:
            return attribute.rpartition(".")[2]
        if names_model(spec):
            return Path(spec).name or spec
        near = difflib.get_close_matches(spec, BUILT_IN, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        if "," in spec:
            hint = "give several names separately, not in one string. "
        elif spec.endswith(".py"):
            hint = f"a function of that file is '{spec.removesuffix('.py')}:FUNCTION'. "
        raise ValueError(
            f"unknown reward {spec!r}; {hint}Built-in: {', '.join(sorted(BUILT_IN))}; your own: 'module:function'; "
            "a reward model: OWNER/NAME or its directory"
        )
    if isinstance(spec, type) or not callable(spec):
        raise TypeError(f"a reward is a name, 'module:function' or a function, not {spec!r}")
    if hasattr(spec, "forward") and hasattr(spec, "parameters"):
        raise TypeError(
            f"a reward is a function, and {name_of(spec)} is a model; give RewardModel(model, tokenizer=...), or a function "
            "that asks it"
        )
    return name_of(spec)


def resolve_reward(spec: str | Callable[..., Any]) -> RewardFunction:
    """Finds a reward function.

    Args:
        spec: a built-in's name, ``module:function`` (imported here) or a callable.

    Raises:
        ValueError: no such built-in, module or attribute; the nearest known name is given.
        TypeError: what was found cannot be called as a reward.
    """
    name = reward_name(spec)
    if not isinstance(spec, str):
        return RewardFunction(name, spec)
    if spec in BUILT_IN:
        return RewardFunction(name, BUILT_IN[spec])
    if names_model(spec):
        raise ValueError(f"reward {spec!r} is the name of a model; give RewardModel({spec!r})")
    found = import_object(spec, kind="reward")
    if isinstance(found, type) or not callable(found):
        raise TypeError(f"reward {spec!r} is {found!r}, which is not a function")
    return RewardFunction(name, found)


def check_columns(reward: RewardFunction, columns: Sequence[str]) -> None:
    """Holds a function's parameters against the columns that it will be given, before it is called.

    Args:
        reward: the function.
        columns: of the dataset, the prompt's left out.

    Raises:
        InvalidRewardError: it needs a column that is not there; the message names the function.
    """
    try:
        _accepted(reward, dict.fromkeys((*GIVEN, *columns)))
    except InvalidRewardError as error:
        raise InvalidRewardError(f"reward function {reward.name!r} {error}") from None


def call_reward(reward: RewardFunction, arguments: Mapping[str, Any], loop: AsyncCode) -> Scored:
    """Calls a reward function once, awaiting what it returns where that is to be, and checks what came of it.

    Args:
        reward: the function.
        arguments: those of :data:`BATCH_ARGUMENTS` and one list a dataset column, all of one length, and ``trainer_state``.
            The function gets copies of the lists, which it may change.
        loop: where it is awaited.

    Returns:
        Its values, where NaN is ``None``, and what it logged.

    Raises:
        InvalidRewardError: a column the function needs is not there, it returned the wrong number or kind of values, or logged
            what is no number, or a column of the wrong length.
        Exception: whatever the function raises.
    """
    log = _Log()
    return _scored(loop.awaited(_called(reward, arguments, log)), log, len(arguments["completions"]))


async def await_reward(reward: RewardFunction, arguments: Mapping[str, Any]) -> Scored:
    """As :func:`call_reward`, for an async function beside others on one loop."""
    log = _Log()
    return _scored(await _called(reward, arguments, log), log, len(arguments["completions"]))


def describe_failure(error: BaseException) -> str:
    """One line on what went wrong in a reward call."""
    if isinstance(error, InvalidRewardError):
        return str(error)
    unnamed = isinstance(error, KeyError) and error.args == ("environments",)
    return user_code.describe_failure(error) + ("; what reads environments must name them in its signature" if unnamed else "")


class _Log:
    """Keeps what a function logs in one call."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[Any]] = {}
        self.extra: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(value)

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        self.extra.setdefault(column, []).extend(values)


def _called(reward: RewardFunction, arguments: Mapping[str, Any], log: _Log) -> Any:
    own = {name: [*value] if isinstance(value, list) else value for name, value in arguments.items()}
    given = {**own, "log_extra": log.log_extra, "log_metric": log.log_metric}
    return reward.function(**_accepted(reward, given))


def _accepted(reward: RewardFunction, arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return accepted_arguments(reward.function, arguments, always=(*GIVEN, "environments"))
    except LookupError as error:
        raise InvalidRewardError(str(error)) from None


def _scored(result: Any, log: _Log, length: int) -> Scored:
    return Scored(
        _checked(result, length),
        {_name(name): [_metric(name, value) for value in values] for name, values in log.metrics.items()},
        {_name(column): _column(column, values, length) for column, values in log.extra.items()},
    )


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise InvalidRewardError(f"logged under the name {shown(name)}; a name is a text that is not empty")
    return name


def _metric(name: str, value: Any) -> float:
    number = number_of(value)
    if number is None:
        raise InvalidRewardError(f"logged {shown(value)} as the metric {name!r}; log_metric takes one number")
    return number


def _column(column: str, values: Sequence[Any], length: int) -> list[Any]:
    if len(values) != length:
        raise InvalidRewardError(
            f"logged {len(values)} values in the column {column!r} for {length} completions; log_extra takes one each"
        )
    cells = map(single, values)
    return [cell if cell is None or isinstance(cell, str | int | float) else str(cell) for cell in cells]


def _checked(result: Any, length: int) -> list[float | None]:
    if hasattr(result, "tolist"):
        result = result.tolist()
    if isinstance(result, str | bytes | Mapping) or not isinstance(result, Iterable):
        raise InvalidRewardError(f"returned {shown(result)}; it must return a list with one float or None a completion")
    values = list(result)
    if len(values) != length:
        raise InvalidRewardError(f"returned {len(values)} values for {length} completions; it must return one each")
    return [_number(value, index) for index, value in enumerate(values)]


def _number(value: Any, index: int) -> float | None:
    if value is None:
        return None
    number = number_of(value)
    if number is None:
        raise InvalidRewardError(f"returned {shown(value)} for completion {index}; a reward is a float or None")
    if math.isinf(number):
        raise InvalidRewardError(
            f"returned {shown(value)} for completion {index}; a reward must be a finite number of float32 (None leaves it out)"
        )
    return None if math.isnan(number) else number
