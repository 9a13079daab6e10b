"""The alarm for a collapse, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.system.soak import trace
from grpo_fast.recipes import recipe
from grpo_fast.train import GRPOTrainer
from grpo_fast.train import trainer as trainer_module
from grpo_fast.train.checkpoint import list_checkpoints
from tests.train.trainer.runs import Make, events, rows, vowels


class Failing:
    """A verifier that gives a twentieth of the reward from some step on."""

    def __init__(self, from_step: int, *, calls: int = 0) -> None:
        self.calls = calls
        self.from_step = from_step

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        self.calls += 1
        return [(0.05 if self.calls >= self.from_step else 1.0) * value for value in vowels(completions)]


class Rising(Failing):
    """One that gives more from step to step before, so that the newest checkpoint is the best."""

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [(0.4 + self.calls / 60) * value for value in super().__call__(completions)]


FAILING: dict[str, Any] = {
    "prompts_per_step": 16,
    "max_completion_length": 3,
    "learning_rate": 1e-5,
    "max_steps": 60,
    "save_steps": 1,
    "save_total_limit": 1,
    "reward_range": (0.0, 1.0),
}


def test_a_collapse_ends_the_run_and_leads_back_to_before(make: Make, tmp_path: Path) -> None:
    trainer = make({"reward_funcs": [Failing(31)]}, **FAILING)
    found = [result for result in trainer.steps() if result.alarm is not None and result.alarm.confirmed]
    summary = trainer.summary
    assert summary["stopped_by"] == "collapse"
    assert [result.step for result in found] == [summary["step"]]
    assert 33 < summary["step"] < 50
    onset = found[0].alarm.onset
    assert 29 <= onset <= 32
    use = summary["use"]
    assert use["step"] <= onset - 2
    assert (
        use["reward"]
        == summary["best_reward"]
        == max(
            sum(row["reward"] for row in rows(tmp_path / "run")[:step][-10:]) / min(step, 10) for step in range(1, onset - 1)
        )
    )
    assert summary["reason"].startswith("The policy is collapsing: the reward fell from 0.")
    assert f" to step {summary['step']}" in summary["reason"]
    again = make({"reward_funcs": [Failing(31)]}, **FAILING, resume_if_exists=True).train()
    assert (again["stopped_by"], again["step"], again["use"]) == ("collapse", summary["step"], use)
    assert again["reason"].startswith("The run ended in a collapse: The policy is collapsing: the reward fell from ")
    assert summary["reason"].endswith(
        f"Go back to {use['checkpoint']}, the best checkpoint from before (training reward {use['reward']:.3f})."
    )
    kept = [path.name for path in list_checkpoints(tmp_path / "run")]
    assert kept == [use["checkpoint"], f"checkpoint-{summary['step']}"], "also with a limit of one"
    assert events(tmp_path / "run")[-1] == "alarm"
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_model_checkpoint"] == use["checkpoint"]


def test_a_collapse_is_the_same_over_a_resume(make: Make, resume: Make, tmp_path: Path) -> None:
    whole = make({"reward_funcs": [Failing(31)]}, **FAILING).train()
    straight = trace(tmp_path / "run")
    for moment in (20, 32, 34):
        run = tmp_path / f"left after {moment}"
        for result in make({"reward_funcs": [Failing(31)]}, **FAILING, output_dir=run).steps():
            if result.step == moment:
                break
        summary = resume(run, {"reward_funcs": [Failing(31, calls=moment)]}).train()
        same = ("stopped_by", "reason", "step", "use", "best_reward", "final_reward")
        assert {key: summary[key] for key in same} == {key: whole[key] for key in same}, moment
        assert trace(run) == straight, moment
        assert (run / summary["use"]["checkpoint"]).is_dir()


def test_a_checkpoint_that_is_saved_again_after_a_resume_costs_none_from_before_a_fall(
    make: Make, resume: Make, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for result in make({"reward_funcs": [Rising(31)]}, **FAILING).steps():
        if result.step == 31:
            break
    assert result.alarm.onset == 31
    kept = [path.name for path in list_checkpoints(run)]
    assert len(kept) == 3, "the best, the best from before the fall, and the newest"
    resume(run, {"reward_funcs": [Rising(31, calls=31)]}).save()
    assert [path.name for path in list_checkpoints(run)] == kept


def test_a_collapse_that_is_only_told_of_lets_the_run_go_on(make: Make, tmp_path: Path) -> None:
    trainer = make({"reward_funcs": [Failing(31)]}, **FAILING | {"max_steps": 45}, collapse_action="warn")
    summary = trainer.train()
    assert (summary["stopped_by"], summary["step"]) == ("max_steps", 45)
    assert events(tmp_path / "run").count("warn") == 1
    assert summary["use"]["step"] <= 30
    assert (tmp_path / "run" / summary["use"]["checkpoint"]).is_dir()


def test_a_collapse_without_a_checkpoint_from_before_says_so(make: Make) -> None:
    summary = make({"reward_funcs": [Failing(31)]}, **FAILING | {"save_steps": 100}).train()
    assert summary["stopped_by"] == "collapse"
    assert summary["use"] is None
    assert summary["reason"].endswith("lower save_steps, and start again with a lower learning_rate.")


@pytest.mark.slow
def test_a_learning_rate_that_jumps_is_caught_and_the_way_back_is_good(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The embedded model learns to add, then one setting ruins it: what the summary points at still adds."""
    usual = trainer_module.learning_rate_at
    monkeypatch.setattr(trainer_module, "learning_rate_at", lambda step, config: 5e-3 if step >= 30 else usual(step, config))
    config = recipe(
        "embedded",
        output_dir=tmp_path / "run",
        prompts_per_step=16,
        learning_rate=5e-4,
        warmup_steps=0,
        save_steps=5,
        save_total_limit=1,
        eval_steps=0,
        eval_size=64,
        forecast="off",
        reward_workers=0,
        sinks=(),
    )
    with GRPOTrainer(config) as trainer:
        summary = trainer.train()
        ruined = trainer.evaluate()
        trainer.policy.load_weights(tmp_path / "run" / summary["use"]["checkpoint"])
        sound = trainer.evaluate()
    assert summary["stopped_by"] == "collapse"
    assert summary["step"] <= 40
    assert summary["use"]["step"] == 25
    assert sound > 0.7
    assert ruined < 0.3
