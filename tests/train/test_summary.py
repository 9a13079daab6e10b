from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from grpo_fast.config import Config
from grpo_fast.tasks.task import Task
from grpo_fast.train.best import Saved
from grpo_fast.train.parts import build_parts
from grpo_fast.train.summary import SUMMARY_FILE, Ending, Outcome, write_summary


@pytest.fixture
def run(tiny_config: Callable[..., Config], letters: Task) -> Any:
    config = tiny_config(max_steps=20, price_per_gpu_hour=3600.0)
    parts = build_parts(config, {"task": letters}, resume=False)
    parts.open(0)
    yield config, parts
    parts.close()


def outcome(step: int, **values: Any) -> Outcome:
    given: dict[str, Any] = {"final_reward": 0.5, "best": Saved(4, 0.6), "evals": {}}
    return Outcome(step, **given | {"forecast": None} | values)


def test_what_is_written_is_what_is_returned(run: Any) -> None:
    config, parts = run
    evals = {"first": 0.1, "last": 0.7, "baseline": 0.125}
    summary = write_summary(config, parts, Ending("max_steps", "All done."), outcome(20, evals=evals))
    assert json.loads((config.output_dir / SUMMARY_FILE).read_text(encoding="utf-8")) == summary
    expected = {
        "stopped_by": "max_steps",
        "reason": "All done.",
        "signal": None,
        "step": 20,
        "max_steps": 20,
        "final_reward": 0.5,
        "best_reward": 0.6,
        "best_step": 4,
        "use": {"checkpoint": "checkpoint-4", "step": 4, "reward": 0.6, "by": "training reward"},
        "baseline_reward": 0.125,
        "initial_eval_reward": 0.1,
        "eval_reward": 0.7,
        "forecast": None,
        "model": config.model,
        "dataset": "letters",
    }
    assert {key: summary[key] for key in expected} == expected
    assert summary["versions"]["torch"]
    assert summary["device"]


def test_what_was_not_run_is_priced_at_the_mean_of_what_was(run: Any) -> None:
    config, parts = run
    parts.meter.add_rollout([3, 3], [[4, 4], [5, 6]])
    parts.meter.add_seconds({"rollout": 1.5, "train": 0.5})
    summary = write_summary(config, parts, Ending("forecast", "Flat."), outcome(5))
    assert summary["compute"]["money"] == pytest.approx(2.0)
    assert summary["saved"] == pytest.approx(
        {
            "steps": 0.75,
            "flops": 3 * summary["compute"]["flops"],
            "gpu_hours": 3 * 2 / 3600,
            "money": 6.0,
        }
    )
    assert summary["compute"]["flops"] > 0


def test_before_the_first_step_nothing_is_claimed(run: Any) -> None:
    config, parts = run
    summary = write_summary(config, parts, Ending("interrupt", "At once."), outcome(0, final_reward=math.nan, best=None))
    assert summary["saved"] == {"steps": 1.0, "flops": 0.0, "gpu_hours": 0.0, "money": 0.0}
    assert summary["final_reward"] is None
    assert (summary["best_reward"], summary["best_step"], summary["use"]) == (None, None, None)
    assert summary["eval_reward"] is None


def test_the_forecast_is_kept_without_its_band(run: Any) -> None:
    config, parts = run
    forecast = parts.predictor.observe(1, 0.05, 0.25)
    summary = write_summary(config, parts, Ending("user", "Enough."), outcome(1, forecast=forecast))
    assert "band" not in summary["forecast"]
    assert summary["forecast"]["median"] == forecast.median
    assert "band" in forecast.to_dict()
