"""Runs with tools, of a model with random weights that has whole calls for tokens: as TRL's users bring them along."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.system.soak import trace
from grpo_fast.config import Config, ConfigError
from grpo_fast.train import GRPOTrainer
from tests.tool_chat import word_tokenizer
from tests.train.trainer.runs import rows, weights

BROUGHT = '''
def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


class Game:
    """Guess a letter; as TRL has environments."""

    def reset(self, secret, **columns):
        self.secret, self.guesses = secret, 0
        return f" {len(secret)} letters"

    async def guess(self, letter: str) -> str:
        """Guesses a letter.

        Args:
            letter: One.
        """
        self.guesses += 1
        return "yes" if letter in self.secret else "no"


class Rated(Game):
    def get_reward(self):
        return self.guesses / 4


def sums(completions, **columns):
    said = [[message["content"] for message in each if message["role"] == "tool"] for each in completions]
    return [sum(content.isdigit() for content in contents) - 0.25 * len(contents) for contents in said]


def guesses(environments, trainer_state, log_metric, log_extra, **columns):
    log_metric("steps_before", trainer_state.global_step)
    log_metric("guesses", sum(environment.guesses for environment in environments) / len(environments))
    log_extra("guessed", [environment.guesses for environment in environments])
    return [float(environment.guesses) for environment in environments]
'''
DATA = [{"prompt": [{"role": "user", "content": f"what of {letter}"}], "secret": letter * 2} for letter in "abcdefgh"]
SETTINGS: dict[str, Any] = {"max_completion_length": 100, "max_turns": 4, "num_generations": 8}


@pytest.fixture(scope="module")
def tool_model(sizes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, tokenizer = tmp_path_factory.mktemp("tools") / "model", word_tokenizer()
    tokenizer.save_pretrained(directory)
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(7)
    changes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512} | tokens
    LlamaForCausalLM(LlamaConfig(**sizes | changes, tie_word_embeddings=False)).save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def _brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought_for_tools.py").write_text(BROUGHT)
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, DATA)))
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def tool_config(tool_model: Path, tiny_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    fixed = {"model": str(tool_model), "dataset": str(tmp_path / "data.jsonl"), **SETTINGS}
    return lambda **changes: tiny_config(**fixed | changes)


def test_the_policy_calls_tools_in_training_and_on_held_out_prompts(tool_config: Callable[..., Config], tmp_path: Path) -> None:
    from brought_for_tools import add, sums  # type: ignore[import-not-found]

    config = tool_config(max_steps=3, eval_steps=3, eval_temperature=1.0, num_generations_eval=8)
    answers: set[str] = set()
    with GRPOTrainer(config, reward_funcs=sums, tools=add) as trainer:
        for step in trainer.steps():
            episodes = [each.episode for group in step.groups for each in group.completions if each.episode is not None]
            assert len(episodes) == 24
            replies = [message for each in episodes for message in each.messages if message["role"] == "tool"]
            answers |= {reply["content"] for reply in replies}
            calls = [each.num_tool_calls or 0 for each in episodes]
            assert step.metrics["tools/call_frequency"] == pytest.approx(sum(calls) / 24)
            failures = sum(each.num_tool_failures for each in episodes)
            assert step.metrics["tools/failure_frequency"] == pytest.approx(failures / sum(calls))
            earned = sums([each.messages for each in episodes])
            assert [value for group in step.groups for value in group.reward] == pytest.approx(earned)
        assert trainer.evaluate() != 0
    assert {"3", "4", "5", "6", "7", str({"error": "there is no tool 'guess'; there are: add"})} < answers
    found = [row for row in rows(tmp_path / "run") if row["step"] > 0]
    assert all(row["sampling/kl"] < 1e-9 for row in found), "the policy scores what was sampled, in its context"
    assert all(row["num_turns/mean"] > 1 for row in found)


@pytest.mark.parametrize("settings", [{}, {"max_staleness": 1}], ids=["in time", "ahead"])
def test_leaving_and_resuming_is_the_straight_run(
    settings: dict[str, Any], tool_config: Callable[..., Config], tmp_path: Path
) -> None:
    """With an environment of TRL's form, a tool beside it, and a reward that reads the environments."""
    own = {"environment_factory": "brought_for_tools:Game", "tools": ("brought_for_tools:add",), "reward_workers": 1}
    config = tool_config(**own, **settings, reward_funcs=("brought_for_tools:guesses", "brought_for_tools:sums"), max_steps=5)
    with GRPOTrainer(config.replace(output_dir=tmp_path / "straight")) as trainer:
        trainer.train()
        expected = weights(trainer)
    with GRPOTrainer(config) as trainer:
        for result in trainer.steps():
            for group in result.groups:
                assert group.prompt.token_ids == trainer._parts.prompts.of_row(group.prompt.index).token_ids[:-3]
                for each, scores in zip(group.completions, group.rewards, strict=True):
                    assert each.episode is not None
                    calls = [call for message in each.episode.messages for call in message.get("tool_calls", ())]
                    guessed = sum(call["function"]["name"] == "guess" for call in calls)
                    # calls of a turn that the length limit cut are not made
                    assert scores[0] == guessed or (each.truncated and scores[0] == guessed - 1)
                    assert each.episode.asked[-1]["content"].endswith(" 2 letters")
            if result.step == 2:
                break
    with GRPOTrainer.resume(config.output_dir) as trainer:
        trainer.train()
        assert torch.equal(weights(trainer), expected)
    assert trace(config.output_dir) == trace(tmp_path / "straight")
    found = rows(tmp_path / "straight")
    assert any(row["rewards/guesses/mean"] > 0 for row in found)
    for row in found:
        assert row["steps_before"] == row["step"] - 1
        assert row["guesses"] == pytest.approx(row["rewards/guesses/mean"])
    shown = rows(tmp_path / "straight", "completions")
    assert {type(row["guessed"]) for row in shown} == {int}
    assert all(row["sampling/kl"] < 1e-9 for row in found) or settings


def test_an_environment_of_methods_may_rate_the_run_alone(tool_config: Callable[..., Config], tmp_path: Path) -> None:
    with GRPOTrainer(tool_config(environment_factory="brought_for_tools:Rated", max_steps=2)) as trainer:
        trainer.train()
    assert any(row["rewards/environment/mean"] > 0 for row in rows(tmp_path / "run"))
    sources = json.loads((tmp_path / "run" / "sources.json").read_text())
    assert (sources["environment_factory"], sources["tools"]) == ("Rated", None)


def test_the_command_line_takes_tools(shell: Callable[..., tuple[int, str, str]], tool_config: Callable[..., Config]) -> None:
    config = tool_config(tools=("brought_for_tools:add",), reward_funcs=("brought_for_tools:sums",), max_steps=1)
    Path("run.toml").write_text(config.replace(tools=()).to_toml())
    code, out, err = shell("train --config run.toml --tools brought_for_tools:add")
    assert code == 0, out + err
    [row] = rows(config.output_dir)
    assert row["tools/call_frequency"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tools": ("brought_for_tools:ad",)}, r"tool 'brought_for_tools:ad': .*did you mean 'add'\?"),
        ({"tools": ("brought_for_tools:sums",)}, r"tool 'sums' has the parameter '\*\*columns', which no call can name"),
        (
            {"tools": ("brought_for_tools:add",), "chat_template_kwargs": {"tools": []}},
            "tools add cannot be used by .*: chat_template_kwargs: 'tools' are those",
        ),
    ],
)
def test_what_cannot_work_costs_no_model(
    settings: dict[str, Any], message: str, tool_config: Callable[..., Config], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        GRPOTrainer(tool_config(**settings, reward_funcs=("brought_for_tools:sums",)))
    assert not (tmp_path / "run" / "config.toml").exists()


def test_models_that_know_no_tools_are_refused(tiny_config: Callable[..., Config]) -> None:
    settings = {"tools": ("brought_for_tools:add",), "reward_funcs": ("brought_for_tools:sums",)}
    with pytest.raises(ConfigError, match=r"tools add cannot be used by .*/model: the model's tokeniser has no chat template"):
        GRPOTrainer(tiny_config(**settings), train_dataset=DATA)
