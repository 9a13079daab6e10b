"""From a name to a reward function, and from a reward function to checked numbers."""

from __future__ import annotations

import asyncio
import difflib
import functools
import importlib
import inspect
import math
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_fast.rewards.functions import BUILT_IN

BATCH_ARGUMENTS = ("prompts", "completions", "completion_ids", "completion_openings")
"""What every reward call is given beside the dataset's columns."""

_MAX_CHARACTERS = 1000


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward function and the name its metrics go by."""

    name: str
    function: Callable[..., Any]


class InvalidRewardError(ValueError):
    """A reward call that breaks the contract: a missing column, a wrong length, a value that is no number."""


def reward_name(spec: str | Callable[..., Any]) -> str:
    """The metric name of a reward: what follows the colon, or the function's ``__name__``.

    Nothing is imported; a ``module:function`` that does not exist has a name too.

    Raises:
        ValueError: an unknown built-in, or a string that is neither a built-in nor ``module:function``.
        TypeError: neither a string nor a callable, or a class in place of an instance.
    """
    if isinstance(spec, str):
        if spec in BUILT_IN:
            return spec
        module, colon, attribute = spec.partition(":")
        if colon and module and attribute:
            return attribute.rpartition(".")[2]
        near = difflib.get_close_matches(spec, BUILT_IN, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        if "," in spec:
            hint = "several are given one by one, not in one text. "
        elif spec.endswith(".py"):
            hint = f"a function of that file is '{spec.removesuffix('.py')}:FUNCTION'. "
        raise ValueError(f"unknown reward {spec!r}; {hint}Built-in: {', '.join(sorted(BUILT_IN))}; your own: 'module:function'")
    if isinstance(spec, type) or not callable(spec):
        raise TypeError(f"a reward is a name, 'module:function' or a function, not {spec!r}")
    while isinstance(spec, functools.partial):
        spec = spec.func
    return str(getattr(spec, "__name__", type(spec).__name__))


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
    module_name, _, path = spec.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"reward {spec!r}: cannot import {module_name!r} ({type(error).__name__}: {error}); "
            "its folder must be on the Python path (run from there, set PYTHONPATH, or install it)"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"reward {spec!r}: {getattr(found, '__name__', found)!r} has no {part!r}{hint}")
        found = getattr(found, part)
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
        _accepted(reward, dict.fromkeys((*BATCH_ARGUMENTS, *columns)))
    except InvalidRewardError as error:
        raise InvalidRewardError(f"reward function {reward.name!r} {error}") from None


def call_reward(reward: RewardFunction, arguments: Mapping[str, Any]) -> list[float | None]:
    """Calls a reward function once, awaiting it where it is async, and checks what it returns.

    Args:
        reward: the function.
        arguments: those of :data:`BATCH_ARGUMENTS` and one list a dataset column, all of one length.

    Returns:
        One finite float or ``None`` (also for NaN) a completion.

    Raises:
        InvalidRewardError: a column the function needs is not there, or it returned the wrong number or kind of values.
        Exception: whatever the function raises.
    """
    result = reward.function(**_accepted(reward, arguments))
    if inspect.isawaitable(result):
        result = _run(result)
    return _checked(result, len(arguments["completions"]))


def describe_failure(error: BaseException) -> str:
    """One line on what went wrong in a reward call: the exception, and the line of the traceback it came from."""
    if isinstance(error, InvalidRewardError):
        return str(error)
    text = "".join(traceback.format_exception_only(error)).strip()
    if len(text) > _MAX_CHARACTERS:
        text = text[:_MAX_CHARACTERS] + "..."
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return f"raised {text}"
    last = frames[-1]
    return f"raised {text} ({last.filename}:{last.lineno}, in {last.name}: {last.line})"


def _accepted(reward: RewardFunction, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the function's signature takes; all of them where it takes ``**columns`` or cannot be read."""
    try:
        parameters = inspect.signature(reward.function).parameters.values()
    except ValueError:
        return dict(arguments)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in parameters:
        if parameter.kind in named and parameter.default is parameter.empty and parameter.name not in arguments:
            columns = [name for name in arguments if name not in BATCH_ARGUMENTS]
            near = difflib.get_close_matches(parameter.name, arguments, n=1)
            raise InvalidRewardError(
                f"needs a dataset column {parameter.name!r}; the dataset has {', '.join(columns) or 'no column but the prompt'}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(arguments)
    names = {parameter.name for parameter in parameters if parameter.kind in named}
    return {name: value for name, value in arguments.items() if name in names}


def _run(awaitable: Awaitable[Any]) -> Any:
    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    # A notebook runs its cells inside an event loop, which cannot be entered a second time from the same thread.
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            outcome.append(asyncio.run(wait()))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def _checked(result: Any, length: int) -> list[float | None]:
    if hasattr(result, "tolist"):
        result = result.tolist()
    if isinstance(result, str | bytes | Mapping) or not isinstance(result, Iterable):
        raise InvalidRewardError(f"returned {_shown(result)}; it must return a list with one float or None a completion")
    values = list(result)
    if len(values) != length:
        raise InvalidRewardError(f"returned {len(values)} values for {length} completions; it must return one each")
    return [_number(value, index) for index, value in enumerate(values)]


def _number(value: Any, index: int) -> float | None:
    if value is None:
        return None
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, int | float):
        raise InvalidRewardError(f"returned {_shown(value)} for completion {index}; a reward is a float or None")
    number = float(value)
    if math.isinf(number):
        raise InvalidRewardError(f"returned {number} for completion {index}; a reward must be finite (None leaves it out)")
    return None if math.isnan(number) else number


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
