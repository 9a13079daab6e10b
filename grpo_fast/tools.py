"""Tools: Python functions, and methods of an environment, that the policy calls in the form that its chat template has.

Those of an episode are called by an environment of their own, :class:`ToolEnvironment`, in whatever thread calls that: they
may wait, block, and run a loop of their own. What goes wrong in a call is told to the policy and counted, and the run goes on:
tools that are not there, arguments that do not fit, and code that calls ``exit()`` are the policy's doing.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from transformers.utils.chat_template_utils import get_json_schema

from grpo_fast.types import Message
from grpo_fast.user_code import import_object, name_of, shown

Tool: TypeAlias = Callable[..., Any]

_NO_TOOLS = ("reset", "get_reward", "close")
"""Public methods that a run calls itself."""
_CONTENT = ("text", "image", "image_url", "video", "video_url", "audio", "audio_url", "input_audio")
"""Types that parts of a message's content have; lists of other mappings are a tool's data."""
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_LISTED = "write its arguments one by one, or take a list (a decorator keeps those of its function by functools.wraps)"


class NotTextError(Exception):
    """A tool returned what no model can be trained on here."""


class NoEnvironment:
    """Stands where tools need no environment."""

    def reset(self) -> None:
        """Nothing is kept from one episode to the next."""


def find_tools(given: Sequence[str | Tool]) -> dict[str, Tool]:
    """Tools by name.

    Args:
        given: ``module:function``, imported here, or functions.

    Raises:
        ValueError: one cannot be found or imported, or has another one's name.
        TypeError: one is no function.
    """
    found: dict[str, Tool] = {}
    for spec in given:
        if isinstance(spec, str) and not all(spec.partition(":")):
            raise ValueError(f"tool {spec!r} names no function; write 'module:function'")
        tool = import_object(spec, kind="tool") if isinstance(spec, str) else spec
        if isinstance(tool, type) or not callable(tool):
            raise TypeError(f"tool {spec if isinstance(spec, str) else shown(tool)} is no function")
        if name_of(tool) in found:
            raise ValueError(f"two tools have the name {name_of(tool)!r}; rename one")
        found[name_of(tool)] = tool
    return found


def methods_of(environment: Any) -> dict[str, Tool]:
    """Methods of an environment that are tools: all public ones but ``reset``, ``get_reward`` and ``close``."""
    functions = inspect.getmembers(type(environment), predicate=inspect.isfunction)  # of the class: properties stay unread
    names = [name for name, _ in functions if not name.startswith("_") and name not in _NO_TOOLS]
    return {name: getattr(environment, name) for name in names}


def schemas_of(tools: Mapping[str, Tool]) -> list[dict[str, Any]]:
    """What chat templates tell a model of tools: JSON schemas, from type hints and docstrings.

    Raises:
        ValueError: hints or descriptions are missing, a parameter cannot be given by name, or a tool yields and returns
            nothing; the tool is named.
    """
    schemas = []
    for name, tool in tools.items():
        if inspect.isgeneratorfunction(tool) or inspect.isasyncgenfunction(tool):
            raise ValueError(f"tool {name!r} yields, and the model reads what a tool returns; return all of it")
        try:
            nameless = [each for each in inspect.signature(tool).parameters.values() if each.kind not in _BY_NAME]
            schema = {} if nameless else get_json_schema(tool)
        except Exception as error:  # of several kinds, by what is missing
            fix = "" if inspect.isroutine(tool) else "write a function around it (def), of which "
            raise ValueError(
                f"tool {name!r} cannot be described to the model: {str(error).rstrip('.')}; {fix}each argument needs a type "
                "hint, and a line under 'Args:' in the docstring"
            ) from error
        if nameless:
            parameter = nameless[0].replace(annotation=inspect.Parameter.empty, default=inspect.Parameter.empty)
            raise ValueError(
                f"tool {name!r} has the parameter '{parameter}', which no call can name, and arguments are given by name; "
                + ("remove the '/' behind it" if parameter.kind is inspect.Parameter.POSITIONAL_ONLY else _LISTED)
            )
        schema["function"]["name"] = name  # by which it is called: a decorator may have left another
        schemas.append(schema)
    return schemas


class ToolEnvironment:
    """Calls tools for an episode; an :class:`~grpo_fast.environments.Environment` that hears whole messages.

    Args:
        own: what methods that are tools belong to; it has ``reset``.
        functions: other tools, by name.
        awaited: gives what an async tool gave in the end, as :meth:`~grpo_fast.async_code.AsyncCode.awaited`.

    Raises:
        ValueError: a method has the name of a function.
    """

    def __init__(self, own: Any, functions: Mapping[str, Tool], awaited: Callable[[Any], Any]) -> None:
        methods = methods_of(own)
        for name in methods:
            if name in functions:
                raise ValueError(f"two tools have the name {name!r}: a function and a method of the environment; rename one")
        self.own = own
        self._awaited = awaited
        self.tools: dict[str, Tool] = {**functions, **methods}
        """By name."""
        self.num_calls = 0
        """Calls in the present episode."""
        self.num_failures = 0
        """Calls of them that failed."""
        for name in ("get_reward", "close"):
            if callable(getattr(own, name, None)):
                setattr(self, name, getattr(own, name))
        self.reset = self._counting_anew(own.reset)
        """Begins an episode; what it returns is put behind the prompt."""

    def step(self, message: Message) -> list[Message] | None:
        """Calls what the policy asked for, one after another.

        Args:
            message: what it said; ``tool_calls`` holds its calls.

        Returns:
            One message a call; ``None`` where there was none, which ends the episode.

        Raises:
            NotTextError: a tool returned an image or the like.
        """
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        return [self._reply(call["name"], call["arguments"]) for call in calls] or None

    def _reply(self, name: str, arguments: Any) -> Message:
        self.num_calls += 1
        try:
            content = as_text(self._awaited(self._tool(name)(**copy.deepcopy(arguments))))  # the message stays as it was said
        except NotTextError:
            raise
        except BaseException as error:  # an exit, too, ends the call and not the run
            self.num_failures += 1
            content = str({"error": str(error)})
        return {"role": "tool", "name": name, "content": content}

    def _tool(self, name: str) -> Tool:
        if name not in self.tools:
            raise LookupError(f"there is no tool {name!r}; there are: {', '.join(self.tools)}")
        return self.tools[name]

    def _counting_anew(self, reset: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(reset)
        def counted(**arguments: Any) -> Any:
            self.num_calls = self.num_failures = 0
            return reset(**arguments)

        return counted


def as_text(result: Any) -> str:
    """What a tool returned, as the policy reads it: a list of content parts by its texts, all else by ``str``.

    Raises:
        NotTextError: a part is no text.
    """
    if not isinstance(result, list) or not result or not all(map(_is_part, result)):
        return str(result)
    for part in result:
        if part["type"] != "text":
            raise NotTextError(f"content of the type {part['type']!r} was returned, and models are trained on text alone here")
    return "".join(str(part["text"]) for part in result)


def _is_part(value: Any) -> bool:
    """Whether a value can be a part of a message's content."""
    return isinstance(value, Mapping) and value.get("type") in _CONTENT and ("text" in value or value["type"] != "text")
