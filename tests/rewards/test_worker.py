from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from grpo_fast.rewards.process import WorkerProcess
from grpo_fast.rewards.worker import HEADER, Reply, pack
from grpo_fast.types import Scored, TrainerState


def serve(specs: list[str | bytes], *requests: tuple[list[int], float, dict[str, Any]]) -> list[Reply]:
    """Every reply of a worker that is sent all requests, then the end."""
    worker = WorkerProcess(dict(enumerate(specs)))
    waiting = list(requests)
    replies: list[Reply] = []
    try:
        worker.channel.settimeout(60)
        while True:
            replies += worker.receive()
            if worker.state != "idle":
                continue
            if not waiting or replies[0].status != "ok":
                return replies
            functions, timeout_s, arguments = waiting.pop(0)
            worker.submit(functions, pickle.dumps(arguments | {"trainer_state": TrainerState()}), timeout_s=timeout_s)
    finally:
        worker.close()


def test_names_and_pickled_functions_are_served() -> None:
    double = cloudpickle.dumps(lambda completions: [2.0 * len(text) for text in completions])
    arguments = {"completions": ["\\boxed{18}", "no"], "answer": ["18", "18"]}
    replies = serve(["accuracy", double], ([0], 60.0, arguments), ([1], 60.0, arguments))
    assert replies == [
        Reply("ok", {0: False, 1: False}),
        Reply("ok", Scored([1.0, 0.0]), function=0),
        Reply("ok", Scored([20.0, 4.0]), function=1),
    ]


def test_a_failed_call_is_reported_and_the_next_one_served() -> None:
    def breaks(completions: list[str]) -> list[float]:
        if completions == ["exit"]:
            sys.exit("enough")
        return [1.0 / len(text) for text in completions]

    replies = serve(
        [cloudpickle.dumps(breaks)],
        ([0], 60.0, {"completions": [""]}),
        ([0], 60.0, {"completions": ["exit"]}),
        ([0], 60.0, {"completions": ["ok"]}),
    )
    assert [reply.status for reply in replies] == ["ok", "error", "error", "ok"]
    assert replies[1].value.startswith("raised ZeroDivisionError: ")
    assert "Traceback" in replies[1].trace
    assert replies[2].value.startswith("raised SystemExit: enough")
    assert replies[3].value == Scored([0.5])


def test_async_functions_are_awaited_together_and_answered_as_they_end() -> None:
    async def first(completions: list[str], log_metric: Any) -> list[float]:
        import builtins

        meeting = builtins.__dict__.setdefault("meeting", asyncio.Event())  # whichever of the two comes first
        await meeting.wait()
        log_metric("met", 1.0)
        return [1.0]

    async def second(completions: list[str]) -> list[float]:
        import builtins

        builtins.__dict__.setdefault("meeting", asyncio.Event()).set()
        raise LookupError("met, but no answer")

    async def third(completions: list[str]) -> list[float]:
        raise SystemExit("enough")

    specs: list[str | bytes] = [cloudpickle.dumps(function) for function in (first, second, third)]
    loaded, *replies = serve([*specs, "format"], ([0, 1, 2], 60.0, {"completions": ["a"]}), ([0], 60.0, {"completions": ["a"]}))
    assert loaded.value == {0: True, 1: True, 2: True, 3: False}
    told = {reply.function: reply for reply in replies[:3]}
    assert told[0] == Reply("ok", Scored([1.0], {"met": [1.0]}), function=0)
    assert told[1].value.startswith("raised LookupError: met, but no answer (")
    assert "Traceback" in told[1].trace
    assert told[2].value.startswith("raised SystemExit: enough")
    assert [reply.function for reply in replies] == [1, 2, 0, 0], "each as it ended; then the worker goes on"


def test_arguments_that_cannot_be_read_are_reported_for_each_function() -> None:
    class Local:
        def __reduce__(self) -> Any:
            return exec, ("raise LookupError('not here')",)

    async def one() -> list[float]:
        return [1.0]

    replies = serve([cloudpickle.dumps(one)] * 2, ([0, 1], 60.0, {"column": [Local()]}))
    assert [(reply.status, reply.function) for reply in replies[1:]] == [("error", 0), ("error", 1)]
    assert replies[1].value.startswith("raised LookupError: not here")


def test_a_function_that_cannot_be_found_or_loaded_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [(status, message, *_)] = serve(["absent_module:f"])
    assert status == "error"
    assert "cannot import 'absent_module'" in message
    (tmp_path / "gone_for_worker.py").write_text("def f(completions):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    import gone_for_worker  # type: ignore[import-not-found]

    frozen = cloudpickle.dumps(gone_for_worker.f)
    monkeypatch.undo()
    [(status, message, *_)] = serve([frozen])
    assert status == "error"
    assert "ModuleNotFoundError" in message
    assert "'module:function'" in message


def test_no_request_is_an_end() -> None:
    worker = WorkerProcess({0: "format"})
    worker.channel.shutdown(socket.SHUT_WR)
    assert worker._process.wait(timeout=60) == 0
    worker.kill()


def test_a_worker_ignores_interrupts_and_imports_no_torch() -> None:
    def probe(completions: list[str]) -> list[float]:
        import signal
        import sys

        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return [float(ignored), float("torch" in sys.modules), float("numpy" in sys.modules)]

    assert serve([cloudpickle.dumps(probe)], ([0], 60.0, {"completions": ["", "", ""]}))[1].value == Scored([1.0, 0.0, 0.0])


def test_output_of_reward_functions(tmp_path: Path) -> None:
    script = tmp_path / "noisy_main.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from grpo_fast.rewards import RewardPool
            from grpo_fast.types import Completion, Group, Prompt

            def noisy(completions):
                print("printed")
                print("warned", file=sys.stderr)
                return [1.0]

            group = Group(Prompt(0, "p", (1,)), [Completion((1,), (0.0,), "stop", "x")])
            with RewardPool([noisy]) as pool:
                pool.score([group])
            print(group.reward)
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[1.0]\n"
    assert sorted(done.stderr) == sorted("printed\nwarned\n"), "the two may be mixed: each has its own way to the terminal"
    assert "printed\n" in done.stderr


_PARENT = """
import sys, threading, time
from pathlib import Path
from grpo_fast.rewards import RewardPool
from grpo_fast.types import Completion, Group, Prompt

started = Path(sys.argv[2])

def idle(completions):
    return [1.0]

def sleeps(completions):
    started.touch()
    time.sleep(600)

def spins_in_c(completions):
    import re
    started.touch()
    re.match(r"(a+)+$", "a" * 60 + "b")

group = Group(Prompt(0, "p", (1,)), [Completion((1,), (0.0,), "stop", "x")])
pool = RewardPool([globals()[sys.argv[1]]], timeout_s=float(sys.argv[3]))
pool.start()
print(*pool.process_ids, flush=True)
pool.score([group])
started.touch()
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("function", "timeout_s", "limit_s"),
    [("idle", 600, 60), ("sleeps", 600, 60), pytest.param("spins_in_c", 2, 60, marks=pytest.mark.slow)],
)
def test_no_worker_outlives_a_killed_parent(function: str, timeout_s: float, limit_s: float, tmp_path: Path) -> None:
    script, started = tmp_path / "parent_main.py", tmp_path / "started"
    script.write_text(_PARENT)
    with subprocess.Popen(
        [sys.executable, str(script), function, str(started), str(timeout_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        worker_id = int(parent.stdout.readline())
        _until(started.exists, 60)
        assert _runs(worker_id)
        os.kill(parent.pid, signal.SIGKILL)
    _until(lambda: not _runs(worker_id), limit_s)


def test_what_a_function_started_goes_with_an_idle_worker_whose_pool_is_dropped() -> None:
    def starts(completions: list[str]) -> list[float]:
        import subprocess

        return [float(subprocess.Popen(["sleep", "600"]).pid)]

    worker = WorkerProcess({0: cloudpickle.dumps(starts)})
    try:
        worker.receive()
        arguments = {"completions": ["a"], "trainer_state": TrainerState()}
        worker.submit([0], pickle.dumps(arguments), timeout_s=60)
        [reply] = worker.receive()
        started = int(reply.value.values[0])
        assert _runs(started)
        worker.channel.close()  # as the end of a script does that never calls close()
        _until(lambda: not _runs(worker.process_id) and not _runs(started), 60)
    finally:
        worker.kill()
    assert worker._process.returncode == 0, "the worker has ended in order"


def _until(condition: Any, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)


def _runs(process_id: int) -> bool:
    try:
        return (Path("/proc") / str(process_id) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_frames_are_length_prefixed() -> None:
    assert pack(b"abc") == HEADER.pack(3) + b"abc"
