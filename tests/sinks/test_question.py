"""Questions on a real terminal: what is an answer, and when to stop waiting for one."""

from __future__ import annotations

import io
import os
import pty
import select
import threading
import time
from collections.abc import Iterator
from typing import TextIO

import pytest

from grpo_fast.sinks.question import can_answer, forget_typed, read_answer

ANSWERS = ("stop", "go on", "never")


@pytest.fixture
def terminal() -> Iterator[tuple[int, TextIO]]:
    """What a person types on, and what the program reads."""
    person, program = pty.openpty()
    with os.fdopen(program, "r", encoding="utf-8", closefd=True) as stdin:
        yield person, stdin
    os.close(person)


def soon(person: int, *lines: str) -> None:
    def write() -> None:
        for line in lines:
            time.sleep(0.1)
            os.write(person, f"{line}\n".encode())

    threading.Thread(target=write, daemon=True).start()


@pytest.mark.parametrize(("typed", "meant"), [("stop", "stop"), (" GO ON ", "go on"), ("n", "never"), ("s", "stop")])
def test_an_answer_or_its_beginning(typed: str, meant: str, terminal: tuple[int, TextIO]) -> None:
    soon(terminal[0], typed)
    assert read_answer(terminal[1], ANSWERS, say=pytest.fail) == meant


def test_anything_else_is_asked_again(terminal: tuple[int, TextIO]) -> None:
    hints: list[str] = []
    soon(terminal[0], "", "what?", "go")
    assert read_answer(terminal[1], ANSWERS, say=hints.append) == "go on"
    assert hints == ["please type stop, go on or never"] * 2


def test_what_was_typed_before_is_no_answer(terminal: tuple[int, TextIO]) -> None:
    os.write(terminal[0], b"stop\n")
    assert select.select([terminal[1]], [], [], 60)[0], "what is typed takes its time to arrive"
    forget_typed(terminal[1])
    soon(terminal[0], "never")
    assert read_answer(terminal[1], ANSWERS, say=pytest.fail) == "never"


def test_waiting_ends(terminal: tuple[int, TextIO]) -> None:
    begin = time.monotonic()
    assert read_answer(terminal[1], ANSWERS, say=pytest.fail, timeout_s=0.3) == ""
    assert 0.2 < time.monotonic() - begin < 60
    asked = iter([False, True])
    assert read_answer(terminal[1], ANSWERS, say=pytest.fail, give_up=lambda: next(asked)) == ""


def test_only_a_terminal_has_somebody_to_ask(terminal: tuple[int, TextIO]) -> None:
    assert can_answer(terminal[1])
    assert not can_answer(io.StringIO("stop\n"))
    assert not can_answer(None)
    closed = io.StringIO()
    closed.close()
    assert not can_answer(closed)
