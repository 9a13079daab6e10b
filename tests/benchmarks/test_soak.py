"""The soak: a short one, and proof that it would see what it looks for."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.system.command_line import CommandLine
from benchmarks.system.soak import MAX_GROWTH_MIB, Growth, differences, killed_runs, long_run, trace

FLAT = Growth(
    step=list(range(1, 41)),
    resident_mib=[600.0] * 40,
    open_files=[12] * 40,
    threads=[5] * 40,
    log_bytes=[1000 * step for step in range(1, 41)],
)


def test_what_stays_flat_has_no_fault() -> None:
    assert FLAT.faults() == []
    warm = replace(FLAT, resident_mib=[500.0 + min(i, 9) for i in range(40)])  # a run's start may grow
    assert warm.faults() == []


@pytest.mark.parametrize(
    ("grown", "words"),
    [
        ({"resident_mib": [600.0 + i * MAX_GROWTH_MIB / 14 for i in range(40)]}, "resident memory grew by"),
        ({"open_files": [12 + i // 8 for i in range(40)]}, "open files grew from 14 to 16"),
        ({"threads": [5] * 39 + [6]}, "threads grew from 5 to 6"),
        ({"log_bytes": [1000 * i + 20 * i**2 for i in range(40)]}, "a step writes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_grows_is_told(grown: dict[str, list[float]], words: str) -> None:
    faults = replace(FLAT, **grown).faults()
    assert len(faults) == 1
    assert words in faults[0]


@pytest.mark.slow
def test_a_short_run_does_not_grow(tmp_path: Path) -> None:
    growth = long_run(tmp_path / "run", num_steps=240, num_samples=40)
    assert len(growth.step) == 40
    assert growth.faults() == []


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_been(tmp_path: Path) -> None:
    kills = killed_runs(tmp_path, num_kills=4, num_steps=30, seed=1)
    assert kills.num_kills == 4
    assert kills.faults == []
    assert max(kills.after_steps) > 0, "every kill came before the first step"
    straight, run = tmp_path / "straight", tmp_path / "run-0"
    rows = trace(run)
    rows[10]["reward"] += 0.5
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]), encoding="utf-8")
    assert differences(straight, run) == ["30 rows of metrics instead of 31", "step 10 differs in reward"]


@pytest.mark.slow
def test_what_a_command_leaves_behind_is_found(tmp_path: Path) -> None:
    (tmp_path / "leaver.py").write_text(
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "print(child.pid, file=open('children', 'a'), flush=True)\n"
        "def reward(completions, **columns):\n    return [0.0] * len(completions)\n",
        encoding="utf-8",
    )
    shell = CommandLine(tmp_path)
    assert shell.left_over() == []
    options = ("--recipe", "embedded", "--reward-funcs", "leaver:reward", "--max-steps", "500")
    run = tmp_path / "run" / "metrics.jsonl"
    assert shell.run("train", *options, "--output-dir", "run", until=run.exists) == -signal.SIGKILL

    def started() -> set[int]:
        return {int(line) for line in (tmp_path / "children").read_text().split()}

    try:
        deadline = time.monotonic() + 60  # a reward worker sees a moment later that its trainer is gone
        while set(shell.left_over()) != started() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert set(shell.left_over()) == started()
    finally:
        for child in started():
            os.kill(child, signal.SIGKILL)
        shell.close()
