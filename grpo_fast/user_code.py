"""Code that users bring, as reward functions and environments: found by name, given what it takes, its failures told."""

from __future__ import annotations

import asyncio
import difflib
import functools
import importlib
import inspect
import threading
import traceback
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

_MAX_CHARACTERS = 1000
_OF_TRL = {"trainer_state", "log_extra", "log_metric"}
"""What TRL hands to reward functions beside columns."""


def name_of(function: Callable[..., Any]) -> str:
    """The ``__name__`` of what is called in the end, or of its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def import_object(spec: str, *, kind: str) -> Any:
    """Imports what ``module:attribute`` names.

    Args:
        spec: the name; the attribute may have dots.
        kind: what it should be, in a word, for errors.

    Raises:
        ValueError: no such module or attribute; the nearest known name is given.
    """
    module_name, _, path = spec.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"{kind} {spec!r}: cannot import {module_name!r} ({type(error).__name__}: {error}); "
            "its folder must be on the Python path (run from there, set PYTHONPATH, or install it)"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{kind} {spec!r}: {getattr(found, '__name__', found)!r} has no {part!r}{hint}")
        found = getattr(found, part)
    return found


def accepted_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], *, always: Collection[str]
) -> dict[str, Any]:
    """The arguments that a function's signature takes; all of them where it takes ``**columns`` or cannot be read.

    Args:
        function: what will be called.
        arguments: by name: dataset columns, and what is always given.
        always: names of the latter.

    Raises:
        LookupError: it needs another one; the message says what there is.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return dict(arguments)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in parameters:
        if parameter.kind in named and parameter.default is parameter.empty and parameter.name not in arguments:
            if parameter.name in _OF_TRL:
                raise LookupError(
                    f"asks for {parameter.name!r}, which TRL gives, and nothing here; what it logs can be a reward of weight 0"
                )
            columns = [name for name in arguments if name not in always]
            near = difflib.get_close_matches(parameter.name, arguments, n=1)
            raise LookupError(
                f"needs a dataset column {parameter.name!r}; the dataset has {', '.join(columns) or 'no column but the prompt'}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(arguments)
    names = {parameter.name for parameter in parameters if parameter.kind in named}
    return {name: value for name, value in arguments.items() if name in names}


def awaited(result: Any) -> Any:
    """What a call gave in the end: an awaitable is waited for, inside an event loop too, as notebooks have one."""
    if not inspect.isawaitable(result):
        return result
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_wait(result))
    # A running loop cannot be entered a second time from the same thread.
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            outcome.append(asyncio.run(_wait(result)))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


async def _wait(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def shown(value: Any) -> str:
    """A value with its type, as errors show it."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def describe_failure(error: BaseException) -> str:
    """One line on what a call raised: the exception, and the line of the traceback it came from."""
    text = "".join(traceback.format_exception_only(error)).strip()
    if len(text) > _MAX_CHARACTERS:
        text = text[:_MAX_CHARACTERS] + "..."
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return f"raised {text}"
    last = frames[-1]
    return f"raised {text} ({last.filename}:{last.lineno}, in {last.name}: {last.line})"
