"""Calls of code that users bring, many at once in threads, each under a deadline of its own; async code on one loop.

Threads that hang cannot be ended: they are daemons, and left behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import MapResult, ThreadPool
from typing import Any

from grpo_fast.async_code import AsyncCode

_LOOK_S = 1.0


class OverdueError(Exception):
    """Calls that took longer than they may.

    Args:
        places: of those calls; empty where other calls, which hang, kept these from beginning.
        blocked_at: where async code blocks the loop, so that nothing else in it goes on; empty where none does.
    """

    def __init__(self, places: Sequence[int], *, blocked_at: str = "") -> None:
        super().__init__(f"calls {list(places)} are overdue")
        self.places = places
        self.blocked_at = blocked_at


@dataclass(slots=True)
class _Call:
    place: int
    function: Callable[[], Any]
    began: float | None = None
    ended: bool = False

    def runs_since(self) -> float | None:
        """When it began, in seconds of the monotonic clock; ``None`` before, and once it has ended."""
        return None if self.ended else self.began


class TimedCalls:
    """Makes calls; several threads may have calls made at a time, and share the workers.

    Args:
        timeout_s: longest time of one call, in seconds, from its own begin.
        workers: calls at a time.
    """

    def __init__(self, *, timeout_s: float, workers: int) -> None:
        self._timeout_s = timeout_s
        self._workers = workers
        self._lock = threading.Lock()
        self._threads: ThreadPool | None = None
        self.loop = AsyncCode()
        """Where what they return is awaited."""

    def run(self, functions: Sequence[Callable[[], Any]], failed: Callable[[int, BaseException], Exception]) -> list[Any]:
        """Makes calls, and waits for all of them.

        Args:
            functions: what is called; an awaitable that one returns is awaited, on a loop that all share and that is kept.
            failed: makes of the place of a call, and of what it raised, what is raised here.

        Returns:
            What they returned, in their order.

        Raises:
            OverdueError: one took too long.
            Exception: by ``failed``; of several, that of the first one that raised.
        """
        left = threading.Event()

        def one(call: _Call) -> Any:
            if left.is_set():
                return None
            call.began = time.monotonic()
            try:
                return self.loop.awaited(call.function())
            except BaseException as error:  # an exit, too, ends this call and not the thread
                raise failed(call.place, error) from error
            finally:
                call.ended = True

        calls = [_Call(*each) for each in enumerate(functions)]
        with self._lock:
            threads = self._threads = self._threads or ThreadPool(self._workers)
        results = threads.map_async(one, calls, chunksize=1)
        try:
            self._wait(results, calls, threads)
        except BaseException:  # calls may hang, and no one waits for them any more
            left.set()
            self._leave(threads)
            raise
        return results.get()

    def close(self) -> None:
        """Lets the threads and the loop go; twice is harmless."""
        if self._threads is not None:
            self._leave(self._threads)
        self.loop.close()

    def _wait(self, results: MapResult[Any], calls: Sequence[_Call], threads: ThreadPool) -> None:
        while not results.ready():
            now = time.monotonic()
            running = {call.place: began for call in calls if (began := call.runs_since()) is not None}
            late = [place for place, began in running.items() if now - began >= self._timeout_s]
            if late or (not running and self._threads is not threads):
                raise OverdueError(late, blocked_at=self.loop.blocked_at())
            # not for long at a time: a signal that comes just before a wait begins would not end it
            results.wait(min(_LOOK_S, min(running.values(), default=now) + self._timeout_s - now))

    def _leave(self, threads: ThreadPool) -> None:
        """Later calls get new threads."""
        with self._lock:
            if self._threads is threads:
                self._threads = None
        threads.close()
