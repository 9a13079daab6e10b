"""What is refused, before anything is computed, and weights that have diverged."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from grpo_fast.rollout import SamplingParams
from grpo_fast.rollout.transformers_engine import TransformersEngine
from tests.rollout.transformers_engine.tiny import PROMPTS, VOCABULARY, build


@pytest.mark.parametrize(
    ("prompts", "generations", "message"),
    [
        ([], 2, "prompts is empty"),
        ([[3], []], 2, "prompt 1 is empty"),
        ([[3], [4] * 55], 2, r"prompt 1 has 55 tokens.*max_tokens=10.*context of 64"),
        ([[3, 48]], 2, "token ids from 3 to 48.*0 to 47"),
        ([[3, -1]], 2, "token ids from -1 to 3"),
        ([[3]], 0, "num_generations must be at least 1, got 0"),
    ],
)
def test_refuses_before_computing(
    prompts: list[list[int]],
    generations: int,
    message: str,
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = TransformersEngine(llama, tokenizer)
    monkeypatch.setattr(LlamaForCausalLM, "forward", None)
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, SamplingParams(max_tokens=10), num_generations=generations, seed=0)


@pytest.mark.parametrize("changes", [{"max_batch_tokens": 0}, {"check_every": 0}])
def test_refuses_sizes_below_one(changes: dict[str, int], llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(changes))} must be at least 1.*got 0"):
        TransformersEngine(llama, tokenizer, **changes)


def test_refuses_models_it_cannot_run(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder"):
        TransformersEngine(encoder, tokenizer)
    model = build("qwen2")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="layers of type linear_attention"):
        TransformersEngine(model, tokenizer)


@pytest.mark.parametrize("name", ["gpt2", "mistral-windowed"])
def test_fused_is_refused_where_it_does_not_fit(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="impl='fused' does not support this"):
        TransformersEngine(build(name), tokenizer, impl="fused")


def test_diverged_weights_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = math.nan
    with pytest.raises(FloatingPointError, match="not finite within the first 1 tokens"):
        TransformersEngine(model, tokenizer).generate(PROMPTS, SamplingParams(max_tokens=3), num_generations=1, seed=0)
