"""Kernels are compiled ahead of time for GPUs that need not be here, and keep to their limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; nothing can be compiled")

from benchmarks import aot
from benchmarks.aot import Build

ROOT = Path(__file__).parents[2]
GOOD = Build(
    op="op",
    case="case",
    arch=90,
    kernel="_op_kernel",
    num_warps=8,
    num_stages=3,
    registers=170,
    stack_bytes=0,
    spills=0,
    shared_bytes=200_000,
    tensor_core=16,
    programs_per_sm=1,
    has_dot=True,
)


def compile_apart(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The tests' own process interprets kernels, so another one has to compile them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize("which", ["--archs 90", "--archs 80 89 100 120 --first"])
def test_every_kernel_keeps_to_its_limits_and_to_what_is_stored(which: str) -> None:
    """All calls for one architecture, and for the others one of each module, for the sake of time.

    A kernel that changes differs from what is stored, and only a whole table can be stored anew: that has no faults, below.
    """
    run = compile_apart("--check", *which.split())
    print(run.stdout)
    assert run.returncode == 0, run.stderr


def test_a_part_of_the_table_is_not_stored(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["aot", "--write", "--first"])
    with pytest.raises(SystemExit, match=r"^2$"):
        aot.main()
    assert "--write stores a whole table" in capsys.readouterr().err


@pytest.mark.slow
def test_a_kernel_that_spills_is_told_and_one_that_does_not_is_not() -> None:
    run = compile_apart("--modules", "tests.benchmarks.aot_examples")
    assert run.returncode == 1
    faults = run.stderr.strip().splitlines()
    assert len(faults) == len(aot.LIMITS)
    assert all("normalise" in fault and "bytes of stack" in fault for fault in faults)
    assert run.stdout.count("_square_kernel") == len(aot.LIMITS)


@pytest.mark.slow
def test_the_default_of_an_option_that_changes_is_not_relied_on() -> None:
    run = compile_apart("--modules", "tests.benchmarks.aot_careless")
    assert run.returncode == 1
    assert "_square_kernel is launched without enable_fp_fusion" in run.stderr


def test_faults_are_named() -> None:
    assert GOOD.faults() == []
    assert replace(GOOD, spills=2, stack_bytes=8).faults() == ["2 spills and 8 bytes of stack"]
    assert replace(GOOD, arch=89, shared_bytes=0, spills=2, stack_bytes=8).faults() == []
    assert replace(GOOD, arch=89, shared_bytes=0, spills=4, stack_bytes=16).faults() == ["4 spills and 16 bytes of stack"]
    assert replace(GOOD, tensor_core=0).faults() == ["a matrix product without tensor cores"]
    assert replace(GOOD, tensor_core=0, has_dot=False).faults() == []
    assert replace(GOOD, arch=80).faults() == ["200000 bytes of shared memory of 166912"]


def test_every_supported_triton_has_a_table_without_faults() -> None:
    known = aot.stored()
    assert {version.rpartition(".")[0] for version in known} == {"3.6", "3.7", "3.8", "3.9"}
    cases = {version: {(row["op"], row["case"], row["arch"], row["kernel"]) for row in rows} for version, rows in known.items()}
    assert len(set(map(frozenset, cases.values()))) == 1
    faults = [
        (version, row["case"], fault) for version, rows in known.items() for row in rows for fault in Build(**row).faults()
    ]
    assert faults == []


def test_what_is_stored_reads_as_it_was() -> None:
    known = {"3.9.0": [asdict(GOOD), asdict(replace(GOOD, arch=80))], "3.6.0": [asdict(GOOD)]}
    text = aot.written(known)
    assert json.loads(text) == known
    assert len(text.splitlines()) == 2 + 2 * 2 + 3


def test_only_the_stored_version_is_compared() -> None:
    version = aot.triton.__version__
    assert aot.differences([GOOD], {version: [asdict(GOOD)]}) == []
    assert aot.differences([GOOD], {"0.0": []}) == []
    more = replace(GOOD, registers=171)
    found = aot.differences([more], {version: [asdict(GOOD)]})
    assert [line.partition(":")[0] for line in found] == ["stored, not found now", "found now, not stored"]
    other = [asdict(replace(GOOD, arch=120)), asdict(replace(GOOD, case="another")), asdict(GOOD)]
    assert aot.differences([GOOD], {version: other}) == [], "of what was not compiled nothing is known"


def test_the_table_is_for_people() -> None:
    lines = aot.table([GOOD, replace(GOOD, kernel="_a_kernel")]).splitlines()
    assert lines[0].split()[:4] == ["op", "case", "arch", "kernel"]
    assert lines[1].split() == ["op", "case", "90", "_op_kernel", "8", "170", "0", "200000", "16", "1"]
    assert len(lines) == 3
