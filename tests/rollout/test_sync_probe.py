from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_fast.rollout.sync_probe import NUM_TOKENS, SyncProbe


def build_probe(block_size: int = 4, context_length: int = 64) -> SyncProbe:
    return SyncProbe.build(
        vocabulary=40, block_size=block_size, context_length=context_length, engine_dtype=torch.float32, autocast_dtype=None
    )


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
        )
    )


def test_the_prompt_is_longer_than_two_blocks_and_always_the_same() -> None:
    assert len(build_probe(block_size=16).prompt) > 32
    assert build_probe() == build_probe()
    assert len(set(build_probe(block_size=16).prompt)) > 20


def test_a_context_without_room_for_two_blocks_is_refused() -> None:
    length = len(build_probe(block_size=8).prompt) + NUM_TOKENS
    build_probe(block_size=8, context_length=length)
    with pytest.raises(ValueError, match=f"two cache blocks of 8 tokens does not fit the context of {length - 1}"):
        build_probe(block_size=8, context_length=length - 1)


def test_scores_are_the_models_own(model: LlamaForCausalLM) -> None:
    probe = build_probe()
    completions = [[1, 2, 3], [39, 0, 7]]
    scores = probe.score(model, completions)
    assert scores.dtype == torch.float64
    double = LlamaForCausalLM(model.config).double()
    double.load_state_dict(model.state_dict())
    for row, tokens in zip(scores, completions, strict=True):
        for position, token in enumerate(tokens):
            logits = double(torch.tensor([[*probe.prompt, *tokens[:position]]])).logits[0, -1]
            assert row[position].item() == pytest.approx(logits.log_softmax(-1)[token].item(), abs=2e-6)


def test_the_divergence_is_that_of_the_formula(model: LlamaForCausalLM) -> None:
    probe = build_probe()
    completions = [[5, 6], [7, 8]]
    own = probe.score(model, completions)
    shift = torch.tensor([[0.3, -0.1], [0.0, 0.02]], dtype=torch.float64)
    found = probe.compare(model, completions, (own - shift).tolist())
    expected = sum(math.exp(d) - 1 - d for d in (0.3, -0.1, 0.0, 0.02)) / 4
    assert found.kl == pytest.approx(expected, rel=1e-12)
    assert found.largest == pytest.approx(0.3, rel=1e-12)
    assert found.kl > probe.max_kl


def test_the_gate_lets_rounding_through_and_one_small_update_not(model: LlamaForCausalLM) -> None:
    probe = build_probe()
    completions = torch.randint(40, (4, NUM_TOKENS), generator=torch.Generator().manual_seed(1)).tolist()
    logprobs = probe.score(model, completions)
    rounded = logprobs.float() + torch.linspace(-2e-5, 2e-5, logprobs.numel()).view_as(logprobs)
    assert probe.compare(model, completions, rounded.tolist()).kl <= probe.max_kl
    moved = LlamaForCausalLM(model.config)
    moved.load_state_dict({name: weight + 1e-3 * weight.sign() for name, weight in model.state_dict().items()})
    assert probe.compare(moved, completions, logprobs.tolist()).kl > probe.max_kl
