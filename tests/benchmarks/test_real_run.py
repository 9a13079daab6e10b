"""A run in pieces with the embedded model: it is the run in one piece, and what is asked of it is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ops import store
from benchmarks.system import report
from benchmarks.system.real_run import main
from grpo_fast import GRPOTrainer

SMALL = [
    "prompts_per_step=8",
    "num_generations=4",
    "max_completion_length=32",
    "learning_rate=2e-4",
    "warmup_steps=0",
    "max_steps=8",
    "save_steps=3",
    "eval_size=8",
    "reward_workers=0",
    "baseline_probe=0",
    "share_prompts=false",
    "forecast_min_steps=5",
    "forecast_epsilon=0.9",
    "forecast_patience=1",
    'device="cpu"',
    "sinks=[]",
]


def run(folder: Path, name: str, **options: Any) -> tuple[int, dict[str, Any]]:
    arguments = [str(folder / name), "--model", "embedded", "--dataset", "arithmetic", "--output", str(folder / f"{name}-kept")]
    arguments += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    code = main([*arguments, "--set", *SMALL])
    return code, json.loads((folder / name / "real_run.json").read_text(encoding="utf-8"))


def trace(run: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row["reward"], row["loss"]) for row in rows if "loss" in row]


@pytest.mark.slow
def test_pieces_make_the_run_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, "whole")[0] == 0
    codes = [run(tmp_path, "pieces", minutes=0)[0] for _ in range(2)]
    code, found = run(tmp_path, "pieces", note="It learns to add.")
    assert ([*codes, code], found["over"]) == ([3, 3, 0], True)
    assert trace(tmp_path / "pieces") == trace(tmp_path / "whole")
    whole = json.loads((tmp_path / "whole-kept" / "real_run.json").read_text(encoding="utf-8"))
    assert {name: found[name] for name in ("start", "stop", "end")} == {name: whole[name] for name in ("start", "stop", "end")}
    assert (found["start"]["step"], found["end"]["step"]) == (0, 8)
    assert 5 <= found["stop"]["step"] < 8
    assert found["stop"]["reason"]
    assert found["stop"]["foretold_reward_at_the_end"]["low"] < found["stop"]["foretold_reward_at_the_end"]["high"]
    kept = {path.name for path in (tmp_path / "pieces-kept").iterdir()}
    assert kept >= {"report.html", "summary.json", "metrics.jsonl", "config.toml", "real_run.json", "plots"}
    assert list((tmp_path / "pieces-kept" / "plots").glob("*.png"))
    assert whole["device"]["kind"] == "cpu"
    for name in ("report.html", "summary.json", "config.toml"):
        assert str(tmp_path) not in (tmp_path / "pieces-kept" / name).read_text(encoding="utf-8"), name

    (tmp_path / "results" / "cpu").mkdir(parents=True)
    (tmp_path / "pieces-kept").rename(tmp_path / "results" / "cpu" / "real_run")
    monkeypatch.setattr(store, "RESULTS", tmp_path / "results")
    told = report.section()
    foretold = whole["stop"]["foretold_reward_at_the_end"]["median"]
    assert f"At step {found['stop']['step']} the law foretold a mean reward of {foretold:.3f} for the end" in told
    assert f"| end of the budget | 8 | {found['end']['accuracy']:.3f} |" in told
    assert "It learns to add." in told


@pytest.mark.slow
def test_a_piece_that_is_killed_leaves_what_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = GRPOTrainer.steps

    def killed(trainer: GRPOTrainer) -> Any:
        for step in steps(trainer):
            if step.step == 4:
                raise SystemError("killed")
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "steps", killed)
        with pytest.raises(SystemError):
            run(tmp_path, "run")
    _, found = run(tmp_path, "run", minutes=0)
    assert found["start"]["step"] == 0


@pytest.mark.slow
def test_a_run_may_end_with_the_law_and_go_on_later(tmp_path: Path) -> None:
    code, found = run(tmp_path, "run", until="law")
    assert (code, found["over"]) == (0, True)
    assert "end" not in found
    stopped = found["stop"]["step"]
    assert trace(tmp_path / "run")[-1][0] == stopped
    code, found = run(tmp_path, "run")
    assert (code, found["stop"]["step"], found["end"]["step"]) == (0, stopped, 8)
