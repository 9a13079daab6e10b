"""The protocol of sinks, the facts that they get about a run, and several sinks as one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from grpo_fast.user_code import describe_failure

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Facts that a sink gets about a run before its first step."""

    run_dir: Path
    """Directory of the run; its name is the name of the run."""
    model: str
    """The policy, as people name it."""
    dataset: str
    """Name of the dataset, for people."""
    max_steps: int
    """Steps at most."""
    start_step: int = 0
    """Steps that are done already: 0 for a new run, the checkpoint's step for a resumed one."""
    device: str = ""
    """The machine in a few words."""
    forecast_epsilon: float = 0.01
    """Remaining gain of the reward under which going on is not worth it."""
    forecast_confidence: float = 0.78
    """Probability of so small a gain that a stop demands."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration as plain values, for trackers that store it."""


@runtime_checkable
class Sink(Protocol):
    """A destination of a run's numbers.

    ``start`` comes first and ``close`` last, also after a failure; ``close`` may come twice. Metrics are flat and carry
    ``step``; compute is cumulative, and ``budget/<name>`` holds the share left, in [0, 1], of each limit that is set.
    """

    def start(self, info: RunInfo) -> None:
        """Makes ready; ``info.start_step`` above 0 means that earlier steps are there already."""
        ...

    def log_step(self, metrics: Mapping[str, float], forecast: Mapping[str, Any] | None = None) -> None:
        """Takes the metrics of one step, and its forecast once there is one."""
        ...

    def log_event(self, step: int, event: str, message: str) -> None:
        """Takes something worth telling: a checkpoint, an evaluation, a warning, the end."""
        ...

    def log_completions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes sample completions: :data:`~grpo_fast.types.COMPLETION_COLUMNS`, and what reward functions logged of each."""
        ...

    def close(self) -> None:
        """Writes what is held back and lets go of files, threads and screens."""
        ...


@runtime_checkable
class Asks(Protocol):
    """A sink that can put a question to a person."""

    def ask(self, question: str, answers: Mapping[str, str], *, give_up: Callable[[], bool]) -> str | None:
        """Waits for one of several answers.

        Args:
            question: one sentence or two.
            answers: each answer and what it means.
            give_up: asked several times a second; True ends the waiting.

        Returns:
            The answer; empty where none came in time; None where nobody is there to ask.
        """
        ...


class SinkSet:
    """Several sinks as one. The order is that of the calls; all are closed even where one fails to.

    A sink that raises once the run has begun is reported in a warning and left out from then on: the run matters more than its
    display.

    Args:
        sinks: all of them.
        record: the one that keeps the run's own files; what it raises is raised, as a full disk is.
    """

    def __init__(self, sinks: Sequence[Sink], *, record: Sink | None = None) -> None:
        self._sinks = tuple(sinks)
        self._record = record
        self._step = 0

    def __iter__(self) -> Iterator[Sink]:
        return iter(self._sinks)

    def start(self, info: RunInfo) -> None:
        """Starts all; what one raises is raised, as nothing is lost yet."""
        self._step = info.start_step
        for sink in self._sinks:
            sink.start(info)

    def log_step(self, metrics: Mapping[str, float], forecast: Mapping[str, Any] | None = None) -> None:
        """Hands a step to all: a copy to each, which it may alter."""
        self._step = int(metrics.get("step", self._step))
        self._hand(lambda sink: sink.log_step(dict(metrics), deepcopy(forecast)))

    def log_event(self, step: int, event: str, message: str) -> None:
        """Hands an event to all."""
        self._step = step
        self._hand(lambda sink: sink.log_event(step, event, message))

    def log_completions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Hands completions to all: a copy of each row to each."""
        self._hand(lambda sink: sink.log_completions([dict(row) for row in rows]))

    def ask(self, question: str, answers: Mapping[str, str], *, give_up: Callable[[], bool]) -> str | None:
        """The answer of the first sink that has somebody to ask; see :class:`Asks`."""

        def ask(sink: Sink) -> str | None:
            return sink.ask(question, answers, give_up=give_up) if isinstance(sink, Asks) else None

        return next((answer for answer in self._returned(ask) if answer is not None), None)

    def close(self) -> None:
        """Closes all, the last one first; what the record raises is raised once all had their turn."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(self._close, sink)

    def _hand(self, give: Callable[[Sink], None]) -> None:
        for _ in self._returned(give):
            pass

    def _returned(self, call: Callable[[Sink], _T]) -> Iterator[_T]:
        """The result of each sink; those that raise are left out."""
        for sink in self._sinks:
            if not any(sink is other for other in self._sinks):  # it raised when it was told of another
                continue
            try:
                returned = call(sink)
            except Exception as error:
                if sink is self._record:
                    raise
                self._leave_out(sink, error)
            else:
                yield returned

    def _leave_out(self, sink: Sink, error: Exception) -> None:
        self._sinks = tuple(other for other in self._sinks if other is not sink)
        message = f"the sink {type(sink).__name__} {describe_failure(error)}; the run continues without it"
        if all(other is self._record for other in self._sinks):  # which shows nothing
            _log.warning("%s", message)
        self.log_event(self._step, "warn", message)
        self._close(sink)

    def _close(self, sink: Sink) -> None:
        try:
            sink.close()
        except Exception as error:
            if sink is self._record:
                raise
            _log.warning("the sink %s %s when it was closed", type(sink).__name__, describe_failure(error))
