from __future__ import annotations

import io
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from rich.console import Console
from rich.live import Live

from grpo_fast.rewards import process as process_module
from grpo_fast.rewards.process import WorkerDiedError, WorkerProcess
from grpo_fast.rewards.worker import Reply
from grpo_fast.types import Scored, TrainerState


def alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def answer(worker: WorkerProcess, *, within_s: float = 60.0) -> Reply:
    worker.channel.settimeout(within_s)
    while not (replies := worker.receive()):
        pass
    [reply] = replies
    return reply


def ready(function: Any) -> WorkerProcess:
    worker = WorkerProcess({0: cloudpickle.dumps(function)})
    assert answer(worker)[0] == "ok"
    return worker


def submit(worker: WorkerProcess, timeout_s: float = 60.0, **arguments: Any) -> None:
    given = (arguments or {"completions": ["a"]}) | {"trainer_state": TrainerState()}
    worker.submit([0], pickle.dumps(given), timeout_s=timeout_s)


@pytest.fixture
def by_length() -> Iterator[WorkerProcess]:
    worker = ready(lambda completions: [float(len(text)) for text in completions])
    yield worker
    worker.kill()


def test_a_worker_answers_call_after_call(by_length: WorkerProcess) -> None:
    for _ in range(2):
        submit(by_length, completions=["a", "bb"])
        assert by_length.state == "busy"
        assert answer(by_length) == Reply("ok", Scored([1.0, 2.0]), function=0)
        assert by_length.state == "idle"


def test_answers_that_arrive_together_or_in_pieces_are_told_apart() -> None:
    async def same(completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    worker = WorkerProcess(dict.fromkeys(range(3), cloudpickle.dumps(same)))
    assert answer(worker).value == {0: True, 1: True, 2: True}
    arguments = {"completions": ["abc"] * 200_000, "trainer_state": TrainerState()}  # more than one read, and no end of one
    worker.submit([2, 0, 1], pickle.dumps(arguments), timeout_s=60.0)
    found: list[Reply] = []
    while worker.state == "busy":
        worker.channel.settimeout(60.0)
        found += worker.receive()
    worker.kill()
    assert sorted(reply.function for reply in found) == [0, 1, 2]
    assert all(reply.value == Scored([3.0] * 200_000) for reply in found)


def test_a_large_batch_passes(by_length: WorkerProcess) -> None:
    size = 3_000_000
    submit(by_length, completions=["a" * size] + [""] * 200_000)
    reply = answer(by_length)
    assert reply.status == "ok"
    assert reply.value.values[0] == size
    assert len(reply.value.values) == 200_001


def test_close_lets_the_process_end_by_itself(by_length: WorkerProcess) -> None:
    by_length.close()
    assert by_length._process.returncode == 0
    assert not alive(by_length.process_id)
    by_length.close()
    by_length.kill()


def test_close_kills_a_busy_worker_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "_GRACE_S", 60.0)

    def hangs() -> None:
        time.sleep(600)

    worker = ready(hangs)
    submit(worker)
    start = time.monotonic()
    worker.close()
    assert time.monotonic() - start < 30
    assert worker._process.returncode == -signal.SIGKILL


def test_what_a_function_prints_is_passed_on_at_once_and_stands_above_a_live_console(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def prints(completions: list[str]) -> list[float]:
        print("seen:", completions[0])
        os.write(1, b"\xff not text\n")
        return [0.0]

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    worker = ready(prints)
    with Live("the panel", console=Console(file=screen, force_terminal=True), auto_refresh=False):
        submit(worker, completions=["a b"])
        assert answer(worker)[:2] == ("ok", Scored([0.0]))
        end = time.monotonic() + 60
        while "not text" not in screen.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
        assert worker.state == "idle"
        shown = screen.getvalue()
    assert "seen: a b\n" in shown
    assert "\\xff not text\n" in shown
    assert shown.rindex("the panel") > shown.rindex("not text"), "it is drawn anew below"
    worker.kill()
    assert not worker._printed.is_alive()


def test_kill_takes_what_the_function_started_along() -> None:
    def starts_another(completions: list[str]) -> list[float]:
        import subprocess

        return [float(subprocess.Popen(["sleep", "600"]).pid)]

    worker = ready(starts_another)
    submit(worker)
    child = int(answer(worker).value.values[0])
    assert alive(child)
    worker.kill()
    end = time.monotonic() + 60
    while _runs(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _runs(child)


def _runs(process_id: int) -> bool:
    """Alive and not a zombie that nobody waits for (a container's first process may not)."""
    try:
        return (Path("/proc") / str(process_id) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("code", "message"), [(3, "exit code 3"), (0, "exit code 0")])
def test_an_exit_is_noticed_at_once(code: int, message: str) -> None:
    worker = ready(lambda: os._exit(code))
    submit(worker)
    start = time.monotonic()
    with pytest.raises(WorkerDiedError, match=message):
        answer(worker)
    assert time.monotonic() - start < 50


@pytest.mark.parametrize(("number", "message"), [(signal.SIGSEGV, "by SIGSEGV"), (signal.SIGKILL, "SIGKILL.*memory runs out")])
def test_a_death_by_signal_is_named(number: int, message: str) -> None:
    worker = ready(lambda: os.kill(os.getpid(), number))
    submit(worker)
    with pytest.raises(WorkerDiedError, match=message):
        answer(worker)


def test_a_worker_that_died_between_calls_cannot_be_given_one(by_length: WorkerProcess) -> None:
    os.kill(by_length.process_id, signal.SIGKILL)
    os.waitid(os.P_PID, by_length.process_id, os.WEXITED | os.WNOWAIT)
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        submit(by_length)


def test_a_worker_that_died_before_it_read_its_call(by_length: WorkerProcess) -> None:
    os.kill(by_length.process_id, signal.SIGSTOP)
    submit(by_length)
    os.kill(by_length.process_id, signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        answer(by_length)


def test_a_worker_that_does_not_read_cannot_block_its_parent(by_length: WorkerProcess) -> None:
    os.kill(by_length.process_id, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        submit(by_length, timeout_s=0.3, completions=["a" * 10_000_000])
    assert time.monotonic() - start < 20
