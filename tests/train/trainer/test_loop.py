"""What a whole run does and leaves, step by step, the same each time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.system.soak import trace
from grpo_fast.config import Config
from grpo_fast.objective import OBJECTIVES
from grpo_fast.ops import Kept, token_logprob
from grpo_fast.run_dir import LOCK_FILE
from grpo_fast.train import GRPOTrainer, StepResult, head_part
from grpo_fast.train.checkpoint import list_checkpoints
from tests.train.trainer.runs import LETTERS, Make, Straight, beliefs, events, rows, vowels, weights


def first(kept: Kept) -> torch.Tensor:
    """The drawn token of each row."""
    return kept.token_ids[kept.sizes.cumsum(0) - kept.sizes]


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
    assert [name for name in names if name.startswith(".")] == [LOCK_FILE]
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
    "steps_without_variance",
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


def test_a_repetition_penalty_is_corrected_for(make: Make, tmp_path: Path) -> None:
    make(repetition_penalty=1.3, vllm_importance_sampling_mode="token_truncate", max_steps=2).train()
    for row in rows(tmp_path / "run"):
        assert row["sampling/sampling_logp_difference/max"] > 1e-2
        assert 0.5 < row["sampling/importance_sampling_ratio/mean"] < 2
        assert 0 < row["sampling/effective_sample_size"] < 0.9999


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
        assert result.metrics["sampling/sampling_logp_difference/max"] < close
    assert not torch.equal(weights(trainer), before)


@pytest.mark.parametrize("cut", [{"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.3}], ids=str)
def test_sampler_and_trainer_are_one_policy_over_a_cut_support(
    cut: dict[str, float], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which they are not where the policy is not normalised over what was kept."""
    settings = {"temperature": 1.2, "num_iterations": 2, "max_steps": 2, **cut}
    for result in make(**settings).steps():
        assert abs(result.metrics["sampling/kl"]) < 1e-6
        assert result.metrics["sampling/sampling_logp_difference/max"] < 1e-5
        assert result.metrics["grad_norm"] > 0
    monkeypatch.setattr(head_part, "kept_logprob", lambda hidden, head, kept: token_logprob(hidden, head, targets=first(kept)))
    assert next(make(**settings, overwrite=True).steps()).metrics["sampling/kl"] > 1e-3


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


def test_a_run_stays_in_one_directory_where_a_script_changes_its_folder(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reward function may that runs what was answered: checkpoints went to one place and the record to another."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with make(output_dir=Path("here"), max_steps=2, save_steps=1) as trainer:
        for _ in trainer.steps():
            monkeypatch.chdir(tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    found = {path.name for path in (tmp_path / "here").iterdir()}
    assert {"checkpoint-1", "checkpoint-2", "config.toml", "metrics.jsonl", "summary.json"} <= found


def test_saving_by_hand(make: Make, tmp_path: Path) -> None:
    trainer = make(overwrite=True)
    assert trainer.save() == tmp_path / "run" / "checkpoint-0"
    for result in trainer.steps():
        if result.step == 2:
            assert trainer.save() == tmp_path / "run" / "checkpoint-2"
            break
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-0", "checkpoint-2"]


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


def test_one_process_that_is_to_shard_says_that_it_does_not(make: Make, resume: Make, tmp_path: Path) -> None:
    make(fsdp="full_shard", max_steps=2).train()
    resume(tmp_path / "run", max_steps=3).train()
    told = [row["message"] for row in rows(tmp_path / "run", "events") if row["event"] == "warn"]
    assert len(told) == 2
    assert "fsdp='full_shard' shards nothing, because this run has one process" in told[0]
    assert "`torchrun --nproc-per-node DEVICES --no-python grpo-fast train --fsdp full_shard ...`" in told[1]
