"""Tiny models of every architecture that the engine must run, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_fast.types import Completion

VOCABULARY = 48
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4)),
    "llama-biased": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=1)),
    "mistral-windowed": lambda: MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    ),
}
FUSED = ["llama", "llama-biased", "qwen2", "qwen3"]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [5, 6, 7, 8, 9, 10, 12], [30, 31, 32, 33, 34]]


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = BUILDERS[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "bias" in key or "norm" in key or "ln_" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def flat(groups: list[list[Completion]]) -> list[Completion]:
    return [completion for group in groups for completion in group]


def forward_logprobs(model: PreTrainedModel, prompt: list[int], completion: Completion, temperature: float) -> torch.Tensor:
    """An independent full forward, as a trainer does it: right-padded, causal."""
    ids = torch.tensor([[*prompt, *completion.token_ids, 0, 0, 0]])
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, attention_mask=mask).logits[0, len(prompt) - 1 : -4]
    chosen = torch.tensor(completion.token_ids)
    return (logits.double() / temperature).log_softmax(-1).gather(1, chosen[:, None])[:, 0]
