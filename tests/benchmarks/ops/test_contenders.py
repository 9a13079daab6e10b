"""Adapters: every rival of the list has one, what is not installed says so, and what is installed is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.ops.cases import HeadCase, Model, cpu_cases
from benchmarks.ops.contenders.contender import bare_import
from benchmarks.ops.contenders.table import CONTENDERS, contenders_of, refusal
from benchmarks.ops.measure import Ceilings, Clock
from benchmarks.ops.suite import Bench, run_case

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


def test_every_rival_has_an_adapter() -> None:
    heads = {contender.package for contender in CONTENDERS if contender.kind == "head" and contender.role == "rival"}
    assert heads == {"torch", "trl", "liger-kernel", "unsloth_zoo", "verl", "cut-cross-entropy", "quack-kernels"}
    assert sum(contender.package == "liger-kernel" for contender in CONTENDERS) == 5
    for kind in ("head", "advantage", "loss"):
        names = [contender.name for contender in CONTENDERS if contender.kind == kind]
        assert len(set(names)) == len(names)


def test_cases_with_every_rival_have_all_of_them() -> None:
    target = cpu_cases()[0]
    assert contenders_of(target) == [contender for contender in CONTENDERS if contender.kind == "head"]
    few = contenders_of(HeadCase(Model("", 8, 64), 64))
    assert {contender.name for contender in few} >= {"grpo_fast", "torch eager", "trl chunked_logprob"}


def test_what_needs_a_gpu_refuses_a_cpu_in_words() -> None:
    case = cpu_cases()[0]
    reasons = {contender.name: refusal(contender, case, CPU) for contender in contenders_of(case)}
    assert reasons["verl linear_cross_entropy"] == "it runs on GPUs only"
    assert "weights per token" in (reasons["quack linear cross-entropy"] or "")
    assert reasons["trl chunked_logprob"] is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # the rivals' own
@pytest.mark.parametrize("objective", ["token", "sequence", "cross_entropy", "forward"])
def test_rivals_that_are_installed_are_right(objective) -> None:
    torch.compiler.set_stance("force_eager")
    bench = Bench(CPU, Clock(CPU), Ceilings({"float32": 1e11}, 1e10), 0.0, min_rounds=2, max_rounds=2, tidy=False)
    record = run_case(bench, HeadCase(Model("", 40, 301), 64, objective, dtype="float32", every_rival=True))
    torch.compiler.set_stance("default")
    status = {row["contender"]: row["status"] for row in record["rows"]}
    assert set(status.values()) <= {"ok", "refused", "missing"}, record["rows"]
    assert status["torch eager"] == status["torch.compile"] == "ok"
    pytest.importorskip("trl", reason="TRL is not installed")
    assert status["trl chunked_logprob"] == "ok"


def test_a_module_is_imported_without_its_package(tmp_path, monkeypatch) -> None:
    (tmp_path / "heavy" / "inner").mkdir(parents=True)
    (tmp_path / "heavy" / "__init__.py").write_text("raise RuntimeError('needs a cluster')", encoding="utf-8")
    (tmp_path / "heavy" / "inner" / "__init__.py").write_text("import nowhere", encoding="utf-8")
    (tmp_path / "heavy" / "inner" / "kernel.py").write_text("ANSWER = 42", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("heavy", "heavy.inner", "heavy.inner.kernel"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert bare_import("heavy.inner.kernel").ANSWER == 42
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        bare_import("nowhere_at_all.kernel")
    for name in ("heavy", "heavy.inner", "heavy.inner.kernel"):
        sys.modules.pop(name)


@pytest.mark.slow
def test_the_cases_run_under_pytest_benchmark(tmp_path) -> None:
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    report = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "policy_loss and eager", "--benchmark-max-time=0.01", f"--benchmark-json={report}"]
    # One of several test processes tells it in its environment, where pytest-benchmark would read it and time nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    assert {entry["extra_info"]["settings"] for entry in found} == {"TRL's formula on [B, L], autograd"}
    assert all(entry["extra_info"]["errors"]["relative"] < 1e-5 and entry["group"] for entry in found)
