"""Rollouts ahead of the training, with the embedded engine on weights of its own: no rollout waits for a GPU here."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_fast import Config, GRPOTrainer
from grpo_fast.metrics import PhaseTimer
from grpo_fast.rollout import RolloutError, SamplingParams
from grpo_fast.rollout.transformers_engine import TransformersEngine
from grpo_fast.train.ahead import token_versions
from grpo_fast.train.checkpoint import list_checkpoints
from grpo_fast.types import Completion
from tests.train.trainer.runs import LETTERS

STEPS = 8


def vowels(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(text.count(vowel) for vowel in "aei")) for text in completions]


@pytest.fixture
def ahead(tiny_config: Callable[..., Config]) -> Callable[..., Config]:
    """A run of eight steps whose rollouts are one step ahead."""

    def make(**changes: Any) -> Config:
        values = {"max_staleness": 1, "max_steps": STEPS, "save_steps": 3, "eval_steps": 4, "eval_size": 4, "refill_rounds": 1}
        return tiny_config(**values | {"learning_rate": 3e-3, "reward_workers": 0, "forecast": "off"} | changes)

    return make


def train(trainer: GRPOTrainer) -> list[Any]:
    with trainer:
        return list(trainer.steps())


def start(config: Config) -> GRPOTrainer:
    return GRPOTrainer(config, task=LETTERS, reward_funcs=[vowels])


def resume(config: Config) -> GRPOTrainer:
    return GRPOTrainer.resume(config.output_dir, task=LETTERS, reward_funcs=[vowels])


def weights(trainer: GRPOTrainer) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in trainer.policy.model.parameters()])


def drawn(steps: Sequence[Any]) -> list[int]:
    return [group.prompt.index for step in steps for group in step.groups]


class Watched(TransformersEngine):
    """Notes by which weights each rollout was made; ``begun`` is called with its number, from 1."""

    def __init__(self, trainer: GRPOTrainer, begun: Callable[[int], None] = lambda number: None) -> None:
        super().__init__(trainer.policy.model, trainer.policy.tokenizer, own_weights=True)
        self.rollouts: list[int] = []
        self._begun = begun
        trainer._parts.sampler._engine = trainer._parts.engine = self

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, num_generations: int, seed: int
    ) -> list[list[Completion]]:
        version = self.weight_version
        if num_generations > 1:
            self._begun(len(self.rollouts) + 1)
        answers = super().generate(prompts, sampling, num_generations=num_generations, seed=seed)
        if num_generations > 1:
            self.rollouts.append(version)
            assert version == self.weight_version, "weights changed within a rollout"
        return answers


def test_rollouts_run_beside_the_training_and_are_one_update_old(ahead: Callable[..., Config]) -> None:
    """Each rollout waits for the update before it to begin, and that update for the rollout: one after the other they hang."""
    trainer = start(ahead(refill_rounds=0))
    meetings = [threading.Barrier(2, timeout=60) for _ in range(1, STEPS)]
    update, numbers = trainer._learner.update, iter(range(1, STEPS + 1))
    engine = Watched(trainer, lambda number: meetings[number - 2].wait() if number > 1 else None)

    def meets(*given: Any, **named: Any) -> Any:
        if (number := next(numbers)) < STEPS:
            meetings[number - 1].wait()
        return update(*given, **named)

    trainer._learner.update = meets  # type: ignore[method-assign]
    steps = train(trainer)
    assert engine.rollouts == [max(0, step - 2) for step in range(1, STEPS + 1)]
    assert [step.metrics["sample/staleness_max"] for step in steps] == [0, *[1] * (STEPS - 1)]
    assert sum(step.metrics["overlap/rollout_s"] for step in steps) > 0
    assert all("sampling/importance_weight/mean" in step.metrics for step in steps[1:]), "older weights are corrected for"


@pytest.mark.parametrize("moment", [1, 3, 5, 8])
def test_leaving_and_resuming_is_the_straight_run(moment: int, ahead: Callable[..., Config], tmp_path: Path) -> None:
    straight = start(ahead(output_dir=tmp_path / "straight"))
    whole = train(straight)
    config = ahead(output_dir=tmp_path / "run")
    before = []
    with start(config) as trainer:
        for result in trainer.steps():
            before.append(result)
            if result.step == moment:
                break
    with resume(config) as trainer:
        assert len(trainer._rollouts.ready()) == (moment < STEPS), "what was sampled ahead is not sampled again"
        after = list(trainer.steps())
        assert torch.equal(weights(trainer), weights(straight))
    assert drawn([*before, *after]) == drawn(whole)
    assert [step.metrics["reward"] for step in [*before, *after]] == [step.metrics["reward"] for step in whole]


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_run_that_ends_between_rollouts_and_update_resumes_as_the_straight_run(
    staleness: int, ahead: Callable[..., Config], tmp_path: Path
) -> None:
    """What was still being sampled ahead is sampled again by the weights that it had begun with."""
    common = {"max_staleness": staleness, "refill_rounds": 0}
    straight = start(ahead(**common, output_dir=tmp_path / "straight"))
    whole = train(straight)
    trainer, saved = start(ahead(**common, output_dir=tmp_path / "run")), threading.Event()
    Watched(trainer, lambda number: saved.wait(60) if number == 3 + staleness else None)
    take, save = trainer._rollouts.take, trainer._save

    def stops(step: int, timer: PhaseTimer) -> Any:
        if step == 3:
            trainer.stop()
        return take(step, timer)

    def saves() -> None:
        save()
        saved.set()

    trainer._rollouts.take, trainer._save = stops, saves  # type: ignore[method-assign]
    before = train(trainer)
    assert f"Completions of {staleness} more step" in trainer.summary["reason"]
    with resume(trainer.config) as again:
        assert (len(before), again._pending is not None, len(again._rollouts.ready())) == (2, True, staleness - 1)
        after = list(again.steps())
        assert torch.equal(weights(again), weights(straight))
    assert drawn([*before, *after]) == drawn(whole)
    for name in ("reward", "sample/staleness_mean"):
        assert [step.metrics[name] for step in [*before, *after]] == [step.metrics[name] for step in whole]


def test_what_is_sampled_ahead_is_metered_by_the_step_beside_it_once_and_told_where_the_run_ends(
    ahead: Callable[..., Config], tmp_path: Path
) -> None:
    common = {"max_staleness": 2, "refill_rounds": 0}
    whole = train(start(ahead(**common, output_dir=tmp_path / "straight")))
    tokens = [sum(len(c.token_ids) for group in step.groups for c in group.completions) for step in whole]
    metered = [sum(tokens[: step + 2]) for step in range(1, STEPS + 1)]
    assert [step.metrics["tokens/completion"] for step in whole] == metered
    trainer = start(ahead(**common, max_tokens=int(whole[2].metrics["num_tokens"]), output_dir=tmp_path / "run"))
    before = train(trainer)
    assert len(before) == 3, "the limit counts what was sampled ahead"
    told = f"Completions of 2 more steps ({sum(tokens[3:5])} tokens) were sampled ahead; a resumed run trains on them."
    assert trainer.summary["reason"].endswith(told)
    changed = trainer.config.replace(max_tokens=None)
    again = GRPOTrainer.resume(changed.output_dir, config=changed, task=LETTERS, reward_funcs=[vowels])
    after = train(again)
    assert [step.metrics["tokens/completion"] for step in [*before, *after]] == metered
    assert "sampled ahead" not in again.summary["reason"]


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_run_that_was_killed_loses_and_repeats_no_prompt(staleness: int, ahead: Callable[..., Config]) -> None:
    config = ahead(max_staleness=staleness, refill_rounds=0, save_total_limit=9)
    whole = train(start(config))
    for checkpoint in list_checkpoints(config.output_dir):
        if checkpoint.name != "checkpoint-3":
            shutil.rmtree(checkpoint)
    again = train(resume(config))
    assert [step.step for step in again] == list(range(4, STEPS + 1))
    assert drawn(again) == drawn(whole[3:])
    assert len(set(drawn(whole))) == 24 == len(drawn(whole)), "an epoch is as long as the run: no prompt came twice"
    assert [step.metrics["reward"] for step in again] == [step.metrics["reward"] for step in whole[3:]]


def test_tokens_older_than_allowed_end_the_run_with_a_checkpoint(ahead: Callable[..., Config]) -> None:
    trainer = start(ahead())

    class Stuck(Watched):
        def sync_weights(self, policy: torch.nn.Module, version: int) -> dict[str, float]:
            return {}

    Stuck(trainer)
    with pytest.raises(RolloutError, match="a token of step 3 was sampled 2 updates ago, but max_staleness=1"):
        train(trainer)
    assert list_checkpoints(trainer.config.output_dir)[-1].name == "checkpoint-2"


def test_a_rollout_that_fails_ahead_fails_the_step_it_is_for(ahead: Callable[..., Config], tmp_path: Path) -> None:
    config = ahead(output_dir=tmp_path / "run")
    trainer = start(config)

    class Dying(Watched):
        def generate(self, *given: Any, **named: Any) -> list[list[Completion]]:
            if named["num_generations"] > 1 and self.weight_version == 3:
                raise RolloutError("the server is gone")
            return super().generate(*given, **named)

    Dying(trainer)
    with pytest.raises(RolloutError, match="the server is gone"):
        train(trainer)
    assert list_checkpoints(config.output_dir)[-1].name == "checkpoint-4", "step 5 was being sampled while 4 trained"
    whole = train(start(ahead(output_dir=tmp_path / "straight")))
    assert drawn(train(resume(config))) == drawn(whole[4:])


def test_without_staleness_nothing_is_ahead(ahead: Callable[..., Config]) -> None:
    trainer = start(ahead(max_staleness=0, max_steps=2))
    steps = train(trainer)
    assert trainer._parts.engine._model is trainer.policy.model  # type: ignore[attr-defined]
    assert all("overlap/rollout_s" not in step.metrics for step in steps)
    trainer._rollouts.hold(PhaseTimer())
    assert trainer._rollouts.ready() == []


def test_each_token_has_a_version() -> None:
    made = Completion((4, 5), (-1.0, -1.0), "stop", "", weight_version=3)
    assert list(token_versions(made)) == [3, 3]
    mixed = Completion((4, 5), (-1.0, -1.0), "stop", "", weight_version=3, weight_versions=(3, 4))
    assert list(token_versions(mixed)) == [3, 4]


@pytest.mark.slow
def test_the_embedded_task_is_learnt_as_well_one_update_late(embedded_config: Callable[..., Config]) -> None:
    with GRPOTrainer(embedded_config(max_staleness=1, max_steps=60, eval_steps=60)) as trainer:
        metrics = [step.metrics for step in trainer.steps()]
    assert trainer.summary["eval_reward"] > 0.95
    assert max(row["sample/staleness_max"] for row in metrics) == 1
