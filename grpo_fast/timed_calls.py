"""Calls of code that users bring, many at once in threads, each under a deadline of its own; async code on one loop.

Threads that hang cannot be ended: they are daemons, and left behind.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Any

_CLOSING_S = 2.0


class OverdueError(Exception):
    """Calls that took longer than they may.

    Args:
        places: of those calls; empty where other calls, which hang, kept these from beginning.
    """

    def __init__(self, places: Sequence[int]) -> None:
        super().__init__(f"calls {list(places)} are overdue")
        self.places = places


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
        self._loop = _Loop()

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

        def one(call: _Call) -> Any:
            call.began = time.monotonic()
            try:
                return self._loop.awaited(call.function())
            except BaseException as error:  # an exit, too, ends this call and not the thread
                raise failed(call.place, error) from error
            finally:
                call.ended = True

        calls = [_Call(*each) for each in enumerate(functions)]
        with self._lock:
            threads = self._threads = self._threads or ThreadPool(self._workers)
        results = threads.map_async(one, calls, chunksize=1)
        while not results.ready():
            now = time.monotonic()
            running = {call.place: began for call in calls if (began := call.runs_since()) is not None}
            late = [place for place, began in running.items() if now - began >= self._timeout_s]
            if late or (not running and self._threads is not threads):
                self._leave(threads)
                raise OverdueError(late)
            results.wait(min(running.values(), default=now) + self._timeout_s - now)
        return results.get()

    def close(self) -> None:
        """Lets the threads and the loop go; twice is harmless."""
        if self._threads is not None:
            self._leave(self._threads)
        self._loop.close()

    def _leave(self, threads: ThreadPool) -> None:
        """Later calls get new threads."""
        with self._lock:
            if self._threads is threads:
                self._threads = None
        threads.close()


class _Loop:
    """An event loop in a thread of its own, which begins with the first awaitable."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def awaited(self, result: Any) -> Any:
        """What a call gave in the end."""
        if not inspect.isawaitable(result):
            return result
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
                self._thread.start()
            loop = self._loop
        return asyncio.run_coroutine_threadsafe(_wait(result), loop).result()

    def close(self) -> None:
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is None:
            return
        assert self._thread is not None
        with suppress(NotYet):
            asyncio.run_coroutine_threadsafe(_cancel_others(), loop).result(_CLOSING_S)
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join(_CLOSING_S)
        if not self._thread.is_alive():  # else something in it does not wait, but blocks
            loop.close()


async def _wait(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
