"""What every sink offers, what it is told about a run, and several sinks as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a sink knows of a run before its first step."""

    run_dir: Path
    """Directory of the run; its name is the name of the run."""
    model: str
    """The policy, as people name it."""
    dataset: str
    """Where the prompts come from, as people name it."""
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
    currency: str = ""
    """Unit of the ``money`` metric; empty where the configuration names none."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration as plain values, for trackers that store it."""


@runtime_checkable
class Sink(Protocol):
    """Where a run's numbers go.

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
        """Takes sample completions: ``step``, ``prompt``, ``completion``, ``reward``, ``advantage``."""
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
    """Several sinks as one. The order is that of the calls; all are closed even where one fails to."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def __iter__(self) -> Iterator[Sink]:
        return iter(self._sinks)

    def start(self, info: RunInfo) -> None:
        """Starts all."""
        for sink in self._sinks:
            sink.start(info)

    def log_step(self, metrics: Mapping[str, float], forecast: Mapping[str, Any] | None = None) -> None:
        """Hands a step to all."""
        for sink in self._sinks:
            sink.log_step(metrics, forecast)

    def log_event(self, step: int, event: str, message: str) -> None:
        """Hands an event to all."""
        for sink in self._sinks:
            sink.log_event(step, event, message)

    def log_completions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Hands completions to all."""
        for sink in self._sinks:
            sink.log_completions(rows)

    def ask(self, question: str, answers: Mapping[str, str], *, give_up: Callable[[], bool]) -> str | None:
        """The answer of the first sink that has somebody to ask; see :class:`Asks`."""
        asked = (sink.ask(question, answers, give_up=give_up) for sink in self._sinks if isinstance(sink, Asks))
        return next((answer for answer in asked if answer is not None), None)

    def close(self) -> None:
        """Closes all, the last one first; the first error is raised once all had their turn."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)
