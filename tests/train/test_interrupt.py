from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from grpo_fast.train.interrupt import InterruptFlag

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


@pytest.fixture(autouse=True)
def _in_a_terminal() -> Iterator[None]:
    """Tests may be run by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes_asks_for_an_end_and_never_hastens_it() -> None:
    for first, name in ((signal.SIGHUP, "SIGHUP"), (signal.SIGTERM, "SIGTERM")):
        with InterruptFlag() as flag:
            for number in (first, signal.SIGHUP):
                os.kill(os.getpid(), number)
                time.sleep(0.001)
            assert flag.name == name
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with InterruptFlag() as flag:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.001)
        assert not flag
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@SIGNALS
def test_first_signal_is_remembered_by_name(number: signal.Signals) -> None:
    with InterruptFlag() as flag:
        assert not flag
        os.kill(os.getpid(), number)
        time.sleep(0.001)
        assert flag
        assert flag.name == number.name


@SIGNALS
def test_second_signal_ends_at_once(number: signal.Signals) -> None:
    with InterruptFlag() as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.001)
        assert flag
        with pytest.raises(KeyboardInterrupt) as raised:  # noqa: PT012 (the signal arrives on its own time)
            os.kill(os.getpid(), number)
            time.sleep(5)
    assert raised.value.signal == signal.SIGTERM, "the first"  # type: ignore[attr-defined]
    assert str(raised.value) == "a second signal came after SIGTERM; the newest checkpoint holds"


def test_handlers_are_put_back_and_the_flag_starts_anew() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    flag = InterruptFlag()
    with flag:
        assert signal.getsignal(signal.SIGTERM) != before[1]
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.001)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert flag
    with flag:
        assert not flag
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_handlers_are_put_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)

    def fail() -> None:
        with InterruptFlag():
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert signal.getsignal(signal.SIGINT) == before


def test_outside_the_main_thread_signals_keep_their_meaning() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def enter() -> None:
        with InterruptFlag() as flag:
            seen.extend([bool(flag), signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False, before]


@pytest.mark.parametrize(("number", "again"), [(signal.SIGINT, "Ctrl-C again"), (signal.SIGTERM, "a second signal")])
def test_the_first_signal_is_answered_at_once(number: signal.Signals, again: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with InterruptFlag(), InterruptFlag(tells=False):
        pass
    assert "tells of a signal" not in {thread.name for thread in threading.enumerate()}
    reading, writing = os.pipe()  # what pytest captures cannot be read while another thread writes
    with os.fdopen(reading, encoding="utf-8") as told:
        with os.fdopen(writing, "w", encoding="utf-8") as stderr, InterruptFlag() as flag:
            monkeypatch.setattr(sys, "stderr", stderr)
            os.kill(os.getpid(), number)
            assert select.select([told], [], [], 20)[0], "no answer"
            line = told.readline()
            assert flag
        assert line == (
            f"{number.name} received: what is under way is finished and saved first; {again} ends the run at once, unsaved\n"
        )
        assert told.read() == ""
    assert not any(thread.name == "tells of a signal" for thread in threading.enumerate())


def test_a_process_that_does_not_answer_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with InterruptFlag(tells=False) as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.001)
        assert flag
    assert capfd.readouterr().err == ""


def test_a_handler_of_another_language_stays() -> None:
    code = """
import ctypes, os, signal, sys
seen = []
handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(seen.append)
ctypes.CDLL(None).signal(int(signal.SIGTERM), handler)
del sys.modules["_signal"]
import _signal  # learns of handlers as a Python does that a program of another language has begun
from grpo_fast.train.interrupt import InterruptFlag
with InterruptFlag() as flag:
    os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
print(seen, flag.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[15, 15] \n"
    assert "SIGTERM does not save the run: its handler is not Python's and could not be put back; use another of" in done.stderr
