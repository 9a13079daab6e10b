"""Ctrl-C, SIGTERM and a terminal that closes: the first asks the run to save and end, the second ends it at once."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Any, Self

_log = logging.getLogger(__name__)
_LAST_WORDS_S = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class EndedAtOnceError(KeyboardInterrupt):
    """A second signal; :attr:`signal` is the first, which asked for the end."""

    def __init__(self, first: signal.Signals) -> None:
        super().__init__(f"a second signal came after {first.name}; the newest checkpoint holds")
        self.signal = first


class InterruptFlag:
    """Remembers that the user, or a scheduler, asked the process to end; active inside a ``with`` block.

    The first signal is answered on standard error at once, as what is under way may take minutes: by a thread that waits for
    it, because a handler may have come in the middle of a write.

    Signal handlers belong to the main thread, so elsewhere this does nothing and signals keep their usual meaning. So does one
    whose handler is not Python's, and could not be put back.

    Args:
        tells: whether this process answers; of several in one terminal, one is enough.
    """

    def __init__(self, *, tells: bool = True) -> None:
        self.name = ""
        self._tells = tells
        self._previous: dict[signal.Signals, Any] = {}
        self._told: SimpleQueue[str] = SimpleQueue()
        self._teller: threading.Thread | None = None

    def __bool__(self) -> bool:
        """Whether a signal has come."""
        return bool(self.name)

    def __enter__(self) -> Self:
        self.name = ""
        if threading.current_thread() is not threading.main_thread():
            return self
        if self._tells:
            self._teller = threading.Thread(target=self._tell, name="tells of a signal", daemon=True)
            self._teller.start()
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler is None:
                if self._tells:
                    _log.warning(
                        "%s does not save the run: its handler is not Python's and could not be put back; use another of %s",
                        number.name,
                        ", ".join(other.name for other in _SIGNALS if other != number),
                    )
            elif (number, handler) != (signal.SIGHUP, signal.SIG_IGN):  # as nohup has it
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if self._teller is not None:
            self._told.put("")
            self._teller.join(_LAST_WORDS_S)  # and no longer: whoever reads standard error may have stopped
            self._teller = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGHUP:  # no sign of haste: a shell sends it too, and a logout after SIGTERM
            return
        if self.name:
            raise EndedAtOnceError(signal.Signals[self.name])
        self.name = signal.Signals(number).name
        self._told.put(self.name)  # safe in a handler

    def _tell(self) -> None:
        while name := self._told.get():
            again = "Ctrl-C again" if name == "SIGINT" else "a second signal"
            told = f"{name} received: what is under way is finished and saved first; {again} ends the run at once, unsaved"
            with contextlib.suppress(OSError, ValueError):  # the terminal may be the one that closed
                print(told, file=sys.stderr, flush=True)
