"""Ctrl-C, SIGTERM and a terminal that closes: the first asks the run to save and end, the second ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class EndedAtOnceError(KeyboardInterrupt):
    """A second signal; :attr:`signal` is the first, which asked for the end."""

    def __init__(self, first: signal.Signals) -> None:
        super().__init__(f"a second signal came after {first.name}; the newest checkpoint holds")
        self.signal = first


class InterruptFlag:
    """Remembers that the user, or a scheduler, asked the process to end; active inside a ``with`` block.

    Signal handlers belong to the main thread, so elsewhere this does nothing and signals keep their usual meaning.
    """

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        """Whether a signal has come."""
        return bool(self.name)

    def __enter__(self) -> Self:
        self.name = ""
        if threading.current_thread() is threading.main_thread():
            kept = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # by nohup
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS if number not in kept}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGHUP:  # no sign of haste: a shell sends it too, and a logout after SIGTERM
            return
        if self.name:
            raise EndedAtOnceError(signal.Signals[self.name])
        self.name = signal.Signals(number).name
