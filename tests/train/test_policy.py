from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils.logging import is_progress_bar_enabled

from grpo_fast.config import Config, ConfigError
from grpo_fast.ops import token_logprob
from grpo_fast.train.policy import Policy
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.train.step import TrainingSequence, build_batch
from grpo_fast.types import TokenBatch

MODELS: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "llama": lambda sizes: LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)),
    "qwen2-tied": lambda sizes: Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)),
    "gpt2-dropout": lambda sizes: GPT2LMHeadModel(
        GPT2Config(vocab_size=sizes["vocab_size"], n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    ),
    "gemma2-softcap": lambda sizes: Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.5)),
    "cohere-logit-scale": lambda sizes: CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.25)),
    "granite-logits-scaling": lambda sizes: GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=4.0)),
}


def save_model(name: str, directory: Path, *, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(3)
    model = MODELS[name](sizes).eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


def load(directory: Path, **settings: Any) -> Policy:
    return PolicySource(Config.parse({"model": str(directory), "max_completion_length": 8, **settings})).load()


def ragged_batch() -> TokenBatch:
    """Two sequences of different length, padding included."""
    sequences = [
        TrainingSequence((4, 5, 6), (7, 8, 9, 10), (-1.0,) * 4, 1.0, in_loss=True),
        TrainingSequence((11,), (12, 13), (-1.0,) * 2, -1.0, in_loss=True),
    ]
    return build_batch(sequences, [1.0, 1.0], torch.device("cpu"))


def expected_logprobs(model: PreTrainedModel, batch: TokenBatch, *, temperature: float) -> torch.Tensor:
    """The model's own logits, each sequence alone and without padding."""
    found = []
    for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        tokens = row[mask.bool()]
        logits = model(input_ids=tokens[None], use_cache=False).logits[0].double() / temperature
        found.append(logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0])
    return torch.cat([found[0][2:], found[1]])


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_through_the_head_are_those_of_the_models_logits(
    name: str, tmp_path: Path, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = save_model(name, tmp_path, sizes=sizes, tokenizer=tokenizer)
    # Gemma 2's cap inside attention is not in torch's fused attention
    policy, batch = load(tmp_path, attn_implementation="eager"), ragged_batch()
    with torch.no_grad():
        hidden = policy.scored_hidden_states(batch)
        found, entropy = token_logprob(hidden, policy.head(0.7), targets=batch.targets, want_entropy=True)
        expected = expected_logprobs(model, batch, temperature=0.7)
    assert hidden.shape == (6, sizes["hidden_size"])
    assert torch.allclose(found.double(), expected, atol=2e-6)
    # the guard: had the scale or the cap been left out, the values would differ by far more
    assert entropy is not None
    assert expected.std() > 1e-3


def test_logits_that_are_not_head_of_hidden_states_are_refused(
    sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    class Shifted(LlamaForCausalLM):
        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            output = super().forward(*arguments, **keywords)
            output.logits = output.logits + torch.arange(output.logits.shape[-1]) * 0.01
            return output

    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=r"Shifted computes logits in an unknown way .* nats"):
        Policy(Shifted(LlamaConfig(**sizes)), tokenizer)


def test_weights_that_give_nan_are_refused(sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    with torch.no_grad():
        model.get_output_embeddings().weight[0] = math.nan
    with pytest.raises(ConfigError, match="nan nats"):
        Policy(model, tokenizer)


def test_a_model_without_a_head_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = BertModel(BertConfig(vocab_size=28, hidden_size=32, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ConfigError, match="BertModel has no output embeddings"):
        Policy(encoder, tokenizer)


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    batch = ragged_batch()
    logprobs, _ = token_logprob(policy.scored_hidden_states(batch), policy.head(1.0), targets=batch.targets, want_entropy=False)
    logprobs.sum().backward()
    return {name: value.grad for name, value in policy.model.named_parameters() if value.grad is not None}


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model: Path) -> None:
    plain, checkpointed = load(tiny_model), load(tiny_model, gradient_checkpointing=True)
    expected, calls = gradients(plain), 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for module in checkpointed.model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.register_forward_pre_hook(count)
    found = gradients(checkpointed)
    assert calls == 4, "two layers, each run once more in the backward pass"
    assert expected.keys() == found.keys()
    assert len(expected) == len(list(plain.model.parameters()))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_saved_model_is_one_that_transformers_reads(tiny_model: Path, tmp_path: Path) -> None:
    policy = load(tiny_model)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.25)
    policy.save(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, value in model.named_parameters():
        assert torch.equal(value, dict(policy.model.named_parameters())[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab=")["input_ids"] == policy.tokenizer("ab=")["input_ids"]


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_weights_are_taken_over_in_place(
    name: str, tmp_path: Path, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    save_model(name, tmp_path / "first", sizes=sizes, tokenizer=tokenizer)
    policy = load(tmp_path / "first")
    before = {key: (id(value), value.detach().clone()) for key, value in policy.model.named_parameters()}
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(torch.rand_like(parameter))
    policy.load_weights(tmp_path / "first")
    for key, value in policy.model.named_parameters():
        assert (id(value), True) == (before[key][0], torch.equal(value, before[key][1])), key
    assert policy.head(1.0).weight is policy.model.get_output_embeddings().weight


@pytest.mark.parametrize("name", ["llama", "gpt2-dropout"])
def test_dropout_is_off(name: str, tmp_path: Path, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    save_model(name, tmp_path, sizes=sizes | {"attention_dropout": 0.5}, tokenizer=tokenizer)
    policy, batch = load(tmp_path), ragged_batch()
    policy.model.train()
    with torch.no_grad():
        first, second = (policy.scored_hidden_states(batch) for _ in range(2))
    assert torch.equal(first, second)


def test_bfloat16_is_computed_in_but_not_stored(tiny_model: Path) -> None:
    exact, rounded, batch = load(tiny_model), load(tiny_model, dtype="bfloat16"), ragged_batch()
    with torch.no_grad():
        difference = (exact.scored_hidden_states(batch) - rounded.scored_hidden_states(batch)).abs().max()
    assert 1e-5 < difference < 0.1
    assert all(parameter.dtype == torch.float32 for parameter in rounded.model.parameters())
    assert (exact.head(1.0).operand_dtype, rounded.head(1.0).operand_dtype) == (None, torch.bfloat16)
    assert rounded.head(1.0).weight is rounded.model.get_output_embeddings().weight


def test_what_is_saved_has_the_mode_of_other_files(tiny_model: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        load(tiny_model).save(tmp_path / "whole")
        load(tiny_model, use_peft=True).save(tmp_path / "adapters")
    finally:
        os.umask(before)
    saved = [file for name in ("whole", "adapters") for file in (tmp_path / name).glob("*.safetensors")]
    assert len(saved) == 2
    assert {oct(file.stat().st_mode & 0o777) for file in saved} == {"0o640"}


def test_saving_is_silent_and_leaves_progress_bars_as_they_were(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    policy = load(tiny_model)
    capfd.readouterr()
    policy.save(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert is_progress_bar_enabled()
