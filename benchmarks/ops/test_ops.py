"""The cases under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``, with its ``--benchmark-compare`` and autosave.

Sizes are the device's own where there is a GPU and miniatures on a CPU, so that a comparison of two commits takes a minute.
``python -m benchmarks.device`` measures whole devices.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.ops.cases import Case, cpu_cases, gpu_cases, smoke_cases
from benchmarks.ops.contenders.contender import Contender
from benchmarks.ops.contenders.table import contenders_of, refusal
from benchmarks.ops.measure import Ceilings, Clock
from benchmarks.ops.suite import Bench, Bound, bind
from benchmarks.ops.truth import complaints

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.filterwarnings("ignore")  # rivals'

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES: list[Case] = gpu_cases()[:12] if DEVICE.type == "cuda" else smoke_cases(cpu_cases())
PAIRS = [(case, contender) for case in CASES for contender in contenders_of(case)]


@functools.lru_cache(maxsize=1)
def bound(case: Case) -> Bound:
    """The inputs and the truth of a case, kept for its contenders."""
    return bind(Bench(DEVICE, Clock(DEVICE), Ceilings({}, 0.0), 0.0), case)


@pytest.mark.parametrize(("case", "contender"), PAIRS, ids=[f"{case.name}-{contender.name}" for case, contender in PAIRS])
def test_op(benchmark, case: Case, contender: Contender) -> None:
    reason = refusal(contender, case, DEVICE)
    if reason is not None:
        pytest.skip(f"{contender.name}: {reason}")
    if contender.version() is None:
        pytest.skip(f"{contender.name}: {contender.package} is not installed")
    if DEVICE.type == "cpu" and contender.name == "torch.compile":
        pytest.skip("torch.compile: compiling takes longer than all miniatures")
    problem = bound(case)
    call = contender.prepare(problem.problem, contender.options[0])
    errors = {} if contender.role == "floor" else problem.errors(call())
    wrong = complaints(errors, problem.plain)
    assert not wrong, wrong
    benchmark.group = case.name
    benchmark.extra_info |= {"version": contender.version(), "settings": contender.settings, "errors": errors}

    def once() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark(once)
