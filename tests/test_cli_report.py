from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_fast.sinks import JsonlSink, RunInfo

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two steps, as its files tell it."""
    sink = JsonlSink(tmp_path / "run")
    sink.start(RunInfo(run_dir=tmp_path / "run", model="embedded", dataset="arithmetic", max_steps=4))
    for step in (1, 2):
        sink.log_step({"step": step, "reward": step / 4, "flops": 1e9 * step})
    sink.close()
    (tmp_path / "run" / "config.toml").write_text("max_steps = 4\n", encoding="utf-8")
    return tmp_path / "run"


@pytest.mark.slow
def test_a_report_is_written_elsewhere(run: Path, shell: Shell, tmp_path: Path) -> None:
    before = sorted(run.rglob("*"))
    code, out, _ = shell("report run --output out/of/it")
    assert (code, out) == (0, "wrote out/of/it/report.html\n")
    assert (tmp_path / "out/of/it/plots/phases.png").is_file()
    assert sorted(run.rglob("*")) == before


def test_runs_are_compared_in_a_table_and_in_json(run: Path, shell: Shell) -> None:
    code, out, _ = shell("compare run nowhere")
    assert code == 0
    heads, row, other, note = out.split("\n", 1)[1].rstrip().split("\n")
    assert heads.split() == ["run", "steps", "reward", "FLOPs", "ended", "by"]
    assert row.split() == ["run", "2", "of", "4", "0.375", "2", "G", "unfinished"]
    assert other.split() == ["nowhere", "-", "-", "-", "not", "read"]
    assert note == "note: nowhere is not a directory; give the output_dir of a run"
    code, out, _ = shell("compare run --json")
    [found] = json.loads(out)["runs"]
    assert (code, found["step"], found["final_reward"], found["eval_reward"]) == (0, 2, 0.375, None)
    code, _, err = shell("compare")
    assert code == 1
    assert "name at least one run" in err
