"""The watch over real processes that stop or end, then over those of an engine, in a run."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from grpo_fast import Config, GRPOTrainer
from grpo_fast.rollout import RolloutError, WeightSyncError
from grpo_fast.rollout.vllm_watch import ProcessWatch


def engine_process(ready: Any) -> None:
    """Starts a worker, and hangs."""
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    ready.send(worker.pid)
    time.sleep(100)


class Started:
    """A process with one of its own, and as much of vLLM's client of it as the watch sees."""

    def __init__(self, **deadlines: float) -> None:
        spawn = multiprocessing.get_context("spawn")
        receive, send = spawn.Pipe(duplex=False)
        self.process = spawn.Process(target=engine_process, args=(send,))
        self.process.start()
        self.worker = psutil.Process(receive.recv())
        self.call: Future[None] = Future()
        self.core = SimpleNamespace(
            outputs_queue=queue.Queue(), resources=SimpleNamespace(engine_dead=True), utility_results={1: self.call}
        )
        self.watch = ProcessWatch([self.process], self.core, {"request_deadline_s": 50.0, "sync_deadline_s": 50.0} | deadlines)

    def has_ended(self) -> bool:
        self.process.join(10)
        return self.process.exitcode is not None and ended(self.worker)


def ended(process: psutil.Process) -> bool:
    """Also where nobody has collected it."""
    for _ in range(200):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def start() -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def build(**deadlines: float) -> Started:
        started.append(Started(**deadlines))
        return started[-1]

    yield build
    for each in started:
        each.watch.kill("is not needed any more")
        each.process.join()


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "told"), [("request_deadline_s", "0.5"), ("sync_deadline_s", "0.5")])
def test_what_hangs_is_killed_with_its_own_and_the_deadline_is_named(
    setting: Any, told: str, start: Callable[..., Started]
) -> None:
    engine = start(**{setting: 0.5})
    assert engine.watch.is_alive()
    message = rf"^the engine's process did not answer within {told} s \({setting}\) and was killed$"
    with pytest.raises(RolloutError, match=message) as caught, engine.watch.waiting(setting):
        raise engine.core.outputs_queue.get(timeout=10)
    assert isinstance(caught.value.__context__, EOFError), "what woke the one that waited"
    assert isinstance(engine.call.exception(10), EOFError), "other calls are woken too"
    assert engine.has_ended()
    with pytest.raises(RolloutError, match=message), engine.watch.waiting("sync_deadline_s"):
        pytest.fail("nothing is asked of a process that has ended")


@pytest.mark.slow
def test_what_is_answered_in_time_is_left_alone_and_its_errors_are_its_own(start: Callable[..., Started]) -> None:
    engine = start(request_deadline_s=2.0)
    for _ in range(6):
        with engine.watch.waiting("request_deadline_s"):
            time.sleep(0.4)
    time.sleep(2.2)  # nobody waits
    with engine.watch.waiting("sync_deadline_s"):
        time.sleep(2.2)
    with pytest.raises(KeyError, match="its own"), engine.watch.waiting("request_deadline_s"):
        raise KeyError("its own")
    assert engine.watch.is_alive()


@pytest.mark.slow
def test_a_process_that_dies_leaves_no_worker_and_nobody_waiting(start: Callable[..., Started]) -> None:
    engine = start()
    engine.worker.suspend()
    engine.process.kill()
    with pytest.raises(RolloutError, match="the engine's process has ended"), engine.watch.waiting("request_deadline_s"):
        raise engine.core.outputs_queue.get(timeout=10)
    assert isinstance(engine.call.exception(10), EOFError)
    assert engine.has_ended()


STOPPED_TRAINER = """
import sys, time
sys.path.insert(0, {folder!r})
from test_vllm_watch import Started

if __name__ == "__main__":
    engine = Started(request_deadline_s=2.0)
    with engine.watch.waiting("request_deadline_s"):
        print("waits", flush=True)
        sys.stdin.readline()
    print(engine.watch.is_alive(), flush=True)
    engine.watch.kill("is not needed any more")
"""


@pytest.mark.slow
def test_time_in_which_the_trainer_itself_is_stopped_does_not_count(tmp_path: Path) -> None:
    """As by Ctrl-Z, or while a laptop sleeps; the engine may be stopped with it."""
    script = tmp_path / "trainer.py"
    script.write_text(STOPPED_TRAINER.format(folder=str(Path(__file__).parent)), encoding="utf-8")
    trainer = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "waits\n"
    trainer.send_signal(signal.SIGSTOP)
    time.sleep(4)
    trainer.send_signal(signal.SIGCONT)
    assert trainer.communicate("\n", timeout=30)[0] == "True\n"


def test_an_engine_in_this_process_is_not_watched() -> None:
    watch = ProcessWatch([], None, {"request_deadline_s": 1e-9, "sync_deadline_s": 1e-9})
    assert not watch
    with watch.waiting("request_deadline_s"):
        assert watch.is_alive()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("untraced")
def test_a_run_whose_engine_stops_ends_with_a_checkpoint_and_leaves_no_process(
    tmp_path: Path, embedded_config: Callable[..., Config]
) -> None:
    config = embedded_config(
        output_dir=tmp_path,
        rollout="vllm",
        vllm_own_process=True,
        sync_deadline_s=60,
        request_deadline_s=50,
        prompts_per_step=4,
        max_steps=10,
        eval_steps=0,
        baseline_probe=0,
    )
    before = set(psutil.Process().children(recursive=True))
    with GRPOTrainer(config) as trainer:
        started = set(psutil.Process().children(recursive=True)) - before
        engine: Any = trainer._parts.engine
        target = engine._vllm
        tree = target._watch._tree
        assert {process.pid for process in tree} <= {process.pid for process in started}
        for process in tree:
            process.send_signal(signal.SIGINT)  # as a terminal sends it to all of a command's processes
        steps = trainer.steps()
        assert next(steps).metrics["sync/version"] == 1
        assert target._watch._deadlines == {"request_deadline_s": 50, "sync_deadline_s": 60}
        target._watch._deadlines["request_deadline_s"] = 3.0
        vllm = target._llm.llm_engine
        step = vllm.step

        def stopped_step() -> Any:
            """In the middle of the requests."""
            tree[0].suspend()
            return step()

        vllm.step = stopped_step
        begin = time.monotonic()
        killed = r"the engine's process did not answer within 3 s \(request_deadline_s\) and was killed"
        with pytest.raises(RolloutError, match=rf"vLLM failed with RolloutError: {killed}; its 4 requests were dropped"):
            next(steps)
        with pytest.raises(WeightSyncError, match=f"phase 'pause': {killed}"):
            engine.sync_weights(engine._model, 9)
        assert time.monotonic() < begin + 30
    assert (tmp_path / "checkpoint-1" / "manifest.json").exists()
    assert all(map(ended, tree))
