"""A question to whoever sits at the terminal, with a deadline: an unattended run must not wait for ever."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterable
from typing import TextIO

TIMEOUT_S = 600.0
"""Seconds for which a question waits for its answer."""
_POLL_S = 0.2
_LINE_BYTES = 4096


def can_answer(stdin: TextIO | None) -> bool:
    """Whether a person can type there: a terminal, on a system that can wait for one with a deadline."""
    return os.name == "posix" and stdin is not None and not stdin.closed and stdin.isatty()


def forget_typed(stdin: TextIO) -> None:
    """Drops what was typed so far: it is no answer to a question that comes after it."""
    import termios  # noqa: PLC0415 (POSIX only, like the question)

    termios.tcflush(stdin.fileno(), termios.TCIFLUSH)


def read_answer(
    stdin: TextIO,
    answers: Iterable[str],
    *,
    say: Callable[[str], None],
    give_up: Callable[[], bool] = lambda: False,
    timeout_s: float = TIMEOUT_S,
) -> str:
    """Reads lines until one is an answer, or its beginning where no other begins so.

    Args:
        stdin: a terminal.
        answers: what can be said.
        say: called with a hint after a line that is no answer.
        give_up: asked five times a second; True ends the waiting.
        timeout_s: seconds after which no answer is expected any more.

    Returns:
        The answer in full; empty where none came.
    """
    known = list(answers)
    deadline = time.monotonic() + timeout_s
    while not give_up() and time.monotonic() < deadline:
        if not select.select([stdin], [], [], _POLL_S)[0]:
            continue
        line = os.read(stdin.fileno(), _LINE_BYTES)
        if not line:  # the terminal is gone
            break
        said = line.decode("utf-8", "replace").strip().lower()
        meant = [answer for answer in known if said and answer.startswith(said)]
        if len(meant) == 1:
            return meant[0]
        say(f"please type {', '.join(known[:-1])} or {known[-1]}")
    return ""
