from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# Before anything imports Triton, which reads it once: see tests/ops/conftest.py.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks.system.command_line import CommandLine
from grpo_fast.ops.jit import interpreted
from tests import quick_interpreter

SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--native-library", type=Path, help="another build of the native extension, as one with sanitizers")


def pytest_configure(config: pytest.Config) -> None:
    if interpreted():
        quick_interpreter.install()
    if (path := config.getoption("--native-library")) is not None:
        from grpo_fast.ops import native

        assert native.load(path) == ""
    if importlib.util.find_spec("hypothesis") is not None:
        from hypothesis import HealthCheck, settings

        # By default an example of 200 ms and values that are slow to draw are failures; on a busy machine they are not.
        settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
        settings.load_profile("any machine")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is marked ``gpu`` has sizes or types that Triton's interpreter cannot take; ``vllm`` is another environment."""
    if item.get_closest_marker("vllm") is not None and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed in this environment; `make test-vllm` makes one that has it")
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first: workers take whole files, and only after short ones do both end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Coverage is what everyday tests reach, each by its first parameters, and those of vLLM.

    Slow ones, and the processes that they start, would take half as long again; other parameters reach little more.
    """
    slow = item.get_closest_marker("slow") is not None
    again = hasattr(item, "callspec") and any(item.callspec.indices.values())
    of_vllm = item.get_closest_marker("vllm") is not None
    with untraced_processes() if (slow or again) and not of_vllm else contextlib.nullcontext():
        return (yield)


@contextlib.contextmanager
def without_tracer() -> Iterator[None]:
    """Coverage's tracer is called for each line of ours and for none of installed packages."""
    tracers = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracers[0])
        threading.settrace(tracers[1])


@contextlib.contextmanager
def untraced_processes() -> Iterator[None]:
    """No tracer, in processes that are started neither."""
    with pytest.MonkeyPatch.context() as patch, without_tracer():
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield


@pytest.fixture
def untraced() -> Iterator[None]:
    """For what is timed, and for long runs of vLLM."""
    with untraced_processes():
        yield


@pytest.fixture(scope="session", autouse=True)
def interpreter_without_tracer() -> Iterator[None]:
    """Called for each line of Triton's interpreter, coverage's tracer makes kernels take more than twice as long."""
    if not interpreted():
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def untraced(executor: Any, *arguments: Any, **options: Any) -> Any:
        with without_tracer():
            return launch(executor, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", untraced)
        yield


@pytest.fixture
def embedded_config(tmp_path: Path) -> Callable[..., Any]:
    """Makes configurations of the embedded recipe that keep their records and nothing else, with changes."""
    from grpo_fast.recipes import recipe

    quiet = {"output_dir": tmp_path / "run", "forecast": "off", "sinks": (), "report": False}
    return lambda **changes: recipe("embedded", **quiet | changes)


@pytest.fixture
def shell(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line, in an empty folder and without a process of its own: exit code, output, errors."""
    from grpo_fast.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(line: str, *more: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*line.split(), *more])
        out, err = capfd.readouterr()
        code = ended.value.code
        return (0 if code is None else int(code)), out, err

    return call


@pytest.fixture(scope="session")
def imported_by() -> Callable[[str], set[str]]:
    """Names of the modules that an interpreter of its own has loaded once it has run some code."""

    def run(code: str) -> set[str]:
        told = f"{code}\nimport sys; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return set(done.stdout.splitlines()[-1].split())

    return run


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """One process which imports torch once: commands, code and ranks run in its forks. Who takes it gives it a home."""
    with untraced_processes():
        forks = CommandLine(tmp_path_factory.mktemp("forks"))
    with contextlib.closing(forks):
        yield forks


@pytest.fixture
def shared_data() -> Path:
    """Data beside the checkout, which the project may read but never needs."""
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return SHARED


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group of torch's, of which this process is the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def world(group_of_one: None) -> Any:
    """The same as a run knows it."""
    from grpo_fast.train.distributed import World

    return World.join(torch.device("cpu"), timeout_s=10)
