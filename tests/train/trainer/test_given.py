"""Parts given in Python, and what is asked and measured beside training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.system.soak import trace
from grpo_fast.config import Config
from grpo_fast.law import OnlinePredictor
from grpo_fast.recipes import recipe, recipe_names
from grpo_fast.sinks import RunInfo
from grpo_fast.tasks.task import Task
from grpo_fast.train import GRPOTrainer
from grpo_fast.train import trainer as trainer_module
from grpo_fast.train.checkpoint import list_checkpoints
from grpo_fast.types import Completion
from tests.train.trainer.runs import Make, rows, vowels


class Listening:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed = 0
        self.info: RunInfo | None = None

    def start(self, info: RunInfo) -> None:
        self.info = info

    def log_step(self, metrics: Any, forecast: Any = None) -> None:
        self.steps.append(int(metrics["step"]))

    def log_event(self, step: int, event: str, message: str) -> None:
        """Nothing."""

    def log_completions(self, rows: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_takes_any_reward(name: str) -> None:
    assert recipe(name).reward_range is None, "it would end runs with rewards beyond it"


def test_the_range_of_built_in_rewards_is_known_and_that_of_own_ones_is_not(make: Make, tmp_path: Path) -> None:
    def great(completions: list[str], **columns: Any) -> list[float]:
        return [2.0 + len(text) for text in completions]

    for functions, found in (([great], None), (["exact_match"], (0.0, 1.0))):
        with make({"reward_funcs": functions}, forecast="stop", max_steps=1, overwrite=True) as trainer:
            assert trainer.train()["step"] == 1
        assert trainer.config.reward_range == trainer._parts.predictor.reward_range == found
        assert Config.from_toml(tmp_path / "run" / "config.toml").reward_range == found


def test_parts_can_be_given(make: Make, tmp_path: Path) -> None:
    sink, predictor = Listening(), OnlinePredictor(4, epsilon=0.01, reward_range=(-1.0, 2.0))
    trainer = make({"sinks": [sink], "predictor": predictor}, max_steps=4, forecast="stop")
    trainer.train()
    trainer.close()
    assert sink.steps == [1, 2, 3, 4]
    assert sink.closed == 1
    assert sink.info is not None
    assert (sink.info.run_dir, sink.info.start_step, sink.info.dataset) == (tmp_path / "run", 0, "letters")
    assert predictor.num_observations == 4
    assert len(rows(tmp_path / "run")) == 4, "the run's own files are written all the same"


def test_a_sink_that_fails_does_not_end_the_run(make: Make, tmp_path: Path) -> None:
    class Failing(Listening):
        def log_step(self, metrics: Any, forecast: Any = None) -> None:
            super().log_step(metrics, forecast)
            if metrics["step"] == 2:
                raise ValueError("no such chart")

    failing, other = Failing(), Listening()
    with make({"sinks": [failing, other]}, max_steps=4) as trainer:
        assert trainer.train()["stopped_by"] == "max_steps"
    assert (failing.steps, failing.closed, other.steps) == ([1, 2], 1, [1, 2, 3, 4])
    [told] = [event["message"] for event in rows(tmp_path / "run", "events") if event["event"] == "warn"]
    assert told.startswith("the sink Failing raised ValueError: no such chart (")


def test_an_engine_can_be_given(tiny_config: Callable[..., Config], letters: Task, tmp_path: Path) -> None:
    class Fixed:
        """Says the same to everything, in two ways."""

        def __init__(self) -> None:
            self.versions: list[int] = []
            self.closed = False

        def generate(self, prompts: Any, sampling: Any, *, num_generations: int, seed: int) -> list[list[Completion]]:
            said = [
                Completion((4, 2), (-1.0, -1.0), "stop", "a"),
                Completion((5, 2), (-1.0, -1.0), "stop", "b"),
            ]
            return [[said[i % 2] for i in range(num_generations)] for _ in prompts]

        def sync_weights(self, policy: torch.nn.Module, version: int) -> dict[str, float]:
            self.versions.append(version)
            return {"sync/mib": 1.5}

        def sleep(self) -> None:
            pass

        def close(self) -> None:
            self.closed = True

    engine = Fixed()
    with GRPOTrainer(tiny_config(max_steps=3), task=letters, reward_funcs=[vowels], engine=engine) as trainer:
        trainer.train()
    assert engine.versions == [1, 2, 3]
    assert engine.closed
    assert [row["sync/mib"] for row in rows(tmp_path / "run")] == [1.5] * 3
    assert [row["reward"] for row in rows(tmp_path / "run")] == [0.5] * 3


def test_a_configuration_that_the_loss_refuses_costs_no_model(make: Make) -> None:
    with pytest.raises(ValueError, match="delta"):
        make(loss_type="sapo", delta=2.0, model="nowhere")


def test_the_best_by_held_out_reward_is_saved_when_it_is_reached(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.1, 0.3, 0.6, 0.2, 0.4])
    monkeypatch.setattr(trainer_module, "evaluate", lambda *_, **__: {"eval_reward": next(values)})
    summary = make(eval_steps=1, max_steps=4, save_steps=100, save_total_limit=1).train()
    assert summary["use"] == {"checkpoint": "checkpoint-2", "step": 2, "reward": 0.6, "by": "held-out reward"}
    assert summary["eval_reward"] == 0.4
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]


def test_a_probe_changes_nothing_but_what_is_known(make: Make, tmp_path: Path) -> None:
    make(forecast="warn", baseline_probe=0, output_dir=tmp_path / "without").train()
    summary = make(forecast="warn", baseline_probe=8, output_dir=tmp_path / "with").train()
    with_, without = trace(tmp_path / "with"), trace(tmp_path / "without")
    counted = ("flops", "tokens/", "num_tokens")
    for one, other in zip(with_, without, strict=True):
        assert one["num_tokens"] > other["num_tokens"]
        assert {k: v for k, v in one.items() if not k.startswith(counted)} == {
            k: v for k, v in other.items() if not k.startswith(counted)
        }
    assert 0 < summary["baseline_reward"] < 1
    assert f"reward before training: {summary['baseline_reward']:.3f} over 8 prompts" in [
        row["message"] for row in rows(tmp_path / "with", "events")
    ]


def test_a_question_without_a_terminal_is_a_warning(make: Make, tmp_path: Path) -> None:
    def same(completions: list[str], **columns: Any) -> list[float]:
        return [0.9, 1.0] * (len(completions) // 2)

    trainer = make(
        {"reward_funcs": [same]},
        forecast="ask",
        reward_range=(0.0, 1.0),
        max_steps=60,
        learning_rate=1e-7,
        forecast_epsilon=0.1,
        forecast_min_steps=5,
        baseline_probe=0,
    )
    assert trainer.train()["stopped_by"] == "max_steps"
    told = [row["message"] for row in rows(tmp_path / "run", "events") if row["event"] == "warn"]
    assert len(told) == 1
    assert told[0].endswith("there is no terminal to ask on, so training continues")
