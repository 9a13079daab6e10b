"""One event loop for the async code that users bring, in a thread of its own, kept from one call to the next."""

from __future__ import annotations

import asyncio
import inspect
import logging
import selectors
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
_CLOSING_S = 2.0
_ANSWER_S = 1.0
_NUM_THREADS = 32
_FRAMEWORK = (str(Path(asyncio.__file__).parent), threading.__file__, __file__)


class AsyncCode:
    """A loop for async code: clients and locks that it keeps are bound to theirs.

    Any number of threads may wait for it at a time, those too in which a loop of their own runs, as notebooks have one. The
    thread begins with the first awaitable. It is a daemon, and so are those of ``asyncio.to_thread``: what hangs in them does
    not keep the process. Code that blocks the loop while other code waits in it is told once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._told = False

    def awaited(self, result: Any) -> Any:
        """What a call gave in the end: an awaitable is waited for, and what it raises, an exit too, is raised here."""
        if not inspect.isawaitable(result):
            return result
        waiting = asyncio.run_coroutine_threadsafe(_outcome(result), self._running())
        try:
            value, error = self._result(waiting)
        except BaseException:  # as Ctrl-C: no one waits for it any more
            waiting.cancel()
            raise
        if error is not None:
            raise error
        return value

    def together(self, awaitables: Sequence[Awaitable[None]]) -> None:
        """Waits for several at once; where one raises, the others are cancelled and its exception is raised."""
        if awaitables:
            self.awaited(awaitables[0] if len(awaitables) == 1 else _gather(awaitables))

    def blocked_at(self) -> str:
        """Which line of whose code keeps the loop from going on with anything else; empty where it is free."""
        with self._lock:
            loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return ""
        answered = threading.Event()
        loop.call_soon_threadsafe(answered.set)
        frame = None if answered.wait(_ANSWER_S) else sys._current_frames().get(thread.ident or 0)
        if frame is None or frame.f_code.co_filename == selectors.__file__:  # where a free loop waits
            return ""
        stack = traceback.extract_stack(frame)
        at = next((each for each in stack if not each.filename.startswith(_FRAMEWORK)), stack[-1])
        return f"{at.filename}:{at.lineno}, in {at.name}: {at.line}"

    def _result(self, waiting: Future[Any]) -> Any:
        """What is waited for; meanwhile the loop is watched."""
        while not self._told:
            with suppress(NotYet):
                return waiting.result(_ANSWER_S)
            self._tell_blocked()
        return waiting.result()

    def _tell_blocked(self) -> None:
        with self._lock:
            loop = self._loop
        at = self.blocked_at() if loop is not None and len(asyncio.all_tasks(loop)) > 1 else ""
        with self._lock:
            told, self._told = self._told, self._told or bool(at)
        if at and not told:
            _log.warning(
                "async code blocks its event loop at %s: whatever else is awaited there waits for it; await what takes long, "
                "or hand it to asyncio.to_thread",
                at,
            )

    def close(self) -> None:
        """Cancels what still runs and ends the loop; calling it twice is harmless."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is None:
            return
        assert self._thread is not None
        with suppress(NotYet):
            asyncio.run_coroutine_threadsafe(_end_others(), loop).result(_CLOSING_S)
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join(_CLOSING_S)
        if not self._thread.is_alive():  # else something in it does not wait, but blocks
            loop.close()

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._loop.set_default_executor(_Daemons())
                self._thread = threading.Thread(target=_run, args=(self._loop,), name="async code", daemon=True)
                self._thread.start()
            return self._loop


class _Daemons(ThreadPoolExecutor):
    """Runs calls in threads that Python does not wait for when it ends, as it does for those of its own executors."""

    def __init__(self) -> None:
        super().__init__(max_workers=1)  # which are never started
        self._free = threading.BoundedSemaphore(_NUM_THREADS)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            with self._free:
                if not future.set_running_or_notify_cancel():
                    return
                try:
                    result = fn(*args, **kwargs)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)

        threading.Thread(target=run, daemon=True).start()
        return future


def _run(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        try:
            return loop.run_forever()
        except (SystemExit, KeyboardInterrupt):  # of a task that users' code began: told where that is awaited
            continue


async def _outcome(awaitable: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """What it gave, or raised: an exit that left the loop's own task would end the loop."""
    try:
        return await awaitable, None
    except BaseException as error:
        return None, error


async def _gather(awaitables: Sequence[Awaitable[None]]) -> None:
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _end_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
