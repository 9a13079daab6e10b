"""What ends a run before its last step, and what is saved then."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.system.soak import trace
from grpo_fast.compute import Budget
from grpo_fast.config import Config, ConfigError
from grpo_fast.rewards import RewardError
from grpo_fast.train import GRPOTrainer, NonFiniteGradientError
from grpo_fast.train.checkpoint import list_checkpoints
from grpo_fast.train.logged import named_apart
from grpo_fast.train.oversight import NoRewardError
from grpo_fast.types import Completion
from tests.train.trainer.runs import LETTERS, Make, Straight, beliefs, events, rows, vowels, weights


@pytest.mark.parametrize(
    ("limits", "stopped_by", "least"),
    [
        ({"max_steps": 2}, "max_steps", 2),
        ({"max_tokens": 200.0}, "max_tokens", 1),
        ({"max_flops": 2e7}, "max_flops", 1),
        ({"max_wall_hours": 1e-9}, "max_wall_hours", 1),
        ({"max_gpu_hours": 1e-9}, "max_gpu_hours", 1),
        ({"max_energy_kwh": 1e-12}, "max_energy_kwh", 1),
        ({"max_money": 1e-9, "price_per_gpu_hour": 1.0}, "max_money", 1),
    ],
)
def test_each_budget_ends_the_run(limits: dict[str, float], stopped_by: str, least: int, make: Make, tmp_path: Path) -> None:
    trainer = make(**{"max_steps": 50} | limits)
    summary = trainer.train()
    assert summary["stopped_by"] == stopped_by
    assert summary["reason"].startswith(f"{stopped_by}={limits[stopped_by]:g} is reached: ")
    assert least <= summary["step"] < 50
    assert (tmp_path / "run" / f"checkpoint-{summary['step']}").is_dir()
    assert events(tmp_path / "run")[-1] == "budget"


def test_a_budget_given_in_python_holds(make: Make, tmp_path: Path) -> None:
    summary = make({"budget": Budget(steps=3)}, max_steps=50).train()
    assert (summary["stopped_by"], summary["step"], summary["max_steps"]) == ("max_steps", 3, 50)
    summary = make({"budget": Budget(tokens=1e9)}, max_steps=2, output_dir=tmp_path / "other").train()
    assert (summary["stopped_by"], summary["step"]) == ("max_steps", 2)


def test_a_budget_spent_in_mid_step_keeps_the_rollout(whole: Straight, tmp_path: Path) -> None:
    used = [row["num_tokens"] for row in whole.trace[1:]]
    config = whole.config.replace(output_dir=tmp_path / "run", max_tokens=float(used[3] + 1))
    with GRPOTrainer(config, task=LETTERS, reward_funcs=[vowels]) as trainer:
        summary = trainer.train()
    assert (summary["stopped_by"], summary["step"]) == ("max_tokens", 4)
    again = Config.parse(config.model_dump(exclude={"max_tokens"}))
    with GRPOTrainer.resume(config.output_dir, config=again, task=LETTERS, reward_funcs=[vowels]) as trainer:
        assert trainer._pending is not None
        trainer.train()
    assert trace(config.output_dir) == whole.trace


def test_a_run_that_ends_without_any_reward_fails_and_steps_without_one_do_not_end_it(
    make: Make, resume: Make, tmp_path: Path
) -> None:
    rewarded = False

    def nothing(completions: list[str], **columns: Any) -> list[float | None]:
        return vowels(completions) if rewarded else [None] * len(completions)

    given = {"reward_funcs": [nothing]}
    trainer = make(given, forecast="stop", max_steps=3, save_steps=2, reward_workers=0)
    before, run = weights(trainer), tmp_path / "run"
    with pytest.raises(NoRewardError, match=r"'nothing' gave None .* of the 3 steps up to step 3, .* again with --overwrite"):
        trainer.train()
    assert trainer._oversight.predictor.num_observations == 0
    assert torch.equal(weights(trainer), before)
    assert [row["message"] for row in rows(run, "events") if row["event"] == "warn"] == [
        "before training no answer to 24 prompts got a reward: reward functions gave None or NaN for each, or failed",
        "reward functions gave None or NaN for every completion of step 1, so nothing is learnt from it",
    ]
    for row in rows(run):
        assert row["reward"] is None
        assert row["frac_reward_zero_std"] == 1.0
        assert row["loss"] == 0.0
    with pytest.raises(NoRewardError, match="'nothing' gave None"):
        resume(run, given).train()
    rewarded = True
    summary = resume(run, given, max_steps=4).train()
    assert (summary["step"], summary["stopped_by"]) == (4, "max_steps")


def test_a_loop_that_is_left_before_any_reward_is_no_failure(make: Make) -> None:
    trainer = make({"reward_funcs": [lambda completions, **columns: [None] * len(completions)]}, reward_workers=0)
    next(loop := trainer.steps())
    loop.close()
    assert (trainer.summary["stopped_by"], trainer.summary["final_reward"]) == ("user", None)


def test_a_run_without_any_reward_for_many_steps_fails_and_can_be_resumed(make: Make, resume: Make, tmp_path: Path) -> None:
    mended = False

    def sometimes(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
        if mended or trainer_state.global_step == 1:
            return vowels(completions)
        return [math.nan] * len(completions)

    settings = {"max_steps": 20, "save_steps": 100, "reward_workers": 0}
    with pytest.raises(
        NoRewardError, match=r"function 'sometimes' gave None or NaN, .* of the 10 steps up to step 12, .* --resume"
    ):
        make({"reward_funcs": [sometimes]}, **settings).train()
    run = tmp_path / "run"
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-12"]
    own = [set(row) for row in rows(run)]
    assert len(own) == 12
    assert "kl" in own[1] - own[0]
    for names in own:
        logged = named_apart(dict.fromkeys(set.union(*own), 0.0), names)
        assert all(name.startswith("logged/") for name in logged), "what is logged has one name in every step"
    with pytest.raises(NoRewardError, match="of the 11 steps up to step 13"):
        resume(run, {"reward_funcs": [sometimes]}).train()
    mended = True
    assert resume(run, {"reward_funcs": [sometimes]}).train()["step"] == 20


def test_the_best_checkpoint_is_kept_and_rewards_of_none_are_no_best(make: Make, tmp_path: Path) -> None:
    given = iter([None, 0.2, 0.9, -5.0, -5.0, -5.0])

    def scripted(completions: list[str], **columns: Any) -> list[float | None]:
        value = next(given)
        return [value] * len(completions)

    summary = make({"reward_funcs": [scripted]}, save_steps=1, save_total_limit=1).train()
    assert (summary["best_step"], summary["best_reward"]) == (3, pytest.approx(0.55))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-6"]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    assert (state["global_step"], state["best_global_step"]) == (6, 3)
    assert len(state["log_history"]) == 6


def test_a_reward_that_raises_ends_the_run_with_what_was_trained(make: Make, resume: Make, tmp_path: Path) -> None:
    calls = 0

    def flawed(completions: list[str], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyError("answer")
        return vowels(completions)

    with pytest.raises(RewardError, match=r"reward function 'flawed' raised KeyError: 'answer'"):
        make({"reward_funcs": [flawed]}).train()
    run = tmp_path / "run"
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-2"]
    resume(run, {"reward_funcs": [flawed]}).train()
    make(output_dir=tmp_path / "other").train()
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(tmp_path / "other")]


def test_a_reward_that_raises_may_be_left_out(make: Make, tmp_path: Path) -> None:
    def flawed(completions: list[str], **columns: Any) -> list[float]:
        raise KeyError("answer")

    make({"reward_funcs": [vowels, flawed]}, reward_on_error="none", max_steps=2).train()
    assert events(tmp_path / "run").count("warn") == 2
    assert rows(tmp_path / "run")[0]["rewards/flawed/mean"] is None
    assert rows(tmp_path / "run")[0]["reward"] > 0


def test_a_gradient_that_is_not_finite_ends_the_run_with_what_was_trained(make: Make, tmp_path: Path) -> None:
    trainer = make(bypass_old_logprobs=True)
    take = trainer._rollouts._collector.collect

    def spoilt(step: int, timer: Any) -> Any:
        found = take(step, timer)
        if step == 3:
            for group in found.groups:
                group.reward = [1.0, 0.0, 0.0, 0.0]
                group.completions[1:] = [
                    Completion(c.token_ids, (-1000.0,) * len(c.token_ids), c.finish_reason, c.text)
                    for c in group.completions[1:]
                ]
        return found

    trainer._rollouts._collector.collect = spoilt  # type: ignore[method-assign]
    with pytest.raises(NonFiniteGradientError, match=r"this update was not made\. Look at the last rewards"):
        trainer.train()
    assert weights(trainer).isfinite().all()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


def test_a_reward_outside_its_range_is_told_and_can_be_mended(make: Make, resume: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the mean reward 0\.\d+ of the untrained policy is outside reward_range="):
        make(forecast="stop", reward_range=(0.5, 1.0)).train()
    trainer = make(forecast="stop", reward_range=(0.5, 1.0), baseline_probe=0, overwrite=True)
    with pytest.raises(ConfigError, match=r"the mean reward 0\.\d+ of step 1 is outside reward_range=\(0\.5, 1\.0\)"):
        trainer.train()
    summary = resume(tmp_path / "run", reward_range=(0.0, 1.0)).train()
    assert summary["step"] == 6
    assert [row["step"] for row in beliefs(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_rounding_at_the_end_of_the_range_is_no_mistake(make: Make) -> None:
    def perfect(completions: list[str], **columns: Any) -> list[float]:
        return [0.1] * len(completions)

    for end in ((0.0, 0.1), (0.1, 1.0)):
        trainer = make({"reward_funcs": [perfect]}, forecast="stop", reward_range=end, max_steps=2, overwrite=True)
        assert trainer.train()["step"] == 2


def test_a_plateau_ends_the_run(make: Make, tmp_path: Path) -> None:
    def same(completions: list[str], **columns: Any) -> list[float]:
        return [0.9, 1.0] * (len(completions) // 2)

    settings = {"max_steps": 200, "learning_rate": 1e-7, "forecast_epsilon": 0.1, "forecast_min_steps": 5, "save_steps": 500}
    trainer = make({"reward_funcs": [same]}, forecast="stop", reward_range=(0.0, 1.0), **settings)
    summary = trainer.train()
    assert summary["stopped_by"] == "forecast"
    assert summary["step"] < 200
    assert summary["saved"]["steps"] == 1 - summary["step"] / 200
    assert summary["reason"].startswith(f"At step {summary['step']} there is a ")
    assert "chance that less than 0.1 reward is left to gain in the budget" in summary["reason"]
    assert events(tmp_path / "run")[-1] == "stop"

    warned = make(
        {"reward_funcs": [same]},
        forecast="warn",
        reward_range=(0.0, 1.0),
        output_dir=tmp_path / "warned",
        **settings | {"max_steps": summary["step"] + 5},
    )
    assert warned.train()["stopped_by"] == "max_steps"
    assert events(tmp_path / "warned").count("warn") <= 1


def test_a_warning_comes_once_also_over_a_resume(make: Make, resume: Make, tmp_path: Path) -> None:
    def same(completions: list[str], **columns: Any) -> list[float]:
        return [0.9, 1.0] * (len(completions) // 2)

    trainer = make(
        {"reward_funcs": [same]},
        forecast="warn",
        reward_range=(0.0, 1.0),
        max_steps=40,
        learning_rate=1e-7,
        forecast_epsilon=0.1,
        forecast_min_steps=5,
    )
    for result in trainer.steps():
        assert result.decision is not None
        if result.decision.stop:
            break
    assert events(tmp_path / "run").count("warn") == 1
    again = resume(tmp_path / "run", {"reward_funcs": [same]})
    decisions = [result.decision for result in again.steps()]
    assert any(decision is not None and decision.stop for decision in decisions)
    assert events(tmp_path / "run").count("warn") == 1


def same(completions: list[str], **columns: Any) -> list[float]:
    return [0.9, 1.0] * (len(completions) // 2)


SETTLED: dict[str, Any] = {
    "max_steps": 200,
    "learning_rate": 1e-7,
    "forecast": "stop",
    "forecast_epsilon": 0.1,
    "forecast_min_steps": 5,
    "reward_range": (0.0, 1.0),
    "resume_if_exists": True,
}


def test_a_run_that_the_forecast_ended_goes_on_only_after_a_change(make: Make, resume: Make, tmp_path: Path) -> None:
    given: dict[str, Any] = {"reward_funcs": [same]}
    trainer = make(given, **SETTLED)
    first = trainer.train()
    step, run = first["step"], tmp_path / "run"
    assert first["stopped_by"] == "forecast"
    before = trace(run)
    for again in (trainer, make(given, **SETTLED), resume(run, given), resume(run, given, save_steps=7)):
        summary = again.train()
        assert (summary["stopped_by"], summary["step"]) == ("forecast", step)
        assert summary["reason"] == (
            f"The forecast had ended this run: {first['reason']} Set forecast='warn' or 'off', or a larger limit, to continue."
        )
        assert summary["forecast"] == first["forecast"]
        assert (summary["use"], summary["final_reward"]) == (first["use"], first["final_reward"])
    assert trace(run) == before
    assert events(run)[-2:] == ["resume", "stop"]

    for changes in ({"forecast": "warn"}, {"forecast_confidence": 0.99}, {"max_steps": 300}):
        longer = resume(run, given, **SETTLED | changes)
        assert next(iter(longer.steps())).step > step
        longer.close()


def test_a_run_goes_on_past_the_forecast_to_the_end_and_has_ended_then(make: Make, resume: Make, tmp_path: Path) -> None:
    given: dict[str, Any] = {"reward_funcs": [same]}
    step = make(given, **SETTLED).train()["step"]
    summary = resume(tmp_path / "run", given, forecast="warn", max_steps=step + 2).train()
    assert (summary["stopped_by"], summary["step"]) == ("max_steps", step + 2)
    told = resume(tmp_path / "run", given).train()["reason"]
    assert told.startswith(f"max_steps={step + 2} is reached: {step + 2} steps are done")
    assert told.endswith(". The run had ended already; set a larger max_steps to continue.")


def test_a_killed_run_that_was_to_go_on_past_the_forecast_does(make: Make, resume: Make, tmp_path: Path) -> None:
    given: dict[str, Any] = {"reward_funcs": [same]}
    step = make(given, **SETTLED).train()["step"]
    longer = resume(tmp_path / "run", given, max_steps=300)
    longer._parts.open(step)  # and it is killed before it saves anything
    longer.close()
    assert resume(tmp_path / "run", given)._oversight.ending is None
    assert make(given, **SETTLED)._oversight.ending is not None, "the first command, given again"


def test_a_spent_budget_is_told_with_what_makes_the_run_go_on(make: Make, resume: Make, tmp_path: Path) -> None:
    first = make(max_tokens=2000.0, max_steps=50, forecast="warn").train()
    summary = resume(tmp_path / "run").train()
    assert (summary["stopped_by"], summary["step"]) == ("max_tokens", first["step"])
    assert summary["reason"] == f"{first['reason']} The run had ended already; set a larger max_tokens to continue."
    assert summary["forecast"] == first["forecast"] is not None


def test_held_out_reward_after_training_is_not_that_of_the_untrained_policy(make: Make) -> None:
    trainer = make(max_steps=1, eval_steps=0)
    trainer.train()
    after = trainer.evaluate()
    summary = trainer.train()
    assert (summary["initial_eval_reward"], summary["eval_reward"]) == (None, after)


def test_what_ends_several_ranks_is_told_before_the_engine_is_closed(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a server hangs, that takes time, and torchrun ends this rank as another has left."""
    trainer = make()
    told: list[str] = []
    monkeypatch.setattr(trainer._parts.engine, "close", lambda: told.extend(caplog.messages))
    monkeypatch.setattr(trainer._world, "size", 2)
    with pytest.raises(ValueError, match="mine"), trainer:
        raise ValueError("an error of mine")
    assert "ValueError: an error of mine" in told
