"""Leaving, failing and going on: the end is that of the run that nothing disturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.system.soak import trace
from grpo_fast.config import Config, ConfigError
from grpo_fast.rollout.engine import RolloutError, SamplingParams, WeightSyncError
from grpo_fast.rollout.transformers_engine import TransformersEngine
from grpo_fast.train import CheckpointError, GRPOTrainer
from grpo_fast.train.checkpoint import list_checkpoints
from grpo_fast.types import Completion
from tests.train.trainer.runs import LETTERS, Make, Straight, beliefs, events, rows, vowels, weights


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


def test_a_command_that_is_given_again_goes_on(whole: Straight, tmp_path: Path) -> None:
    config = whole.config.replace(output_dir=tmp_path / "run", resume_if_exists=True)
    for started in (0, 3):
        with GRPOTrainer(config, task=LETTERS, reward_funcs=[vowels]) as trainer:
            assert trainer.global_step == started
            for result in trainer.steps():
                if started == 0 and result.step == 3:
                    break
    assert trace(config.output_dir) == whole.trace
    with pytest.raises(ConfigError, match=r"a resumed run cannot change seed"):
        GRPOTrainer(config.replace(seed=config.seed + 1), task=LETTERS, reward_funcs=[vowels])
    with pytest.raises(ConfigError, match=r"already holds a run; .*in repeated commands, --resume-if-exists"):
        GRPOTrainer(config.replace(resume_if_exists=False), task=LETTERS, reward_funcs=[vowels])


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
    trainer._parts.sampler._engine = engine
    trainer._parts.engine = engine
    with trainer:
        summary = trainer.train()
    assert summary["stopped_by"] == "interrupt"
    assert summary["reason"].startswith(f"SIGINT received after step {version}; the run is saved.")
    assert f"grpo-fast train --resume {config.output_dir}" in summary["reason"]
    assert events(config.output_dir)[-1] == "interrupt"
    state = json.loads((config.output_dir / f"checkpoint-{version}" / "state.json").read_text(encoding="utf-8"))
    assert len(state["pending"]["groups"]) >= 3
    with GRPOTrainer.resume(config.output_dir, task=LETTERS, reward_funcs=[vowels]) as trainer:
        assert trainer._pending is not None
        trainer.train()
        assert torch.equal(weights(trainer), whole.weights)
    assert trace(config.output_dir) == whole.trace


class Told(TransformersEngine):
    """An engine that sends the process a signal: with the weights of a step, in the evaluation of it, or in the probe."""

    moment, step, calls_after = "", -1, 0

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, num_generations: int, seed: int
    ) -> list[list[Completion]]:
        self.calls_after += not self.moment
        if num_generations == 1:
            self._reach({5: "probe", 4: "evaluation"}[len(prompts)], self.weight_version)
        return super().generate(prompts, sampling, num_generations=num_generations, seed=seed)

    def sync_weights(self, policy: torch.nn.Module, version: int) -> dict[str, float]:
        self._reach("sync", version)
        return super().sync_weights(policy, version)

    def _reach(self, moment: str, version: int) -> None:
        if (moment, version) == (self.moment, self.step):
            self.moment = ""
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("moment", "step"), [("probe", 0), ("sync", 3), ("evaluation", 4)])
def test_a_signal_ends_a_run_before_anything_more_is_sampled(moment: str, step: int, whole: Straight, tmp_path: Path) -> None:
    config = whole.config.replace(output_dir=tmp_path / "run")
    with GRPOTrainer(config, task=LETTERS, reward_funcs=[vowels]) as trainer:
        engine = Told(trainer.policy.model, trainer.policy.tokenizer)
        engine.moment, engine.step = moment, step
        trainer._parts.sampler._engine = trainer._parts.engine = engine
        assert trainer.train()["signal"] == "SIGTERM"
    assert engine.calls_after == 0, "a rollout, or an evaluation, may take longer than a scheduler waits"
    state = json.loads((config.output_dir / f"checkpoint-{step}" / "state.json").read_text(encoding="utf-8"))
    assert state["pending"] is None
    with GRPOTrainer.resume(config.output_dir, task=LETTERS, reward_funcs=[vowels]) as trainer:
        assert trainer.train()["use"] == whole.summary["use"]
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
        trainer._parts.sampler._engine = trainer._parts.engine = engine
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
    assert trainer._pending is None, "nothing more is sampled"
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
    with pytest.raises(ConfigError, match=r"there is no run in .*nowhere"):
        GRPOTrainer.resume(tmp_path / "nowhere")


def test_resuming_from_a_damaged_checkpoint_names_the_way_out(make: Make, resume: Make, tmp_path: Path) -> None:
    make().train()
    size = (tmp_path / "run" / "checkpoint-6" / "model.safetensors").stat().st_size
    (tmp_path / "run" / "checkpoint-6" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"mv .*damaged-checkpoint-6` .* resumed from checkpoint-3"):
        resume(tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-6" / "model.safetensors"
    file.write_bytes(b"\xff" * size)
    with pytest.raises(CheckpointError, match=r"^\S*checkpoint-6 cannot be read \([^()]*\); `mv .* from checkpoint-3$"):
        resume(tmp_path / "run")
    state = tmp_path / "run" / "checkpoint-3" / "state.json"
    for file in (tmp_path / "run" / "checkpoint-6").iterdir():
        file.unlink()
    (tmp_path / "run" / "checkpoint-6").rmdir()
    assert resume(tmp_path / "run").global_step == 3
    text = state.read_text(encoding="utf-8")
    state.write_text(text.replace('"version": 4', '"version": 9'), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"another version of grpo_fast \(state 9\)"):
        resume(tmp_path / "run")


def begun(make: Make, tiny_model: Path, run: Path, **settings: Any) -> tuple[Path, list[dict[str, Any]]]:
    """A run of four steps, left after two, and the model of its own that it began from; and what a straight one did."""
    model = shutil.copytree(tiny_model, run.with_name("model"))
    settings = {"model": str(model), "max_steps": 4, "beta": 0.0} | settings
    make(output_dir=run.with_name("straight"), **settings).train()
    trainer = make(output_dir=run, **settings)
    for result in trainer.steps():
        if result.step == 2:
            break
    trainer.close()
    return model, trace(run.with_name("straight"))


@pytest.mark.parametrize("lost", ["weights", "model"])
def test_a_resumed_run_needs_no_more_than_its_checkpoint(
    lost: str, make: Make, resume: Make, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    model, straight = begun(make, tiny_model, run)
    (model / "model.safetensors").unlink()
    if lost == "model":
        shutil.rmtree(model)
    trainer = resume(run)
    assert trainer.global_step == 2
    trainer.train()
    assert trace(run) == straight
    assert Config.from_toml(run / "config.toml").model == str(model)
    told = [record.message for record in caplog.records if "is gone" in record.message]
    gone = f"model {str(model)!r} is gone: tokeniser and sizes are read from {run}/checkpoint-2"
    assert told == ([gone] if lost == "model" else [])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"beta": 0.01}, "with beta=0.01 it is the reference policy"),
        ({"use_peft": True}, "adapters are all that its checkpoints hold"),
    ],
    ids=str,
)
def test_a_run_that_needs_the_model_it_began_from_says_so(
    settings: dict[str, Any], told: str, make: Make, resume: Make, tiny_model: Path, tmp_path: Path
) -> None:
    model, straight = begun(make, tiny_model, tmp_path / "run", **settings)
    away = model.rename(tmp_path / "away")
    with pytest.raises(
        ConfigError, match=rf"model '{model}', with which this run began, is gone, and {told}; put it back there"
    ):
        resume(tmp_path / "run")
    away.rename(model)
    resume(tmp_path / "run").train()
    assert trace(tmp_path / "run") == straight
