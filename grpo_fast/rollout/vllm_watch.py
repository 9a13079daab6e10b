"""The processes of an engine that this one started: whether they run, and an end for those that no longer answer.

vLLM (0.32) waits for an answer for ever, whether the process that owes it has died or only hangs. So one that hangs is killed
at a deadline, with those that it started, and whoever waits for one that has died is told so. Nothing here imports vLLM.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import InvalidStateError
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import psutil

from grpo_fast.rollout.engine import RolloutError

Setting = Literal["request_deadline_s", "sync_deadline_s"]
_LOOK_S = 1.0
LATER = 1.1
"""Times a sync's deadline is that of the calls in it: the sync's own, which names the phase, comes first."""


class ProcessWatch:
    """Ends what hangs in the processes of one engine, and wakes who waits for them when one has ended.

    Args:
        processes: of the engine, when all of its own have started; where there are none it runs in this process, and nothing is
            watched.
        core: vLLM's client of them.
        deadlines: longest times that one answer may take, in seconds, by the setting that says so.
    """

    def __init__(self, processes: Collection[BaseProcess], core: Any, deadlines: Mapping[Setting, float]) -> None:
        self._processes = list(processes)
        roots = [psutil.Process(process.pid) for process in self._processes]
        self._tree = [each for root in roots for each in (root, *root.children(recursive=True))]
        self._core = core
        self._deadlines = deadlines
        self._look_s = min(_LOOK_S, min(deadlines.values()) / 20)
        self._looks = 0
        self._waits: dict[object, tuple[int, Setting]] = {}
        """Of each answer that is waited for: at which look that began, and which deadline it has."""
        self._cause = "has ended"
        if self._processes:
            threading.Thread(target=self._watch, name="vLLM process watch", daemon=True).start()

    def __bool__(self) -> bool:
        """Whether there are processes to watch."""
        return bool(self._processes)

    def is_alive(self) -> bool:
        """Whether every process of the engine runs."""
        # not by their ``is_alive``, which errs where another thread asks for the exit code at that moment, as vLLM's does
        return not self._processes or not wait(self._sentinels(), timeout=0)

    def check(self) -> None:
        """Raises where a process has ended.

        Raises:
            RolloutError: one has; the cause is told.
        """
        if not self.is_alive():
            raise RolloutError(f"the engine's process {self._cause}")

    @contextlib.contextmanager
    def waiting(self, setting: Setting) -> Iterator[None]:
        """Has the engine's processes killed where what is inside waits for longer than the deadline of ``setting``.

        Raises:
            RolloutError: a process has ended, before or inside.
        """
        self.check()
        this = object()
        self._waits[this] = self._looks, setting
        try:
            yield
        except Exception:
            self.check()  # vLLM's own error does not know why
            raise
        finally:
            del self._waits[this]

    def kill(self, cause: str) -> None:
        """Kills the engine's processes and their own: a worker that hangs would stay.

        Args:
            cause: what the process did or what became of it, for whoever waits or asks later.
        """
        self._cause = cause
        for process in self._tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _sentinels(self) -> list[int]:
        return [process.sentinel for process in self._processes]

    def _watch(self) -> None:
        """Runs until a process has ended."""
        while not wait(self._sentinels(), timeout=self._look_s):
            self._looks += 1
            if late := self._find_late():
                self.kill(f"did not answer within {self._deadlines[late]:g} s ({late}) and was killed")
                wait(self._sentinels())
        self.kill(self._cause)
        core = self._core
        core.outputs_queue.put_nowait(EOFError("the engine's process has ended"))
        while not core.resources.engine_dead:  # until vLLM has seen it too, it lets more calls wait
            time.sleep(0.01)
        for call in list(core.utility_results.values()):
            with contextlib.suppress(InvalidStateError):
                call.set_exception(EOFError("the engine's process has ended"))

    def _find_late(self) -> Setting | None:
        """The deadline that was missed. Time is counted in looks, so that while this process itself is stopped it stands."""
        for begun, setting in list(self._waits.values()):
            allowed_s = self._deadlines[setting] * (LATER if setting == "sync_deadline_s" else 1)
            if (self._looks - begun) * self._look_s > allowed_s:
                return setting
        return None
