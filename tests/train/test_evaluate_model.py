from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from grpo_fast.config import Config, ConfigError
from grpo_fast.rollout.vllm_environment import held_port
from grpo_fast.train import CheckpointError, GRPOTrainer, engines
from grpo_fast.train.evaluate_model import Estimate, evaluate_model

REWARDS = """
def vowels(completions, **columns):
    return [sum(letter in "aei" for letter in text) / max(1, len(text)) for text in completions]


def first(completions, answer, **columns):
    return [None if wanted == "h" else float(text[:1] == wanted) for text, wanted in zip(completions, answer)]


class Listening:
    def reset(self, prompt):
        self.heard = ""

    def step(self, completion):
        self.heard += completion


def heard(environments, **columns):
    return [float(len(set(environment.heard))) for environment in environments]
"""


@pytest.fixture
def letters_config(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Config]:
    """Makes configurations of a dataset in a file, rewarded by the functions above."""
    (tmp_path / "letter_rewards.py").write_text(REWARDS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"prompt": f"{a}{b}=", "answer": a} for a in "abcdefgh" for b in "abcd"]
    data = tmp_path / "letters.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return lambda **changes: tiny_config(
        **{"dataset": str(data), "reward_funcs": ("letter_rewards:vowels",), "eval_size": 6} | changes
    )


OF_ENVIRONMENTS = {"environment_factory": "letter_rewards:Listening", "reward_funcs": ("letter_rewards:heard",)}


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 3e-3},
        {"learning_rate": 3e-2, "use_peft": True},
        {"learning_rate": 3e-2, **OF_ENVIRONMENTS},
    ],
    ids=["whole", "adapters", "environments"],
)
def test_a_checkpoint_gets_the_reward_that_its_run_measured(
    changes: dict[str, Any], letters_config: Callable[..., Config]
) -> None:
    config = letters_config(eval_steps=3, save_total_limit=5, **changes)
    with GRPOTrainer(config) as trainer:
        measured = {step.step: step.metrics["eval_reward"] for step in trainer.steps() if "eval_reward" in step.metrics}
    assert measured[3] != measured[6]
    for step, reward in measured.items():
        found = evaluate_model(config, str(config.output_dir / f"checkpoint-{step}"))
        assert found.reward.mean == pytest.approx(reward, abs=1e-6), step
        assert found.model == str(config.output_dir / f"checkpoint-{step}")
    summary = json.loads((config.output_dir / "summary.json").read_text(encoding="utf-8"))
    assert evaluate_model(config, str(config.output_dir)).model.endswith(summary["use"]["checkpoint"])
    with pytest.raises(ConfigError, match=r"and another eval_split or dataset: with eval_size=0 the run trained on all rows$"):
        evaluate_model(config.replace(eval_steps=0, eval_size=0), str(config.output_dir))


def test_rows_that_the_run_trained_on_are_refused(letters_config: Callable[..., Config]) -> None:
    config = letters_config(max_steps=1, eval_size=4)
    with GRPOTrainer(config) as trainer:
        trainer.train()
    run = str(config.output_dir)
    told = r"eval_size=6, seed=\d+: the run trained on 2 of these 6 rows; it held out 4, with eval_size=4 .* to 4 or less$"
    with pytest.raises(ConfigError, match=told):
        evaluate_model(config.replace(eval_size=6), run)
    with pytest.raises(ConfigError, match=rf"seed={config.seed + 1}: the run trained on .* rows; it held out 4,"):
        evaluate_model(config.replace(seed=config.seed + 1), f"{run}/checkpoint-1")
    again = config.replace(eval_size=0, eval_steps=0, overwrite=True)
    assert len(evaluate_model(config.replace(eval_size=3), run).groups) == 3
    assert len(evaluate_model(config.replace(eval_size=6), config.model).groups) == 6, "another model may have seen none"
    assert len(evaluate_model(config.replace(eval_size=32, eval_split="train"), run).groups) == 32, "asked for by name"
    with GRPOTrainer(again) as trainer:
        trainer.train()
    with pytest.raises(ConfigError, match=r"trained on 4 of these 4 rows; it held out none of this table\. Set eval_split$"):
        evaluate_model(config, run)


def test_adapters_alone_are_known_by_their_file(letters_config: Callable[..., Config], tmp_path: Path) -> None:
    config = letters_config(learning_rate=3e-2, use_peft=True, max_steps=2)
    with GRPOTrainer(config) as trainer:
        trainer.train()
    adapters = shutil.copytree(config.output_dir / "checkpoint-2", tmp_path / "adapters")
    found = evaluate_model(letters_config(), str(adapters))
    assert found.groups == evaluate_model(config, str(config.output_dir)).groups
    assert found.groups != evaluate_model(letters_config(), config.model).groups


def test_functions_are_estimated_apart_and_completions_kept(letters_config: Callable[..., Config], tmp_path: Path) -> None:
    config = letters_config(
        reward_funcs=("letter_rewards:vowels", "letter_rewards:first"),
        reward_weights=(0.5, 2.0),
        num_generations_eval=3,
        eval_temperature=1.0,
        eval_split="train",
        eval_size=32,
    )
    found = evaluate_model(config, config.model)
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (told["num_prompts"], told["num_completions"], told["temperature"]) == (32, 96, 1.0)
    vowels, first = found.rewards["vowels"], found.rewards["first"]
    assert (vowels.num_values, first.num_values) == (96, 84), "four prompts have no verdict of the second"
    assert 0 < vowels.error < 0.2
    assert found.reward.mean == pytest.approx(0.5 * vowels.mean + 2.0 * first.mean * 84 / 96)
    assert 0 < told["mean_length"] <= told["max_length"] <= 6
    found.write_completions(tmp_path / "completions.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 96
    assert sum(line["reward"] for line in lines) / 96 == pytest.approx(found.reward.mean)
    assert lines[0]["columns"] == {"answer": lines[0]["prompt"][0]}
    assert {line["finish_reason"] for line in lines} <= {"stop", "length"}
    assert sum(line["finish_reason"] == "length" for line in lines) / 96 == found.truncated_share


def test_the_error_is_that_of_independent_prompts_not_of_completions_that_are_alike() -> None:
    alone = Estimate.of([[0.0], [1.0], [1.0], [0.0]])
    repeated = Estimate.of([[0.0] * 50, [1.0] * 50, [1.0] * 50, [0.0] * 50])
    assert repeated == Estimate(alone.mean, alone.error, 200)
    assert alone.error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert Estimate.of([[1.0, math.nan], [math.nan]]).to_dict() == {"mean": 1.0, "standard_error": None, "num_values": 1}
    assert Estimate.of([[math.nan]]).to_dict() == {"mean": None, "standard_error": None, "num_values": 0}


def test_servers_that_are_starting_are_waited_for(
    letters_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "require_vllm", lambda: Version("1"))
    with held_port() as port:
        url = f"http://127.0.0.1:{port}"
        config = letters_config(rollout="vllm-http", vllm_server_urls=[url], vllm_server_timeout=0.05)
        with pytest.raises(
            ConfigError, match=rf"rollout='vllm-http'.* {url} was not up within 0\.05 s \(vllm_server_timeout\)"
        ):
            evaluate_model(config, config.model)


def test_what_cannot_be_evaluated_is_told(letters_config: Callable[..., Config], tmp_path: Path) -> None:
    config = letters_config()
    with pytest.raises(ConfigError, match="there is no such directory"):
        evaluate_model(config, str(tmp_path / "nowhere"))
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a=", "answer": "a"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"few\.jsonl has no held-out rows; set eval_split"):
        evaluate_model(letters_config(dataset=str(few)), config.model)
    with pytest.raises(ConfigError, match=r"has no held-out rows; set eval_size above 0$"):
        evaluate_model(letters_config(dataset=str(few), eval_size=0), config.model)
    run = tmp_path / "young"
    (run / "checkpoint-1").mkdir(parents=True)
    (run / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"checkpoint-1 has no readable manifest\.json"):
        evaluate_model(config, str(run / "checkpoint-1"))
