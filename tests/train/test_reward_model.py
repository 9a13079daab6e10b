from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from grpo_fast import Config, ConfigError, GRPOTrainer, RewardModel
from grpo_fast.assets import embedded_model_dir
from grpo_fast.compute.memory import MemoryPlan
from grpo_fast.rewards import RewardPool, names_model
from grpo_fast.train.plan_memory import MemoryInputs, MemoryPlanner
from grpo_fast.train.policy_source import PolicySource

TEMPLATE = "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}\n{% endfor %}"
TEXTS = (["1+2=", "12+30=", "7-5=", "1+1="], ["3", "42;#42", "#2#2#2#2#2#2", ""])


def build(path: Path, **sizes: Any) -> LlamaForSequenceClassification:
    """A model of no training, whose rewards differ from text to text."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape | sizes)
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "rater"
    build(path)
    return path


def one_by_one(path: Path, texts: list[str]) -> list[float]:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    with torch.inference_mode():
        return [model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item() for text in texts]


@pytest.mark.parametrize("tokens_per_batch", [1, 20, 10_000])
@pytest.mark.parametrize("padding", ["own", "end of text", None])
def test_each_text_gets_the_logit_that_it_has_alone(saved: Path, padding: str | None, tokens_per_batch: int) -> None:
    prompts, completions = TEXTS
    tokenizer = AutoTokenizer.from_pretrained(saved)
    end = tokenizer.eos_token
    if padding != "own":  # many a model has no other; then a text that ends properly ends in what looks like padding
        tokenizer.pad_token = None if padding is None else end
    completions = [text + end for text in completions]
    rate = RewardModel(saved, tokenizer=tokenizer, tokens_per_batch=tokens_per_batch)
    expected = one_by_one(saved, [prompt + text for prompt, text in zip(prompts, completions, strict=True)])
    assert len({round(value, 3) for value in expected}) == len(expected)
    assert rate(prompts, completions) == pytest.approx(expected, abs=1e-6)
    assert rate([], []) == []


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning", "ignore:.*pin_memory:UserWarning")  # TRL's
@pytest.mark.parametrize("chat", [False, True])
def test_rewards_are_those_of_trl(saved: Path, tmp_path: Path, chat: bool) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed; the comparison needs it")
    prompts, completions = [list(texts) for texts in TEXTS]
    tokenizer = AutoTokenizer.from_pretrained(saved)
    if chat:
        tokenizer.chat_template = TEMPLATE
        prompts = [[{"role": "user", "content": text}] for text in prompts]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    arguments = trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=8)
    theirs = trl.GRPOTrainer(
        str(embedded_model_dir()),
        reward_funcs=str(saved),
        reward_processing_classes=tokenizer,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
    )
    rewards = theirs._calculate_rewards([{"prompt": prompt} for prompt in prompts], prompts, completions, [[0]] * 4)
    assert RewardModel(saved, tokenizer=tokenizer)(prompts, completions) == pytest.approx(rewards[:, 0].tolist(), abs=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_model_and_functions_reward_together(saved: Path, tmp_path: Path, workers: int) -> None:
    """The functions are called in the pool's workers, the model here; each has its own weight and metrics."""

    def length(completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    async def none(completions: list[str]) -> list[None]:
        return [None] * len(completions)

    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(saved)
    config = Config(
        output_dir=tmp_path / "run",
        max_steps=2,
        prompts_per_step=2,
        num_generations=4,
        max_completion_length=32,
        reward_workers=workers,
        reward_weights=(1.0, 0.5, 2.0, 1.0),
        log_completions=8,
        baseline_probe=0,
        sinks=(),
    )
    done = 0
    with GRPOTrainer(config, reward_funcs=[length, str(saved), none, model]) as trainer:
        for step in trainer.steps():
            done += 1
            for group in step.groups:
                texts = [group.prompt.prompt + completion.text for completion in group.completions]
                rated = one_by_one(saved, texts)
                for i, completion in enumerate(group.completions):
                    expected = [float(len(completion.text)), rated[i], rated[i]]
                    assert [group.rewards[i][f] for f in (0, 1, 3)] == pytest.approx(expected, abs=1e-5)
                    assert group.reward[i] == pytest.approx(expected[0] + 0.5 * rated[i] + rated[i], abs=1e-5)
            assert {"rewards/length/mean", "rewards/rater/mean", "rewards/rater_2/std"} <= step.metrics.keys()
    assert done == 2


def test_bad_models_are_refused_before_the_policy_is_loaded(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: PolicySource) -> None:
        raise AssertionError("the policy was loaded")

    monkeypatch.setattr(PolicySource, "load", load)

    def refused(*reward_funcs: Any, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            GRPOTrainer(Config(output_dir=tmp_path / "run", sinks=(), max_completion_length=32, reward_funcs=reward_funcs))

    build(tmp_path / "three", num_labels=3)
    refused(str(tmp_path / "three"), match=r"three' \(LlamaForSequenceClassification\) gives 3 labels .*num_labels=1")
    refused(str(embedded_model_dir()), match=r"gives 2 labels to a text, but a reward is one number")
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), match=r"cannot load reward model '.*empty': .* Give a directory")
    refused("nobody/nothing", match=r"cannot load reward model 'nobody/nothing': .* Give a directory .* or a hub id")
    headless = tmp_path / "headless"
    model = LlamaForSequenceClassification.from_pretrained(saved).model
    model.save_pretrained(headless)
    AutoTokenizer.from_pretrained(saved).save_pretrained(headless)
    settings = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps(settings | {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}))
    refused(str(headless), match=r"has no weights for score.weight: it was not trained to rate texts")


def test_texts_that_it_cannot_read_are_told(saved: Path) -> None:
    rate = RewardModel(saved)
    with pytest.raises(ValueError, match=r"has 74 tokens for the reward model '.*rater', which reads up to 64; lower"):
        rate(["1+2="], ["3" * 70])
    with pytest.raises(ValueError, match=r"the prompts are conversations, but the tokeniser .* has no chat template"):
        rate([[{"role": "user", "content": "1+2="}]], [[{"role": "assistant", "content": "3"}]])


def test_the_plan_counts_its_weights(saved: Path) -> None:
    def plan(*reward_funcs: str) -> MemoryPlan:
        config = Config(reward_funcs=reward_funcs, max_completion_length=32)
        inputs = MemoryInputs(room_bytes=2**34, kind="cuda", prompt_tokens=20)
        return MemoryPlanner(PolicySource(config).model_config, config, inputs).plan()

    count = LlamaForSequenceClassification.from_pretrained(saved).num_parameters()
    assert plan(str(saved)).peak_bytes - plan("length").peak_bytes == 2 * count


def test_names_of_models_are_told_from_those_of_functions(saved: Path) -> None:
    models = ["Skywork/Skywork-Reward", "./rater", str(saved)]
    assert all(map(names_model, models))
    others = ["accuracy", "package.module:function", "my/rewards.py", "a/b,c/d", "acuracy", len, BertConfig]
    assert not any(map(names_model, others))
    with pytest.raises(ValueError, match=r"'a/b' is the name of a model; give RewardModel\('a/b'\)"):
        RewardPool(["a/b"], workers=0).start()
