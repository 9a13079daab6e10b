"""Trainers of tiny runs, and one run that nothing disturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.system.soak import trace
from grpo_fast.config import Config
from grpo_fast.tasks.task import Task
from grpo_fast.train import GRPOTrainer
from tests.train.trainer.runs import LETTERS, Make, Straight, beliefs, vowels, weights


@pytest.fixture
def make(tiny_config: Callable[..., Config], letters: Task) -> Iterator[Make]:
    """Makes trainers of a tiny run; a run that is there already is refused, as ever."""
    opened: list[GRPOTrainer] = []

    def build(given: dict[str, Any] | None = None, **settings: Any) -> GRPOTrainer:
        config = tiny_config(**settings)
        opened.append(GRPOTrainer(config, **{"task": letters, "reward_funcs": [vowels]} | (given or {})))
        return opened[-1]

    yield build
    for trainer in opened:
        trainer.close()


@pytest.fixture
def resume(letters: Task) -> Iterator[Make]:
    """Goes on with a run."""
    opened: list[GRPOTrainer] = []

    def build(run: Path, given: dict[str, Any] | None = None, **changes: Any) -> GRPOTrainer:
        config = Config.from_toml(run / "config.toml").replace(**changes)
        parts = {"task": letters, "reward_funcs": [vowels]} | (given or {})
        opened.append(GRPOTrainer.resume(run, config=config, **parts))
        return opened[-1]

    yield build
    for trainer in opened:
        trainer.close()


@pytest.fixture(scope="session")
def straight(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of eight steps that nothing disturbs, with every part of the loop at work."""
    return {
        "model": str(tiny_model),
        "output_dir": tmp_path_factory.mktemp("straight") / "run",
        "prompts_per_step": 3,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "use_adaptive_entropy": True,
        "entropy_target": 9.0,
        "weight_decay": 0.01,
        "num_iterations": 2,
        "refill_rounds": 1,
        "beta": 0.01,
        "max_steps": 8,
        "save_steps": 3,
        "save_total_limit": 1,
        "eval_steps": 2,
        "eval_size": 4,
        "forecast": "warn",
        "baseline_probe": 5,
        "reward_workers": 0,
        "sinks": (),
        "report": False,
    }


@pytest.fixture(scope="session")
def whole(straight: dict[str, Any]) -> Straight:
    result = Straight(Config.parse(straight))
    with GRPOTrainer(result.config, task=LETTERS, reward_funcs=[vowels]) as trainer:
        result.summary = trainer.train()
        result.weights = weights(trainer)
    run = result.config.output_dir
    result.trace, result.forecasts = trace(run), beliefs(run)
    return result
