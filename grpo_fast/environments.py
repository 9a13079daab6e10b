"""Environments: what answers the policy between its turns. Each call under a deadline, so that none can hang the run.

They run in threads of this process, since what they mostly do is to wait: for a search, a sandbox, another model. They may hold
what no other process could be sent, and need no pickling. An instance is made once and used again and again, one episode after
the other.

A class without ``step`` is one as TRL has them, whose public methods are tools that the policy calls: see
:mod:`grpo_fast.tools`.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, TypeAlias, TypeVar

from grpo_fast.async_code import AsyncCode
from grpo_fast.timed_calls import OverdueError, TimedCalls
from grpo_fast.tools import NoEnvironment, NotTextError, Tool, ToolEnvironment, as_text, methods_of, schemas_of
from grpo_fast.types import Message, Prompt, TrainingError, is_message
from grpo_fast.user_code import accepted_arguments, describe_failure, import_object, name_of, number_of, shown

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

Reply: TypeAlias = str | list[Message]
"""An environment's reply: text, or messages if the prompt is messages."""


class Environment(Protocol):
    """Protocol of a class for ``environment_factory``; a third method, ``get_reward() -> float | None``, may rate the episode.

    All of them may be async. What an episode leaves behind, ``reset`` has to clear: the next one meets the same instance.
    """

    def reset(self, prompt: Any, **columns: Any) -> None:
        """Begins an episode.

        Args:
            prompt: as in the dataset.
            columns: those of the dataset's columns that the signature names; all of them where it takes ``**columns``. They and
                the prompt are copies, the episode's own.
        """
        ...

    def step(self, completion: str) -> str | Message | Sequence[Message] | None:
        """Answers the policy.

        Args:
            completion: what it said in this turn, stop string included.

        Returns:
            What it reads next: text (to a prompt of messages a user's), a message or several; ``None`` ends the episode.
        """
        ...


class EnvironmentFailedError(TrainingError):
    """A call of an environment that raised, took too long or broke the contract; the message names the dataset's row."""


class _Call(NamedTuple):
    """One call of one environment."""

    function: Callable[[], Any]
    prompt: Prompt


class Environments:
    """Makes environments, keeps them from one use to the next, and calls many of them at once; a context, which starts it.

    Args:
        factory: ``module:Class``, or what makes an environment when it is called without arguments.
        tools: functions that the policy may call, by name, beside methods of environments that have no ``step``.
        timeout_s: longest time of one call, in seconds.
        workers: calls at a time.

    Raises:
        ValueError: a name that is not ``module:Class``, or a number out of range.
        TypeError: what was given makes nothing.
    """

    def __init__(
        self,
        factory: str | Callable[[], Any],
        *,
        tools: Mapping[str, Tool] | None = None,
        timeout_s: float = 60.0,
        workers: int = 16,
    ) -> None:
        if not isinstance(factory, str) and not callable(factory):
            raise TypeError(f"environment_factory={factory!r:.80} makes no environments; give a class, or 'module:Class'")
        if isinstance(factory, str) and not all(factory.partition(":")):
            raise ValueError(f"environment_factory={factory!r} names no class; write 'module:Class'")
        if not timeout_s > 0 or math.isinf(timeout_s):
            raise ValueError(f"timeout_s={timeout_s} must be a positive number of seconds")
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1")
        self.name = environment_name(factory)
        """As in errors and records."""
        self.timeout_s = timeout_s
        self.workers = workers
        self.schemas: list[dict[str, Any]] = []
        """What a chat template tells of the tools; empty where there are none; known once started."""
        self._tools = tools or {}
        self._factory = factory
        self._make: Callable[[], Any] | None = None
        self._free: list[Any] = []
        self._lock = threading.Lock()
        self._made: list[Any] = []
        self._calls = TimedCalls(timeout_s=timeout_s, workers=workers)
        self._can_rate = False

    def start(self) -> None:
        """Makes the first environment now, so that what is wrong with it is known before the first step.

        Raises:
            ValueError: it cannot be found, imported or made, lacks a method, or has a tool that cannot be described; what was
                made is closed.
        """
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        made = self._first()
        if isinstance(made, ToolEnvironment):
            if not made.tools:
                raise ValueError(
                    f"environment {self.name!r} has no method 'step', which answers the policy, and no public method that is a "
                    "tool for it to call (docs/environments.md)"
                )
            try:
                self.schemas = schemas_of(made.tools)
            except ValueError as error:
                own = f"environment {self.name!r} has no method 'step', so that its public methods are tools: "
                raise ValueError(f"{own if methods_of(made.own) else ''}{error}") from error
        elif self._tools:
            raise ValueError(
                f"tools {', '.join(self._tools)} are given beside environment {self.name!r}, whose step answers the policy "
                "itself; call them there, or make its public methods tools by leaving step out"
            )
        self._can_rate = callable(getattr(made, "get_reward", None))
        self._free.append(made)

    def check_columns(self, columns: Sequence[str]) -> None:
        """Holds ``reset`` against a dataset, once started.

        Args:
            columns: those beside the prompt.

        Raises:
            ValueError: it needs another one.
        """
        try:
            accepted_arguments(self._free[0].reset, dict.fromkeys(("prompt", *columns)), always=("prompt",))
        except LookupError as error:
            raise ValueError(f"environment {self.name!r}: reset {error}") from None

    @property
    def sources(self) -> dict[str, Any]:
        """Names of what was given, by the settings that would have it."""
        return {
            "environment_factory": None if self._factory is NoEnvironment else self.name,
            "tools": list(self._tools) or None,
        }

    @property
    def tool_names(self) -> list[str]:
        """Functions and methods that the policy may call; known once started."""
        return [schema["function"]["name"] for schema in self.schemas]

    @property
    def loop(self) -> AsyncCode:
        """Where async methods and tools are awaited; what reads environments has to be awaited there too."""
        return self._calls.loop

    @property
    def can_rate(self) -> bool:
        """Whether episodes end with a reward of the environment's own; known once started."""
        return self._can_rate

    def begin(self, prompts: Sequence[Prompt]) -> Episodes:
        """Begins an episode for each prompt.

        Raises:
            EnvironmentFailedError: an environment cannot be made, or a ``reset`` failed.
        """
        make = self._make
        assert make is not None
        with self._lock:
            made = [self._free.pop() for _ in prompts[: len(self._free)]]
        made += self.run("making it", [_Call(lambda: self._prepared(make()), prompt) for prompt in prompts[len(made) :]])
        episodes = Episodes(self, made, prompts)
        calls = []
        for each, prompt in zip(made, prompts, strict=True):
            given = {"prompt": prompt.prompt, **prompt.columns}
            accepted = accepted_arguments(each.reset, given, always=("prompt",))
            calls.append(_Call(partial(_with_copies, each.reset, accepted), prompt))
        episodes.observations = [self._observation(*told) for told in zip(self.run("reset", calls), made, prompts, strict=True)]
        return episodes

    def run(self, method: str, calls: Sequence[_Call]) -> list[Any]:
        """Makes calls, ``workers`` at a time, and returns what they gave.

        Raises:
            EnvironmentFailedError: one raised, or took too long.
        """
        if not calls:
            return []

        def failed(place: int, error: BaseException) -> EnvironmentFailedError:
            row = calls[place].prompt.index
            return EnvironmentFailedError(f"environment {self.name!r}: {method} {describe_failure(error)} for row {row}")

        try:
            return self._calls.run([call.function for call in calls], failed)
        except OverdueError as error:
            rows = sorted({calls[place].prompt.index for place in error.places})
            blocked = (
                f"; async code blocks the event loop that all share, at {error.blocked_at}: what blocks belongs in "
                "asyncio.to_thread"
                if error.blocked_at
                else ""
            )
            raise EnvironmentFailedError(
                f"environment {self.name!r}: {method} took longer than {self.timeout_s:g} s for row "
                f"{', '.join(map(str, rows[:5])) or 'unknown'} (environment_timeout_s){blocked}"
            ) from None

    def give_back(self, made: Sequence[Any]) -> None:
        """Takes environments whose episodes have ended."""
        with self._lock:
            self._free.extend(made)

    def close(self) -> None:
        """Calls ``close`` of the environments that have it, also after a failure, and lets them go; twice is harmless.

        What goes wrong in that is logged, as nothing depends on it any more.
        """
        with self._lock:
            made, self._made, self._free = self._made, [], []
        closing = [each.close for each in made if callable(getattr(each, "close", None))]
        if closing:
            try:
                self._calls.run(closing, lambda _, error: EnvironmentFailedError(describe_failure(error)))
            except (EnvironmentFailedError, OverdueError) as error:
                told = f"took longer than {self.timeout_s:g} s" if isinstance(error, OverdueError) else error
                _log.warning("environment %r: close %s", self.name, told)
        self._calls.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _first(self) -> Any:
        found = import_object(self._factory, kind="environment") if isinstance(self._factory, str) else self._factory
        if not callable(found):
            raise ValueError(f"environment {self.name!r} is {shown(found)}, which makes nothing; name a class")  # noqa: TRY004
        self._make = found
        try:
            made = found()
        except Exception as error:
            raise ValueError(f"environment {self.name!r} cannot be made: {describe_failure(error)}") from error
        return self._prepared(made)

    def _prepared(self, made: Any) -> Any:
        """An environment as it is played with; :meth:`close` will close it."""
        if getattr(made, "reset", None) is None:
            raise ValueError(
                f"environment {self.name!r} has no method 'reset', which begins an episode; beside it stands step, or methods "
                "that are tools do (docs/environments.md)"
            )
        prepared = made if callable(getattr(made, "step", None)) else ToolEnvironment(made, self._tools, self.loop.awaited)
        with self._lock:
            if any(made is _own(each) for each in self._made):
                raise ValueError(
                    f"environment {self.name!r} is one instance, which what was given returns again and again; episodes run "
                    "side by side, so that each needs its own: give the class, or a function that makes a new one"
                )
            self._made.append(prepared)
        return prepared

    def _observation(self, answer: Any, made: Any, prompt: Prompt) -> str:
        """What ``reset`` would have put behind the prompt."""
        if answer is None:
            return ""
        takes_text = isinstance(made, ToolEnvironment)
        if takes_text and isinstance(answer, str | list):
            try:
                return as_text(answer)
            except NotTextError as error:
                raise EnvironmentFailedError(f"environment {self.name!r}: reset, row {prompt.index}: {error}") from None
        wanted = "text to put behind the prompt, or None" if takes_text else "None"
        raise EnvironmentFailedError(
            f"environment {self.name!r}: reset returned {shown(answer)} for row {prompt.index}; it must return {wanted}: what "
            "the policy reads first is the dataset's prompt"
        )


class Episodes:
    """Episodes that run side by side, one a completion; a context, at whose end the environments are free for others.

    Args:
        owner: made them, and runs their calls.
        made: [N] environments.
        prompts: [N].
    """

    def __init__(self, owner: Environments, made: Sequence[Any], prompts: Sequence[Prompt]) -> None:
        self._owner = owner
        self._made = made
        self._prompts = prompts
        self.observations: list[str] = []
        """[N], what environments put behind their prompts; empty where they put nothing."""

    @property
    def environments(self) -> list[Any]:
        """[N], as the factory made them."""
        return list(map(_own, self._made))

    @property
    def tool_calls(self) -> list[tuple[int, int] | None]:
        """[N], how many tools were called, and how many of the calls failed; ``None`` where there are no tools."""
        return [(each.num_calls, each.num_failures) if isinstance(each, ToolEnvironment) else None for each in self._made]

    def step(self, places: Sequence[int], said: Sequence[str | Message]) -> list[Reply | None]:
        """What the environments at some places say to what the policy said.

        Args:
            places: of the episodes.
            said: what the policy said in each; as a message, with its calls, where there are tools.

        Raises:
            EnvironmentFailedError: a call failed, or returned what cannot be read.
        """
        calls = [
            _Call(partial(self._made[place].step, heard), self._prompts[place])
            for place, heard in zip(places, said, strict=True)
        ]
        answers = self._owner.run("step", calls)
        return [self._reply(answer, call.prompt) for answer, call in zip(answers, calls, strict=True)]

    def rewards(self) -> list[float | None]:
        """[N], what the environments say of their episodes; ``None`` where they say nothing.

        Raises:
            EnvironmentFailedError: a call failed, or returned no number.
        """
        if not self._owner.can_rate:
            return [None] * len(self._made)
        calls = [_Call(each.get_reward, prompt) for each, prompt in zip(self._made, self._prompts, strict=True)]
        values = self._owner.run("get_reward", calls)
        return [self._number(value, prompt) for value, prompt in zip(values, self._prompts, strict=True)]

    def ask(self, name: str, function: Callable[[list[Any]], Sequence[_T]]) -> list[_T]:
        """What a function of users' says of the environments; it is given all of them.

        Args:
            name: what it is, in errors.
            function: gives one thing an environment.

        Raises:
            EnvironmentFailedError: it failed, or took too long.
        """
        if not self._made:
            return []
        [values] = self._owner.run(name, [_Call(partial(function, self.environments), self._prompts[0])])
        return list(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:  # after a failure some may still be at work
            self._owner.give_back(self._made)

    def _reply(self, answer: Any, prompt: Prompt) -> Reply | None:
        chat = not isinstance(prompt.prompt, str)
        if answer is None or (isinstance(answer, str) and answer and not chat):
            return answer
        messages = answer if isinstance(answer, Sequence) and not isinstance(answer, str) else [answer]
        messages = [{"role": "user", "content": each} if isinstance(each, str) and each else each for each in messages]
        if chat and messages and all(is_message(each) for each in messages):
            return [dict(each) for each in messages]
        wanted = "text or messages like {'role': 'tool', 'content': '...'}" if chat else "text, as the prompt is"
        raise EnvironmentFailedError(
            f"environment {self._owner.name!r}: step returned {shown(answer)} for row {prompt.index}; it must return "
            f"{wanted}, or None at the end of the episode"
        )

    def _number(self, value: Any, prompt: Prompt) -> float | None:
        if value is None:
            return None
        number = number_of(value)
        if number is None or not math.isfinite(number):
            raise EnvironmentFailedError(
                f"environment {self._owner.name!r}: get_reward returned {shown(value)} for row {prompt.index}; it must return "
                "a finite number or None (rewards are float32)"
            )
        return number


def _own(made: Any) -> Any:
    """An environment as the factory made it."""
    return made.own if isinstance(made, ToolEnvironment) else made


def _with_copies(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Calls it with arguments that it may change: the dataset's own serve other episodes, and the same row later."""
    return function(**copy.deepcopy(arguments))


def environment_name(factory: str | Callable[[], Any]) -> str:
    """What stands behind the colon, or the ``__name__``."""
    return factory.partition(":")[2] if isinstance(factory, str) else name_of(factory)
