from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.system.command_line import CommandLine
from benchmarks.system.soak import trace
from grpo_fast.compute import Budget
from grpo_fast.config import Config, ConfigError
from grpo_fast.law import OnlinePredictor
from grpo_fast.objective import OBJECTIVES
from grpo_fast.recipes import recipe
from grpo_fast.rewards import RewardError
from grpo_fast.rollout.engine import RolloutError, SamplingParams, WeightSyncError
from grpo_fast.rollout.transformers_engine import TransformersEngine
from grpo_fast.sinks import RunInfo
from grpo_fast.tasks.task import Task
from grpo_fast.train import CheckpointError, GRPOTrainer, NonFiniteGradientError, StepResult
from grpo_fast.train import trainer as trainer_module
from grpo_fast.train.checkpoint import list_checkpoints
from grpo_fast.types import Completion

Make = Callable[..., GRPOTrainer]


def vowels(completions: list[str], **columns: Any) -> list[float]:
    return [sum(letter in "aei" for letter in text) / max(1, len(text)) for text in completions]


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


def rows(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def beliefs(run: Path) -> list[dict[str, Any]]:
    """What was forecast, without what it costs: that is measured."""
    return [
        {key: value for key, value in row.items() if not key.endswith(("spending", "spent"))} for row in rows(run, "forecasts")
    ]


def events(run: Path) -> list[str]:
    return [row["event"] for row in rows(run, "events")]


def weights(trainer: GRPOTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer._parts.policy.model.parameters()])


@pytest.fixture(scope="module")
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


@dataclass
class Straight:
    """The undisturbed run."""

    config: Config
    trace: list[dict[str, Any]] = field(default_factory=list)
    forecasts: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    weights: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


ROWS = [{"prompt": f"{a}{b}=", "answer": a} for a in "abcdefgh" for b in "abcd"]
LETTERS = Task("letters", ROWS[:24], ROWS[24:], ("exact_match",), "exact_match")


@pytest.fixture(scope="module")
def whole(straight: dict[str, Any]) -> Straight:
    result = Straight(Config.parse(straight))
    with GRPOTrainer(result.config, task=LETTERS, reward_funcs=[vowels]) as trainer:
        result.summary = trainer.train()
        result.weights = weights(trainer)
    run = result.config.output_dir
    result.trace, result.forecasts = trace(run), beliefs(run)
    return result


def test_iterating_gives_each_step(make: Make) -> None:
    trainer = make()
    seen: list[StepResult] = list(trainer.steps())
    assert [result.step for result in seen] == [1, 2, 3, 4, 5, 6]
    assert trainer.global_step == 6
    first = seen[0]
    assert len(first.groups) == 3
    assert all(len(group.advantages) == 4 for group in first.groups)
    assert first.metrics["reward"] == pytest.approx(sum(sum(g.reward) for g in first.groups) / 12)
    assert first.forecast is None, "forecast='off'"


def test_a_run_leaves_everything_a_reader_needs(whole: Straight) -> None:
    run = whole.config.output_dir
    names = {path.name for path in run.iterdir()}
    expected = {"config.toml", "metrics.jsonl", "forecasts.jsonl", "events.jsonl", "completions.jsonl"}
    assert expected | {"trainer_state.json", "summary.json", "checkpoint-8"} <= names
    assert not any(name.startswith(".") for name in names)
    assert Config.from_toml(run / "config.toml") == whole.config
    assert json.loads((run / "summary.json").read_text(encoding="utf-8")) == whole.summary
    assert [row["step"] for row in whole.trace] == list(range(9)), "step 0 is the evaluation before training"
    facts = json.loads((run / "facts.json").read_text(encoding="utf-8"))
    assert facts["start"] == whole.summary["baseline_reward"]
    assert facts["start_error"] > 0
    assert facts["size_b"] == pytest.approx(whole.weights.numel() / 1e9)
    assert [row["step"] for row in whole.forecasts] == list(range(1, 9))
    assert len(rows(run, "completions")) == 8 * whole.config.log_completions
    assert events(run)[:3] == ["start", "probe", "eval"]


NAMES = {
    "step",
    "progress",
    "learning_rate",
    "epoch",
    "reward",
    "reward_std",
    "rewards/vowels/mean",
    "rewards/vowels/std",
    "frac_reward_zero_std",
    "frac_reward_all_wrong",
    "alarm/reward",
    "alarm/entropy_up",
    "alarm/entropy_down",
    "alarm/grad_norm",
    "alarm/truncation",
    "alarm/kl",
    "alarm/zero_std",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "loss",
    "grad_norm",
    "entropy",
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "num_tokens",
    "step_time",
    "time/rollout",
    "time/reward",
    "time/score",
    "time/train",
    "time/sync",
    "time/other",
    "flops",
    "flops/prefill",
    "flops/decode",
    "flops/reference",
    "flops/forward",
    "flops/backward",
    "tokens/prompt",
    "tokens/completion",
    "tokens/trained",
    "tokens/dropped",
    "gpu_seconds",
    "energy_kwh",
    "money",
    "budget/steps",
    "eval_reward",
    "refilled_prompts",
}


def test_metrics_have_their_names_and_meanings(whole: Straight) -> None:
    last = rows(whole.config.output_dir)[-1]
    assert set(last) >= NAMES
    assert last["progress"] == 1.0
    assert last["budget/steps"] == 0.0
    assert last["step_time"] == pytest.approx(sum(v for k, v in last.items() if k.startswith("time/")))
    assert last["flops"] == sum(last[f"flops/{phase}"] for phase in ("prefill", "decode", "reference", "forward", "backward"))
    assert last["sampling/sampling_logp_difference/max"] < 1e-4
    assert last["flops/reference"] > 0
    assert last["clip_ratio/region_mean"] >= 0


def test_reward_rises_where_it_can(make: Make) -> None:
    trainer = make(max_steps=30, learning_rate=1e-2, prompts_per_step=8, save_steps=100)
    reward = [result.metrics["reward"] for result in trainer.steps()]
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 0.2


@pytest.mark.parametrize(
    "settings",
    [
        *({"loss_type": name, "beta": 0.01} for name in sorted(OBJECTIVES) if name != "cispo"),
        {"loss_type": "cispo", "epsilon_high": 5.0, "scale_rewards": "none"},
        {"dtype": "bfloat16"},
        {"gradient_checkpointing": True, "mask_truncated_completions": True},
        {"top_k": 5, "top_p": 0.9, "temperature": 1.3, "scale_rewards": "batch"},
        {"entropy_coef": 0.01, "tokens_per_microbatch": 20, "stop": ("a",)},
        {"reward_workers": 1},
        {"keep_dead_rows_for_metrics": True, "num_iterations": 2},
    ],
    ids=lambda settings: ", ".join(f"{key}={value}" for key, value in settings.items()),
)
def test_settings_work_together(settings: dict[str, Any], make: Make, share_of_vowels: Callable[..., list[float]]) -> None:
    trainer = make({"reward_funcs": [share_of_vowels]}, **settings, max_steps=2)
    before = weights(trainer)
    for result in trainer.steps():
        assert math.isfinite(result.metrics["loss"])
        assert result.metrics["grad_norm"] > 0
        close = 0.1 if settings.get("dtype") == "bfloat16" else 1e-4
        assert result.metrics["sampling/sampling_logp_difference/max"] < (3 if "top_k" in settings else close)
    assert not torch.equal(weights(trainer), before)


@pytest.mark.parametrize("keep", [False, True])
def test_rows_kept_for_metrics_are_paid_for(keep: bool, make: Make) -> None:
    """Without any variance nothing is trained on; with the rows kept there is still an entropy, and its cost."""

    def always(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    trainer = make({"reward_funcs": [always]}, keep_dead_rows_for_metrics=keep, max_steps=1)
    for result in trainer.steps():
        assert ("entropy" in result.metrics) == keep
        assert (result.metrics["flops/reference"] > 0) == keep
        assert result.metrics["flops/backward"] == 0


def test_evaluation_comes_when_asked_and_at_the_end(whole: Straight) -> None:
    assert [row["step"] for row in whole.trace if "eval_reward" in row] == [0, 2, 4, 6, 8]


def test_same_seed_same_run_bit_by_bit(whole: Straight, tmp_path: Path) -> None:
    config = whole.config.replace(output_dir=tmp_path / "run")
    with GRPOTrainer(config, task=LETTERS, reward_funcs=[vowels]) as trainer:
        trainer.train()
        assert torch.equal(weights(trainer), whole.weights)
    assert trace(config.output_dir) == whole.trace
    assert beliefs(config.output_dir) == whole.forecasts


def test_another_seed_is_another_run(whole: Straight, tmp_path: Path) -> None:
    config = whole.config.replace(output_dir=tmp_path / "run", seed=1, max_steps=8)
    with GRPOTrainer(config, task=LETTERS, reward_funcs=[vowels]) as trainer:
        first = next(iter(trainer.steps()))
    assert first.metrics["loss"] != whole.trace[1]["loss"]


@pytest.mark.parametrize("moment", range(1, 8))
def test_leaving_and_resuming_is_the_straight_run(moment: int, whole: Straight, tmp_path: Path) -> None:
    config = whole.config.replace(output_dir=tmp_path / "run")
    with GRPOTrainer(config, task=LETTERS, reward_funcs=[vowels]) as trainer:
        for result in trainer.steps():
            if result.step == moment:
                break
    assert trainer.summary["stopped_by"] == "user"
    assert (config.output_dir / f"checkpoint-{moment}").is_dir()
    with GRPOTrainer.resume(config.output_dir, task=LETTERS, reward_funcs=[vowels]) as trainer:
        assert trainer.global_step == moment
        trainer.train()
        assert torch.equal(weights(trainer), whole.weights)
    assert trace(config.output_dir) == whole.trace
    assert beliefs(config.output_dir) == whole.forecasts


class Stumbling(TransformersEngine):
    """An engine that sends the process a signal in the middle of a rollout."""

    at_version = -1

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, num_generations: int, seed: int
    ) -> list[list[Completion]]:
        answers = super().generate(prompts, sampling, num_generations=num_generations, seed=seed)
        if num_generations > 1 and self.weight_version == self.at_version:
            self.at_version = -1  # once: a second signal, from the refill, would end the process
            os.kill(os.getpid(), signal.SIGINT)
        return answers


@pytest.mark.parametrize("version", [0, 2, 3])
def test_an_interrupted_rollout_is_saved_and_used(version: int, whole: Straight, tmp_path: Path) -> None:
    config = whole.config.replace(output_dir=tmp_path / "run")
    trainer = GRPOTrainer(config, task=LETTERS, reward_funcs=[vowels])
    policy = trainer._parts.policy
    engine = Stumbling(policy.model, policy.tokenizer)
    engine.at_version = version
    trainer._collector._engine = engine
    trainer._parts.engine = engine
    with trainer:
        summary = trainer.train()
    assert summary["stopped_by"] == "interrupt"
    assert summary["reason"].startswith(f"SIGINT came after step {version}; the run is saved.")
    assert f"grpo-fast train --resume {config.output_dir}" in summary["reason"]
    assert events(config.output_dir)[-1] == "interrupt"
    state = json.loads((config.output_dir / f"checkpoint-{version}" / "state.json").read_text(encoding="utf-8"))
    assert len(state["pending"]["groups"]) >= 3
    with GRPOTrainer.resume(config.output_dir, task=LETTERS, reward_funcs=[vowels]) as trainer:
        assert trainer._pending is not None
        trainer.train()
        assert torch.equal(weights(trainer), whole.weights)
    assert trace(config.output_dir) == whole.trace


class Dying(TransformersEngine):
    """An engine that fails for good, in the rollout after a version or in the sync to it."""

    rollout_after = sync_to = -1

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, num_generations: int, seed: int
    ) -> list[list[Completion]]:
        if num_generations > 1 and self.weight_version == self.rollout_after:
            raise RolloutError("the server is gone")
        return super().generate(prompts, sampling, num_generations=num_generations, seed=seed)

    def sync_weights(self, policy: torch.nn.Module, version: int) -> dict[str, float]:
        if version == self.sync_to:
            raise WeightSyncError("half of the weights are gone")
        return super().sync_weights(policy, version)


@pytest.mark.parametrize("fault", [{"rollout_after": 0}, {"rollout_after": 5}, {"sync_to": 1}, {"sync_to": 5}], ids=str)
def test_an_engine_that_dies_leaves_a_run_to_go_on_with(fault: dict[str, int], whole: Straight, tmp_path: Path) -> None:
    config = whole.config.replace(output_dir=tmp_path / "run")
    [version] = fault.values()
    with GRPOTrainer(config, task=LETTERS, reward_funcs=[vowels]) as trainer:
        engine = Dying(trainer.policy.model, trainer.policy.tokenizer)
        vars(engine).update(fault)
        trainer._collector._engine = trainer._parts.engine = engine
        with pytest.raises(RolloutError, match=r"(is|are) gone"):
            trainer.train()
    assert list_checkpoints(config.output_dir)[-1].name == f"checkpoint-{version}"
    with GRPOTrainer.resume(config.output_dir, task=LETTERS, reward_funcs=[vowels]) as trainer:
        assert trainer.global_step == version
        trainer.train()
        assert torch.equal(weights(trainer), whole.weights)
    assert trace(config.output_dir) == whole.trace


def test_a_run_without_a_checkpoint_starts_again(whole: Straight, tmp_path: Path) -> None:
    config = whole.config.replace(output_dir=tmp_path / "run")
    with GRPOTrainer(config, task=LETTERS, reward_funcs=[vowels]) as trainer:
        for result in trainer.steps():
            if result.step == 2:
                break
    shutil.rmtree(config.output_dir / "checkpoint-2")
    with GRPOTrainer.resume(config.output_dir, task=LETTERS, reward_funcs=[vowels]) as again:
        assert again.global_step == 0
        again.train()
    assert trace(config.output_dir) == whole.trace
    assert events(config.output_dir)[:3] == ["start", "probe", "eval"]


def test_an_error_in_the_loop_keeps_what_was_trained(make: Make, tmp_path: Path) -> None:
    def fail() -> None:
        with make() as trainer:
            for result in trainer.steps():
                if result.step == 2:
                    raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        fail()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["stopped_by"] == "user"


def test_leaving_the_loop_and_going_on_with_the_same_trainer(whole: Straight, tmp_path: Path) -> None:
    config = whole.config.replace(output_dir=tmp_path / "run")
    inside = -time.perf_counter()
    with GRPOTrainer(config, task=LETTERS, reward_funcs=[vowels]) as trainer:
        for result in trainer.steps():
            if result.step == 4:
                break
        inside += time.perf_counter()
        assert trainer.summary["reason"] == "The loop was left after step 4."
        time.sleep(0.5)
        inside -= time.perf_counter()
        assert [result.step for result in trainer.steps()] == [5, 6, 7, 8]
        inside += time.perf_counter()
        assert trainer.summary["stopped_by"] == "max_steps"
        assert trainer.summary["compute"]["wall_hours"] * 3600 < inside, "time outside the loop is not the run's"
    assert trace(config.output_dir) == whole.trace


def test_leaving_at_the_end_keeps_the_real_reason(make: Make) -> None:
    trainer = make(max_steps=2)
    for result in trainer.steps():
        if result.step == 2:
            break
    assert trainer.summary["stopped_by"] == "max_steps"


def test_stop_ends_after_the_present_step(make: Make, tmp_path: Path) -> None:
    trainer = make()
    for result in trainer.steps():
        if result.step == 2:
            trainer.stop("good enough")
    assert trainer.summary["stopped_by"] == "user"
    assert trainer.summary["step"] == 2
    assert trainer.summary["reason"] == "good enough, after step 2."
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert [result.step for result in trainer.steps()] == [3, 4, 5, 6]


def test_closing_ends_a_loop_that_is_still_held(make: Make, tmp_path: Path) -> None:
    trainer = make()
    loop = trainer.steps()
    next(loop)
    next(loop)
    trainer.close()
    assert (trainer.summary["stopped_by"], trainer.summary["step"]) == ("user", 2)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert list(loop) == []


def test_summary_of_a_whole_run(whole: Straight) -> None:
    summary = whole.summary
    assert summary["stopped_by"] == "max_steps"
    assert (summary["step"], summary["max_steps"]) == (8, 8)
    assert summary["saved"] == {"steps": 0.0, "flops": 0.0, "gpu_hours": 0.0, "money": 0.0}
    assert summary["final_reward"] == pytest.approx(sum(row["reward"] for row in whole.trace[1:]) / 8)
    assert summary["eval_reward"] == whole.trace[-1]["eval_reward"]
    assert summary["initial_eval_reward"] == whole.trace[0]["eval_reward"]
    assert summary["forecast"]["step"] == 8
    assert summary["compute"]["tokens"] == whole.trace[-1]["num_tokens"]


def test_the_saved_model_is_the_trained_one(whole: Straight) -> None:
    path = whole.config.output_dir / "checkpoint-8"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), whole.weights)
    assert len(AutoTokenizer.from_pretrained(path)) == model.config.vocab_size


def test_saving_by_hand(make: Make, tmp_path: Path) -> None:
    trainer = make(overwrite=True)
    assert trainer.save() == tmp_path / "run" / "checkpoint-0"
    for result in trainer.steps():
        if result.step == 2:
            assert trainer.save() == tmp_path / "run" / "checkpoint-2"
            break
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-0", "checkpoint-2"]


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
    assert summary["reason"].startswith(f"{stopped_by} is reached: ")
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


def test_rewards_of_none_do_not_end_a_run(make: Make, tmp_path: Path) -> None:
    def nothing(completions: list[str], **columns: Any) -> list[None]:
        return [None] * len(completions)

    trainer = make({"reward_funcs": [nothing]}, forecast="stop", max_steps=3, save_steps=1)
    before = weights(trainer)
    summary = trainer.train()
    assert summary["step"] == 3
    assert trainer._oversight.predictor.num_observations == 0
    assert summary["final_reward"] is None
    assert summary["best_reward"] is None
    assert torch.equal(weights(trainer), before)
    for row in rows(tmp_path / "run"):
        assert row["reward"] is None
        assert row["frac_reward_zero_std"] == 1.0
        assert row["loss"] == 0.0


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
    trainer = make(top_k=5)
    take = trainer._collector.collect

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

    trainer._collector.collect = spoilt  # type: ignore[method-assign]
    with pytest.raises(NonFiniteGradientError, match=r"this update was not made\. Look at the last rewards"):
        trainer.train()
    assert weights(trainer).isfinite().all()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


def test_a_reward_outside_its_range_is_told_and_can_be_mended(make: Make, resume: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the mean reward 0\.\d+ of the untrained policy lies outside reward_range="):
        make(forecast="stop", reward_range=(0.5, 1.0)).train()
    trainer = make(forecast="stop", reward_range=(0.5, 1.0), baseline_probe=0, overwrite=True)
    with pytest.raises(ConfigError, match=r"the mean reward 0\.\d+ of step 1 lies outside reward_range=\(0\.5, 1\.0\)"):
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
    assert summary["reason"].startswith(f"At step {summary['step']} the gain left in the budget is below 0.1")
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


def test_resuming_may_move_the_end(whole: Straight, make: Make, resume: Make, tmp_path: Path) -> None:
    make(max_steps=4, forecast="stop").train()
    longer = resume(tmp_path / "run", max_steps=7)
    summary = longer.train()
    assert (summary["step"], summary["max_steps"]) == (7, 7)
    assert longer._oversight.predictor.num_observations == 7
    assert rows(tmp_path / "run")[-1]["progress"] == 1.0
    shorter = resume(tmp_path / "run", max_steps=5)
    assert shorter.train()["stopped_by"] == "max_steps"
    assert len(rows(tmp_path / "run")) == 7
    with pytest.raises(ConfigError, match=r"cannot change seed \(0 -> 5\)"):
        resume(tmp_path / "run", seed=5)


def test_resuming_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nowhere"):
        GRPOTrainer.resume(tmp_path / "nowhere")


def test_resuming_from_a_damaged_checkpoint_names_the_way_out(make: Make, resume: Make, tmp_path: Path) -> None:
    make().train()
    (tmp_path / "run" / "checkpoint-6" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"delete .*checkpoint-6 to resume from checkpoint-3"):
        resume(tmp_path / "run")
    state = tmp_path / "run" / "checkpoint-3" / "state.json"
    for file in (tmp_path / "run" / "checkpoint-6").iterdir():
        file.unlink()
    (tmp_path / "run" / "checkpoint-6").rmdir()
    assert resume(tmp_path / "run").global_step == 3
    text = state.read_text(encoding="utf-8")
    state.write_text(text.replace('"version": 3', '"version": 9'), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"another version of grpo_fast \(state 9\)"):
        resume(tmp_path / "run")


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


class Failing:
    """A verifier that gives a twentieth of the reward from some step on."""

    def __init__(self, from_step: int, *, calls: int = 0) -> None:
        self.calls = calls
        self.from_step = from_step

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        self.calls += 1
        return [(0.05 if self.calls >= self.from_step else 1.0) * value for value in vowels(completions)]


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
    assert summary["reason"].startswith(f"The policy collapses: by step {summary['step']} the reward fell from 0.")
    assert summary["reason"].endswith(
        f"Go back to {use['checkpoint']}, the best from before (training reward {use['reward']:.3f})."
    )
    kept = [path.name for path in list_checkpoints(tmp_path / "run")]
    assert kept == [use["checkpoint"], f"checkpoint-{summary['step']}"], "also with a limit of one"
    assert events(tmp_path / "run")[-1] == "alarm"
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_model_checkpoint"] == use["checkpoint"]


@pytest.mark.parametrize("moment", [20, 32, 34])
def test_a_collapse_is_the_same_over_a_resume(moment: int, make: Make, resume: Make, tmp_path: Path) -> None:
    whole = make({"reward_funcs": [Failing(31)]}, **FAILING).train()
    straight = trace(tmp_path / "run")
    run = tmp_path / "again"
    for result in make({"reward_funcs": [Failing(31)]}, **FAILING, output_dir=run).steps():
        if result.step == moment:
            break
    summary = resume(run, {"reward_funcs": [Failing(31, calls=moment)]}).train()
    same = ("stopped_by", "reason", "step", "use", "best_reward", "final_reward")
    assert {key: summary[key] for key in same} == {key: whole[key] for key in same}
    assert trace(run) == straight
    assert (run / summary["use"]["checkpoint"]).is_dir()


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
    assert summary["reason"].endswith("set save_steps lower, and start again with a lower learning_rate.")


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


def test_the_best_by_held_out_reward_is_saved_when_it_is_reached(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.1, 0.3, 0.6, 0.2, 0.4])
    monkeypatch.setattr(trainer_module, "evaluate", lambda config, parts: next(values))
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
    assert told[0].endswith("there is no terminal to ask on, so training goes on")


REWARD = """
def vowels(completions, **columns):
    return [sum(letter in "aei" for letter in text) / max(1, len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def command(straight: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CommandLine, Path]]:
    """The command line, and a run that nothing disturbed."""
    home = tmp_path_factory.mktemp("command")
    (home / "tiny_reward.py").write_text(REWARD, encoding="utf-8")
    with (home / "letters.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    settings = {**straight, "dataset": str(home / "letters.jsonl"), "reward_funcs": ("tiny_reward:vowels",)}
    settings |= {"max_steps": 40, "save_steps": 10, "eval_steps": 0, "num_iterations": 1, "beta": 0.0}
    config = Config.parse(settings | {"output_dir": home / "straight"})
    (home / "run.toml").write_text(config.to_toml(), encoding="utf-8")
    command = CommandLine(home)
    assert command.run("train", "--config", "run.toml") == 0, command.log()
    yield command, home / "straight"
    command.close()


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before the first step": lambda run: (run / "config.toml").exists(),
    "before the first checkpoint": lambda run: lines(run) >= 4,
    "in the middle of the first checkpoint": lambda run: any(run.glob(".checkpoint-10.partial")),
    "between checkpoints": lambda run: lines(run) >= 15,
    "in the middle of a later checkpoint": lambda run: any(run.glob(".checkpoint-20.partial/optimizer.pt")),
}


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_as_if_nothing_had_been(moment: str, command: tuple[CommandLine, Path]) -> None:
    shell, undisturbed = command
    run = undisturbed.with_name(moment.replace(" ", "-"))
    options = ("train", "--config", "run.toml", "--output-dir", str(run))
    assert shell.run(*options, until=lambda: MOMENTS[moment](run)) == -signal.SIGKILL, "the moment never came"
    assert lines(run) < 40
    assert shell.run("train", "--resume", str(run)) == 0, shell.log()
    assert trace(run) == trace(undisturbed)
    assert [path.name for path in list_checkpoints(run)][-1] == "checkpoint-40"
    assert not list(run.glob(".checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_saves_and_twice_ends_at_once(times: int, command: tuple[CommandLine, Path]) -> None:
    shell, undisturbed = command
    run = undisturbed.with_name(f"interrupted-{times}")
    options = ("train", "--config", "run.toml", "--output-dir", str(run))
    signals = (signal.SIGINT, signal.SIGTERM)[:times]
    code = shell.run(*options, until=lambda: lines(run) >= 13, signals=signals)
    told = shell.log()
    assert "Traceback" not in told
    if times == 1:
        assert code == 0
        assert events(run)[-1] == "interrupt"
        assert list_checkpoints(run)[-1].name not in {"checkpoint-10", "checkpoint-40"}
    else:
        assert code == 128 + signal.SIGINT
        assert "error: stopped at once" in told
        assert list_checkpoints(run)[-1].name == "checkpoint-10"
    assert shell.run("train", "--resume", str(run)) == 0
    assert trace(run) == trace(undisturbed)


GOLDEN = Path(__file__).with_name("golden_trace.json")


def test_the_golden_trace(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    """Twenty steps from fixed weights: a refactoring that changes any number of them changes the mathematics.

    Where the change is meant, copy the trace that the message names over the golden one, in a commit of its own.
    """
    config = tiny_config(
        prompts_per_step=4,
        max_steps=20,
        save_steps=100,
        learning_rate=3e-3,
        adam_epsilon=1e-4,
        num_iterations=2,
    )
    with GRPOTrainer(config, task=LETTERS, reward_funcs=[vowels]) as trainer:
        trainer.train()
    found = {key: [row[key] for row in rows(config.output_dir)] for key in ("reward", "loss", "grad_norm", "entropy")}
    new = tmp_path / GOLDEN.name
    new.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert found["reward"] == golden["reward"], f"other completions were sampled; the new trace is {new}"
    for key in ("loss", "grad_norm", "entropy"):
        assert found[key] == pytest.approx(golden[key], rel=1e-5, abs=1e-7), f"{key} has changed; the new trace is {new}"
