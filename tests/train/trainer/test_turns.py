"""Runs with an environment: it learns from what the policy says in turn, fails by name, and goes on as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.system.soak import trace
from grpo_fast.config import Config, ConfigError
from grpo_fast.environments import EnvironmentFailedError
from grpo_fast.rollout.engine import SamplingParams
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.checkpoint import list_checkpoints
from grpo_fast.train.rng import derive_seed
from tests.train.trainer.runs import LETTERS, Make, rows, vowels, weights

GAME = """
class Game:
    def reset(self, prompt, answer):
        self.answer, self.turns, self.vowels = answer, 0, 0

    def step(self, completion):
        self.turns += 1
        self.vowels += sum(letter in "aei" for letter in completion)
        return self.answer + "=" if self.turns < 3 else None

    def get_reward(self):
        return self.vowels / 10
"""
SETTINGS: dict[str, Any] = {"max_completion_length": 20, "environment_factory": "games_for_turns:Game", "max_turns": 4}


@pytest.fixture(autouse=True)
def _game(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "games_for_turns.py").write_text(GAME)
    monkeypatch.syspath_prepend(tmp_path)


def test_an_environment_rates_the_run_where_nothing_else_is_named(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    held_out = {"eval_steps": 3, "eval_temperature": 1.5, "num_generations_eval": 8}
    with GRPOTrainer(tiny_config(**SETTINGS, **held_out, max_steps=3), task=LETTERS) as trainer:
        for step in trainer.steps():
            for group in step.groups:
                for completion, reward in zip(group.completions, group.reward, strict=True):
                    assert completion.episode is not None
                    said = sum(
                        letter in "aei"
                        for letter, mine in zip(completion.text, _sampled_letters(trainer, completion), strict=True)
                        if mine
                    )
                    heard = completion.finish_reason == "stop"
                    assert reward == pytest.approx(said / 10) if heard else reward <= said / 10
        prompts, sampling = trainer._parts.eval_prompts, SamplingParams(max_tokens=20, temperature=1.5)
        seed = derive_seed(trainer.config.seed, 0, 1)
        played = trainer._parts.sampler.sample(prompts, sampling, num_generations=8, seed=seed)
        earned = [completion.episode.reward for group in played for completion in group.completions if completion.episode]
        assert trainer.evaluate() == pytest.approx(sum(earned) / len(earned))
        assert sum(earned) > 0
    found = [row for row in rows(tmp_path / "run") if row["step"] > 0]
    assert len(found) == 3
    assert all(row["rewards/environment/mean"] == pytest.approx(row["reward"]) for row in found)
    assert all(1 < row["num_turns/mean"] <= row["num_turns/max"] <= 3 for row in found)
    assert all(row["completions/mean_length"] < 20 for row in found)
    assert all(row["sampling/kl"] < 1e-9 for row in found), "the policy scores what was sampled, in its context"


def _sampled_letters(trainer: GRPOTrainer, completion: Any) -> list[bool]:
    """Of each character of the text, whether the policy said it; a token is a character, special ones are none."""
    tokenizer = trainer.policy.tokenizer
    shown = [bool(tokenizer.decode([token], skip_special_tokens=True)) for token in completion.token_ids]
    return [mine for mine, is_shown in zip(completion.episode.sampled, shown, strict=True) if is_shown]


@pytest.mark.parametrize("settings", [{}, {"max_staleness": 1}], ids=["in time", "ahead"])
def test_leaving_and_resuming_is_the_straight_run(
    settings: dict[str, Any], tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = tiny_config(**SETTINGS, **settings, reward_funcs=("exact_match", "environment"))
    with GRPOTrainer(config.replace(output_dir=tmp_path / "straight"), task=LETTERS) as trainer:
        trainer.train()
        expected = weights(trainer)
    with GRPOTrainer(config, task=LETTERS) as trainer:
        for result in trainer.steps():
            if result.step == 2:
                break
    with GRPOTrainer.resume(config.output_dir, task=LETTERS) as trainer:
        trainer.train()
        assert torch.equal(weights(trainer), expected)
    assert trace(config.output_dir) == trace(tmp_path / "straight")


def test_an_environment_given_in_python_must_be_given_again(make: Make, resume: Make, tmp_path: Path) -> None:
    class Silent:
        def reset(self, prompt: str) -> None: ...

        def step(self, completion: str) -> None: ...

    trainer = make({"environment_factory": Silent}, max_steps=2, save_steps=1)
    trainer.train()
    trainer.close()
    assert {row["num_turns/max"] for row in rows(tmp_path / "run")} == {1.0}
    with pytest.raises(ConfigError, match=r"started with environment_factory 'Silent', but now environment_factory is None"):
        resume(tmp_path / "run", max_steps=3)
    assert resume(tmp_path / "run", {"environment_factory": Silent}, max_steps=3).global_step == 2


def test_what_fails_ends_the_run_with_what_was_trained(make: Make, tmp_path: Path) -> None:
    class Fragile:
        steps = 0

        def reset(self, prompt: str) -> None: ...

        def step(self, completion: str) -> None:
            type(self).steps += 1
            if type(self).steps > 30:
                raise ConnectionError("the search is down")

    trainer = make({"environment_factory": Fragile}, max_completion_length=40, save_steps=100)
    with pytest.raises(
        EnvironmentFailedError, match=r"'Fragile': step raised ConnectionError: the search is down.*for row \d+"
    ):
        trainer.train()
    assert 0 < trainer.global_step < 6
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"checkpoint-{trainer.global_step}"]


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({}, {"environment_factory": "games_for_turns:Gane"}, "did you mean 'Game'"),
        ({"environment_factory": object()}, {}, "makes no environments"),
        ({}, {"reward_funcs": ("environment",)}, "there is none; set environment_factory"),
        ({"environment_factory": dict}, {}, "'dict' has no method 'reset'"),
    ],
)
def test_what_cannot_work_costs_no_model(
    given: dict[str, Any], settings: dict[str, Any], message: str, tiny_config: Callable[..., Config]
) -> None:
    with pytest.raises(ConfigError, match=message):
        GRPOTrainer(tiny_config(**settings), task=LETTERS, **given)


def test_a_dataset_without_what_the_environment_needs_is_refused(tiny_config: Callable[..., Config]) -> None:
    given = {"train_dataset": [{"prompt": "a="}] * 8, "reward_funcs": vowels, "environment_factory": "games_for_turns:Game"}
    with pytest.raises(ConfigError, match="reset needs a dataset column 'answer'; the dataset has no column but the prompt"):
        GRPOTrainer(tiny_config(), **given)
