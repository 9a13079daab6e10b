"""A model small enough to train in milliseconds, with random weights: mechanics do not depend on what it knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from grpo_fast.config import Config
from grpo_fast.tasks.task import Task
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.parts import Parts, build_parts
from grpo_fast.train.policy import Policy
from grpo_fast.types import Completion, Group, Prompt
from tests.train.trainer.runs import LETTERS

PIECES = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefghijkl=+0123456789"]
SIZES: dict[str, Any] = {
    "vocab_size": len(PIECES),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(PIECES)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small gain nothing from threads, and lose much where other processes want the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sizes() -> dict[str, Any]:
    """Configuration of any tiny transformers model that fits :func:`tokenizer`."""
    return SIZES


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a Llama with random weights."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):  # not the model's own order, which may change
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * SIZES["initializer_range"])
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def tiny_config(tiny_model: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes a configuration of a run that takes milliseconds a step, with changes."""

    def make(**changes: Any) -> Config:
        values: dict[str, Any] = {
            "model": str(tiny_model),
            "output_dir": tmp_path / "run",
            "prompts_per_step": 3,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 1e-3,
            "max_steps": 6,
            "save_steps": 3,
            "reward_workers": 0,
            "eval_size": 4,
            "sinks": (),
            "forecast": "off",
            "report": False,
        }
        return Config.parse(values | changes)

    return make


@pytest.fixture(scope="session")
def wide_model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a Llama whose rows are multiples of 64, as quantisation wants them."""
    directory = tmp_path_factory.mktemp("wide") / "model"
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 128}, tie_word_embeddings=False))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def wide_config(tiny_config: Callable[..., Config], wide_model: Path) -> Callable[..., Config]:
    """As ``tiny_config``, of that model."""
    return lambda **changes: tiny_config(**{"model": str(wide_model)} | changes)


@pytest.fixture
def tiny_policy(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Policy]:
    """Makes a policy of a Llama with random weights, the same each time."""

    def make(model: PreTrainedModel | None = None) -> Policy:
        torch.manual_seed(7)
        return Policy(model or LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)), tokenizer)

    return make


@pytest.fixture
def short_embedded_run(embedded_config: Callable[..., Config]) -> Callable[..., float]:
    """Trains the embedded model for 40 steps of its task, with changes; gives the held-out accuracy."""

    def train(**changes: Any) -> float:
        config = embedded_config(
            prompts_per_step=16,
            warmup_steps=0.1,
            max_steps=40,
            eval_steps=40,
            eval_size=128,
            baseline_probe=0,
            reward_workers=0,
            **changes,
        )
        with GRPOTrainer(config) as trainer:
            return float(trainer.train()["eval_reward"])

    return train


@pytest.fixture
def letters() -> Task:
    """Prompts of letters; the reward is to be given with the task."""
    return LETTERS


@pytest.fixture
def share_of_vowels() -> Callable[..., list[float]]:
    """A reward that any model gets some of; it is sent to a worker by value, not imported there with this test."""

    def vowels(completions: list[str], **columns: Any) -> list[float]:
        return [sum(letter in "aei" for letter in text) / max(1, len(text)) for text in completions]

    return vowels


@pytest.fixture
def make_group() -> Callable[..., Group]:
    """Makes a group from rewards; its completions differ in length and tokens."""

    def make(
        index: int, rewards: list[float], *, prompt_length: int = 3, lengths: list[int] | None = None, truncated: bool = False
    ) -> Group:
        generator = torch.Generator().manual_seed(index)
        prompt = Prompt(index, f"prompt {index}", tuple(torch.randint(4, 28, (prompt_length,), generator=generator).tolist()))
        completions = [
            Completion(
                token_ids=tuple(torch.randint(2, 28, (length,), generator=generator).tolist()),
                logprobs=tuple((-3 * torch.rand(length, generator=generator)).tolist()),
                finish_reason="length" if truncated and number % 2 else "stop",
                text=f"completion {number}",
            )
            for number, length in enumerate(lengths or [1 + (index + g) % 5 for g in range(len(rewards))])
        ]
        return Group(prompt, completions, [[value] for value in rewards], list(rewards))

    return make


@pytest.fixture
def build(tiny_config: Callable[..., Config], letters: Task) -> Iterator[Callable[..., Parts]]:
    """Builds the parts of a run of the tiny model, and closes them."""
    opened: list[Parts] = []

    def make(given: dict[str, Any] | None = None, *, resume: bool = False, **settings: Any) -> Parts:
        opened.append(build_parts(tiny_config(**settings), {"task": letters} | (given or {}), resume=resume))
        return opened[-1]

    yield make
    for parts in opened:
        parts.close()
