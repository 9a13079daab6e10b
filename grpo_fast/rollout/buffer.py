"""Rollouts made ahead by a thread, and the bound on how far ahead: what a step trains on is at most so many updates old.

With staleness k, rollouts of step n begin when the weights of step ``n - 1 - k`` are in force, and no earlier. A trainer that
holds the buffer before it changes the weights has every rollout sampled by exactly those, whatever the timing: what is allowed
is finished first, so that runs repeat bit for bit.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Produced(Generic[T]):
    """The rollouts of one step."""

    value: T
    begin: float
    """Clock of ``time.perf_counter``, in seconds."""
    end: float


class RolloutBuffer(Generic[T]):
    """A queue of the next steps' rollouts, filled by a thread of its own in the order of the steps.

    Args:
        produce: makes the rollouts of a step; called in the thread, for one step after another.
        max_staleness: k, 1 or more.
        last_step: no rollouts are made for steps after it.
    """

    def __init__(self, produce: Callable[[int], T], *, max_staleness: int, last_step: int) -> None:
        if max_staleness < 1:
            raise ValueError(f"max_staleness={max_staleness} must be at least 1; with less, no rollouts are made ahead")
        self._produce = produce
        self._max_staleness = max_staleness
        self._last_step = last_step
        self._ready: deque[Produced[T]] = deque()
        self._waits: list[tuple[float, float]] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._next = 1
        self._allowed = 0
        self._closed = False

    def restore(self, next_step: int, ready: Sequence[T]) -> None:
        """Begins at ``next_step`` with what was made for it and the steps after it, before anything is taken."""
        self._next = next_step + len(ready)
        self._ready = deque(Produced(value, 0.0, 0.0) for value in ready)

    def ready(self) -> list[T]:
        """Rollouts that are made and not taken, oldest first."""
        with self._changed:
            return [produced.value for produced in self._ready]

    def allow(self, step: int) -> None:
        """Lets the rollouts of ``step`` and of the ``max_staleness`` steps after it be made.

        Args:
            step: the one after that whose weights are in force.

        Raises:
            ValueError: the buffer is closed.
        """
        with self._changed:
            if self._closed:
                raise ValueError("the rollout buffer is closed; make a new one")
            self._allowed = min(step + self._max_staleness, self._last_step)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rollouts ahead", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def take(self, step: int) -> tuple[T, float]:
        """Waits for the rollouts of ``step``, and lets those be made that :meth:`allow` would.

        Args:
            step: the one after that whose weights are in force.

        Returns:
            The rollouts, and for how many seconds of their making nobody waited.

        Raises:
            BaseException: what ``produce`` raised; the next call tries again.
            ValueError: the buffer is closed.
        """
        with self._changed:
            self.allow(step)
            self._wait(lambda: bool(self._ready) or self._error is not None)
            if not self._ready:
                error, self._error, self._thread = self._error, None, None
                assert error is not None
                raise error
            found = self._ready.popleft()
            waited = sum(max(0.0, min(end, found.end) - max(begin, found.begin)) for begin, end in self._waits)
            self._waits = [span for span in self._waits if span[1] > found.end]
            return found.value, found.end - found.begin - waited

    def hold(self) -> None:
        """Waits until everything is made that may be; nothing begins before the next :meth:`allow`."""
        with self._changed:
            self._wait(lambda: self._thread is None or self._error is not None or self._next > self._allowed)

    def close(self) -> None:
        """Ends the thread once its present rollouts are made, or have failed; calling it twice is harmless."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _wait(self, until: Callable[[], bool]) -> None:
        begin = time.perf_counter()
        self._changed.wait_for(until)
        self._waits.append((begin, time.perf_counter()))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next <= self._allowed)
                if self._closed:
                    return
                step = self._next
            begin = time.perf_counter()
            value, error = None, None
            try:
                value = self._produce(step)
            except BaseException as raised:
                error = raised
            with self._changed:
                if error is None:
                    self._ready.append(Produced(value, begin, time.perf_counter()))  # type: ignore[arg-type]
                    self._next += 1
                self._error = error
                self._changed.notify_all()
                if error is not None:
                    return
