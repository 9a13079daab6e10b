"""What reward functions log, from where they run to the run's record; going on loses and doubles none of it."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.system.soak import trace
from grpo_fast.config import Config
from grpo_fast.train import GRPOTrainer
from tests.train.trainer.runs import ROWS, rows

LOGGED = {"letters", "three epochs", "logged/reward"}


def logging(*, interrupted_after: int = -1) -> Any:
    """A closure, which is sent to a worker by value."""
    calls: Counter[int] = Counter()

    async def vowels(
        completions: list[str], trainer_state: Any, log_metric: Any, log_extra: Any, **columns: Any
    ) -> list[float]:
        calls[trainer_state.global_step] += 1
        if trainer_state.global_step == interrupted_after and calls[interrupted_after] == 2:  # the first is the evaluation's
            os.kill(os.getpid(), signal.SIGINT)
        log_metric("letters", sum(map(len, completions)) / len(completions))
        log_metric("three epochs", trainer_state.epoch * 3)
        log_metric("reward", trainer_state.global_step)
        log_extra("length", [len(text) for text in completions])
        log_extra("step", [f"after {trainer_state.global_step} of {trainer_state.max_steps}"] * len(completions))
        return [sum(letter in "aei" for letter in text) / max(1, len(text)) for text in completions]

    return vowels


def test_what_is_logged_is_in_the_record(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(reward_workers=1, max_steps=3, eval_steps=2)
    with GRPOTrainer(config, train_dataset=ROWS, reward_funcs=[logging()]) as trainer:
        seen = [result.metrics for result in trainer.steps()]
    first, *found = rows(config.output_dir)
    assert LOGGED.isdisjoint(first), "before the first step there is an evaluation and nothing else"
    assert [row["logged/reward"] for row in found] == [0.0, 1.0, 2.0]
    assert [row["three epochs"] for row in found] == pytest.approx([0.0, *(3 * row["epoch"] for row in found[:2])])
    assert all(0 < row["letters"] <= 6 for row in found)
    assert [metrics["letters"] for metrics in seen] == [row["letters"] for row in found]
    evaluated = {row["step"]: row for row in (first, *found) if "eval_letters" in row}
    assert {step: row["eval_logged/reward"] for step, row in evaluated.items()} == {0: 0.0, 2: 2.0, 3: 3.0}
    assert evaluated[2]["eval_three epochs"] == pytest.approx(3 * evaluated[2]["epoch"])
    told = rows(config.output_dir, "completions")
    assert len(told) == 3 * config.log_completions
    assert all(row["length"] == len(row["completion"]) for row in told)
    assert [row["vowels/step"] for row in told] == [f"after {row['step'] - 1} of 3" for row in told]
    history = json.loads((config.output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert [set(row) >= LOGGED for row in history if "reward" in row] == [True] * 3
    assert [row["eval_logged/reward"] for row in history if "eval_reward" in row] == [0.0, 2.0, 3.0]


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("interrupted", [False, True])
def test_going_on_loses_and_doubles_nothing(
    max_staleness: int, interrupted: bool, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    settings = {"eval_steps": 1, "refill_rounds": 1, "max_staleness": max_staleness}
    whole, parted = (tiny_config(output_dir=tmp_path / name, **settings) for name in ("whole", "parted"))
    with GRPOTrainer(whole, train_dataset=ROWS, reward_funcs=[logging()]) as trainer:
        trainer.train()
    reward = logging(interrupted_after=3 if interrupted else -1)
    with GRPOTrainer(parted, train_dataset=ROWS, reward_funcs=[reward]) as trainer:
        for result in trainer.steps():
            if result.step == 3 and not interrupted:
                break
    saved = parted.output_dir / f"checkpoint-{trainer.summary['step']}" / "state.json"
    state = json.loads(saved.read_text(encoding="utf-8"))
    assert trainer.summary["step"] < parted.max_steps
    assert any([state["pending"], *state["ahead"]]) == (interrupted or max_staleness > 0), "what was logged goes along"
    with GRPOTrainer.resume(parted.output_dir, train_dataset=ROWS, reward_funcs=[logging()]) as trainer:
        trainer.train()
    assert trace(parted.output_dir) == trace(whole.output_dir)
    assert rows(parted.output_dir, "completions") == rows(whole.output_dir, "completions")
    assert all(set(row) >= LOGGED for row in trace(whole.output_dir)[1:])
