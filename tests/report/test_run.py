from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from grpo_fast.report.run import Run, RunError, series, smoothed

MakeRun = Callable[..., Path]


def test_a_finished_run_comes_back_as_arrays(make_run: MakeRun) -> None:
    run = Run.load(make_run(steps=60, nan_steps=(7,)))
    assert run.steps.tolist() == list(range(1, 61))
    assert run.metric("reward").dtype == np.float64
    assert np.flatnonzero(np.isnan(run.metric("reward"))).tolist() == [6]
    assert np.flatnonzero(np.isfinite(run.metric("eval_reward"))).tolist() == [19, 39, 59]
    assert (run.last_step, run.max_steps, run.stopped_by) == (60, 400, "forecast")
    assert run.last("flops") == pytest.approx(6.4e9 * 60)
    assert run.has("entropy")
    assert not run.has("kl")
    assert np.isnan(run.metric("kl")).all()
    assert np.isnan(run.last("kl"))
    assert run.problems == ()


def test_values_of_rows_that_may_not_have_them() -> None:
    assert series([{"x80": 3}, {"x80": 4.5}], "x80").tolist() == [3.0, 4.5]
    assert np.isnan(series([{"x80": None}, {}], "x80")).all()


def test_a_killed_run_loses_only_its_half_line(make_run: MakeRun) -> None:
    path = make_run(steps=30, stopped_by=None)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "rew')
    run = Run.load(path)
    assert run.last_step == 30
    assert run.summary is None
    assert run.stopped_by is None
    assert run.problems == ()


def test_damage_inside_a_file_is_told(make_run: MakeRun) -> None:
    path = make_run(steps=30)
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[9] = "\0\0\0\n"
    lines[10] = '{"reward": 1.0}\n'
    lines[11] = "[1, 2]\n"
    (path / "metrics.jsonl").write_text("".join(lines))
    (path / "config.toml").write_text("max_steps = = 3")
    run = Run.load(path)
    assert run.steps.tolist() == [*range(1, 10), *range(13, 31)]
    assert [problem.split(" ")[2] for problem in run.problems[:3]] == ["10", "11", "12"]
    assert "config.toml" in run.problems[3]
    assert run.epsilon == 0.01


@pytest.mark.parametrize("content", ["{half", "[1]"])
def test_a_broken_summary_makes_an_unfinished_run(make_run: MakeRun, content: str) -> None:
    path = make_run(steps=10)
    (path / "summary.json").write_text(content)
    run = Run.load(path)
    assert run.stopped_by is None
    assert "summary.json" in run.problems[0]


def test_a_summary_from_before_a_resume_is_not_believed(make_run: MakeRun) -> None:
    path = make_run(steps=10, stopped_by="interrupt")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "reward": 0.5}\n')
    assert Run.load(path).stopped_by is None


def test_a_repeated_step_counts_as_written_last(make_run: MakeRun) -> None:
    path = make_run(steps=10, stopped_by=None)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward": 77.0}\n')
    run = Run.load(path)
    assert run.steps.tolist() == list(range(1, 11))
    assert run.metric("reward")[3] == 77.0


def test_what_is_not_a_run_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a directory"):
        Run.load(tmp_path / "nowhere")
    path = make_run("inner", steps=3)
    with pytest.raises(RunError, match=f"did you mean {path}"):
        Run.load(tmp_path)
    (path / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(RunError, match="no whole step yet"):
        Run.load(path)
    (path / "metrics.jsonl").write_text('{"step": 0, "progress": 0.0, "eval_reward": 0.5}\n')
    with pytest.raises(RunError, match="no whole step yet"):
        Run.load(path)
    (path / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match=r"has no metrics\.jsonl"):
        Run.load(path)


def test_the_forecast_at_a_step_is_the_newest_before_it(make_run: MakeRun) -> None:
    run = Run.load(make_run(steps=30))
    assert run.forecast_at(4) is None
    first = run.forecast_at(5)
    assert first is not None
    assert first["step"] == 5
    last = run.forecast_at(1000)
    assert last is not None
    assert last["step"] == 30
    assert run.forecast_series("step").tolist() == list(range(5, 31))
    assert np.isnan(run.forecast_series("x80")).all()


def test_phases_without_a_summary_are_summed_from_the_metrics(make_run: MakeRun) -> None:
    told, summed = Run.load(make_run("a", steps=20)), Run.load(make_run("b", steps=20, stopped_by=None))
    assert summed.seconds_by_phase() == pytest.approx(told.seconds_by_phase())
    assert summed.flops_by_phase() == pytest.approx(told.flops_by_phase())
    assert "reference" not in summed.flops_by_phase()
    assert summed.final_reward == pytest.approx(float(np.mean(summed.metric("reward")[-5:])))


def test_a_run_without_configuration_has_defaults(make_run: MakeRun) -> None:
    path = make_run(steps=5, stopped_by=None)
    (path / "config.toml").unlink()
    for name in ("forecasts", "events", "completions"):
        (path / f"{name}.jsonl").unlink(missing_ok=True)
    run = Run.load(path)
    assert (run.max_steps, run.confidence, run.resumed_at) == (5, 0.78, [])
    assert "config.toml is missing" in run.problems[0]


def test_resumes_and_thresholds_are_read(make_run: MakeRun) -> None:
    path = make_run(steps=20, resumed_at=8)
    (path / "config.toml").write_text("forecast_epsilon = 0.05\nforecast_confidence = 0.8\nmax_steps = 50\n")
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"max_steps": None}))
    run = Run.load(path)
    assert (run.resumed_at, run.epsilon, run.confidence, run.max_steps) == ([8], 0.05, 0.8, 50)


def test_smoothing_keeps_a_line_and_bridges_gaps() -> None:
    values = np.full(50, 3.0)
    values[20:22] = np.nan
    assert np.allclose(smoothed(values, width=2.0), 3.0)
    assert np.isnan(smoothed(np.full(5, np.nan))).all()
    assert smoothed(np.array([2.0])).tolist() == [2.0]
    far = np.full(100, np.nan)
    far[0] = 1.0
    assert np.isnan(smoothed(far, width=1.0)[50])
    noisy = np.random.default_rng(0).normal(size=400)
    assert smoothed(noisy).std() < 0.4 * noisy.std()
