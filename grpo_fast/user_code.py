"""Code that users bring, as reward functions and environments: found by name, given what it takes, its failures told."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import io
import linecache
import math
import traceback
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import CodeType
from typing import Any, ClassVar, NamedTuple

import cloudpickle  # type: ignore[import-untyped]

_MAX_CHARACTERS = 1000
_LARGEST = 3.4028234663852886e38
"""Of float32, in which rewards become advantages."""

_HINTS = {
    "answer": "; answers in a column of another name: set answer_column",
    "environments": "; environments are there with tools or an environment_factory",
}
"""What to do about arguments that are missing."""


def name_of(function: Callable[..., Any]) -> str:
    """The ``__name__`` of what is called in the end, or of its class."""
    function = _called_in_the_end(function)
    return str(getattr(function, "__name__", type(function).__name__))


def is_async(function: Callable[..., Any]) -> bool:
    """Whether what is called in the end, or its class's ``__call__``, is an ``async def``."""
    function = _called_in_the_end(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _called_in_the_end(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def pickled_function(function: Callable[..., Any]) -> bytes:
    """A function for another process, which can then show the line that failed, also one in a cell of a notebook."""
    file = io.BytesIO()
    _Pickler(file).dump(_with_source(function))
    return file.getvalue()


def _with_source(function: Callable[..., Any]) -> Any:
    """What unpickles as the function and brings its source along where that is in no file."""
    called = _called_in_the_end(function)
    code = getattr(called, "__code__", None) or getattr(type(called).__call__, "__code__", None)
    if code is None or Path(code.co_filename).exists():
        return function
    lines = linecache.getlines(code.co_filename)
    return _Sourced(function, code.co_filename, lines) if lines else function


class _Sourced(NamedTuple):
    function: Callable[..., Any]
    place: str
    lines: list[str]

    def __reduce__(self) -> Any:
        return _restored, tuple(self)


def _restored(function: Callable[..., Any], place: str, lines: list[str]) -> Callable[..., Any]:
    linecache.cache[place] = (sum(map(len, lines)), None, lines, place)
    return function


def _reduced(code: CodeType) -> Any:
    build, arguments, *_ = cloudpickle.Pickler.dispatch_table[CodeType](code)
    return _placed, (build, arguments, code.co_filename)


def _placed(build: Callable[..., CodeType], arguments: tuple[Any, ...], place: str) -> CodeType:
    return build(*arguments).replace(co_filename=place)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Keeps where code stands, which cloudpickle leaves out since 3.1.3."""

    dispatch_table: ClassVar = ChainMap({CodeType: _reduced}, cloudpickle.Pickler.dispatch_table)


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
            columns = [name for name in arguments if name not in always]
            near = difflib.get_close_matches(parameter.name, arguments, n=1)
            raise LookupError(
                f"needs a dataset column {parameter.name!r}; the dataset has {', '.join(columns) or 'no column but the prompt'}"
                + (f"; did you mean {near[0]!r}?" if near and parameter.name != "environments" else "")
                + _HINTS.get(parameter.name, "")
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(arguments)
    names = {parameter.name for parameter in parameters if parameter.kind in named}
    return {name: value for name, value in arguments.items() if name in names}


def single(value: Any) -> Any:
    """The number in an array or tensor that holds no more than one; anything else as it is."""
    return value.item() if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1 else value


def number_of(value: Any) -> float | None:
    """The number that code gave, also in an array or tensor; ``None`` for anything else.

    One that float32 cannot hold is infinite.
    """
    value = single(value)
    if not isinstance(value, int | float):
        return None
    return math.inf if value > _LARGEST else -math.inf if value < -_LARGEST else float(value)


def shown(value: Any) -> str:
    """A value with its type, as errors show it."""
    try:
        text = repr(value)
    except Exception:  # of an int of many digits, or of users' own
        text = "a value that cannot be written"
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
    line = f": {last.line}" if last.line else ""  # of code that came without its source
    return f"raised {text} ({last.filename}:{last.lineno}, in {last.name}{line})"
