"""What a model says of packed sequences is what it says of each alone, for every architecture that takes them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from grpo_fast.config import Config, ConfigError
from grpo_fast.ops import Piece, packed_layout, token_logprob
from grpo_fast.ops.products import rounded_rows
from grpo_fast.train.batch import TrainingSequence, build_batch
from grpo_fast.train.packed_model import let_pack, let_pad, takes_shared_prompts
from grpo_fast.train.policy import Policy
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.types import TokenBatch

CPU = torch.device("cpu")
# SmolLM2 is a Llama with tied embeddings
ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], str, dict[str, Any]]] = {
    "llama": (LlamaConfig, "sdpa", {"tie_word_embeddings": False}),
    "smollm2": (LlamaConfig, "sdpa", {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, "sdpa", {}),
    "qwen3": (Qwen3Config, "sdpa", {}),
    "gemma": (GemmaConfig, "sdpa", {}),
    "gemma2, window and softcaps": (Gemma2Config, "eager", {"sliding_window": 4, "attn_logit_softcapping": 0.5}),
    "gemma3, window": (Gemma3TextConfig, "sdpa", {"sliding_window": 4}),
    "mistral, window": (MistralConfig, "sdpa", {"sliding_window": 4}),
    "llama, eager": (LlamaConfig, "eager", {}),
}


INSIDE_FLOAT32 = ("gemma", "gemma2, window and softcaps", "gemma3, window", "llama, eager")
"""Models of transformers that compute norms or the softmax in float32, whatever their weights are."""


def build(name: str, sizes: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    kind, attention, settings = ARCHITECTURES[name]
    torch.manual_seed(3)
    config = kind(**sizes | settings)
    config._attn_implementation = attention
    model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[kind](config)
    return model.to(dtype).eval()


def ragged_sequences() -> list[TrainingSequence]:
    """Lengths that differ, one of a single token after its prompt, one beyond every window."""
    draw = random.Random(5)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, 28) for _ in range(count))

    shapes = [(3, 4), (1, 1), (6, 30), (2, 9), (1, 2)]
    return [TrainingSequence(tokens(p), tokens(c), (-1.0,) * c, 1.0, in_loss=True) for p, c in shapes]


def batch_of(sequences: Sequence[TrainingSequence], layout: Any) -> TokenBatch:
    return build_batch(sequences, [1.0] * len(sequences), CPU, layout=layout)


def logprobs(policy: Policy, batch: TokenBatch) -> torch.Tensor:
    return token_logprob(policy.scored_hidden_states(batch), policy.head(0.7), targets=batch.targets, want_entropy=False)[0]


def logprobs_of_the_model(model: PreTrainedModel, sequences: Sequence[TrainingSequence]) -> torch.Tensor:
    """From the model's own logits, each sequence alone, by a model that never heard of packing."""
    found = []
    for sequence in sequences:
        tokens, first = torch.tensor([*sequence.prompt_ids, *sequence.completion_ids]), len(sequence.prompt_ids)
        logits = model(input_ids=tokens[None], use_cache=False).logits[0] / 0.7
        found.append(logits.log_softmax(-1)[first - 1 : -1].gather(1, tokens[first:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_and_gradients_are_those_of_sequences_alone(
    name: str, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build(name, sizes, torch.float64)
    plain = copy.deepcopy(model)
    policy = Policy(model, tokenizer, padding_free=True)
    sequences = ragged_sequences()
    weights = torch.randn(sum(len(s.completion_ids) for s in sequences), dtype=torch.float64)
    found = logprobs(policy, batch_of(sequences, "packed"))
    (found.double() * weights).sum().backward()
    expected = logprobs_of_the_model(plain, sequences)
    (expected * weights).sum().backward()
    bound = 1e-5 if name in INSIDE_FLOAT32 else 1e-10
    assert torch.allclose(found, expected, rtol=bound, atol=bound)
    theirs = dict(plain.named_parameters())
    for key, weight in model.named_parameters():
        assert weight.grad is not None, key
        assert torch.allclose(weight.grad, theirs[key].grad, rtol=bound, atol=bound), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_float32_packed_and_padded_agree(name: str, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    sequences = ragged_sequences()
    packed = Policy(build(name, sizes, torch.float32), tokenizer, padding_free=True)
    padded = Policy(build(name, sizes, torch.float32), tokenizer)
    assert (packed.layout, padded.layout) == ("packed", "padded")
    with torch.no_grad():
        difference = logprobs(packed, batch_of(sequences, "packed")) - logprobs(padded, batch_of(sequences, "padded"))
    assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_completions_of_a_shared_prompt_are_those_of_sequences_alone(
    name: str, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build(name, sizes, torch.float64)
    plain = copy.deepcopy(model)
    policy = Policy(model, tokenizer, padding_free=True)
    draw = random.Random(6)
    sequences = [
        TrainingSequence(prompt, tuple(draw.randrange(4, 28) for _ in range(length)), (-1.0,) * length, 1.0, in_loss=True)
        for prompt, lengths in (((5, 6, 7, 8, 9), (3, 1, 7, 7)), ((4,), (2,)), ((9, 8, 7), (40, 2)))
        for length in lengths
    ]
    batch = build_batch(sequences, [1.0] * len(sequences), CPU, layout="packed", shares_prompts=True)
    assert batch.input_ids.shape == (1, rounded_rows(sum(map(len, sequences)) - 3 * 5 - 3, CPU))
    found = logprobs(policy, batch)
    weights = torch.randn(len(found), dtype=torch.float64)
    (found * weights).sum().backward()
    expected = logprobs_of_the_model(plain, sequences)
    (expected * weights).sum().backward()
    bound = 1e-5 if name in INSIDE_FLOAT32 else 1e-10
    assert torch.allclose(found, expected, rtol=bound, atol=bound)
    theirs = dict(plain.named_parameters())
    for key, weight in model.named_parameters():  # norms of transformers round gradients to float32, here after their sum
        assert weight.grad is not None, key
        assert (weight.grad - theirs[key].grad).norm() <= 1e-6 * theirs[key].grad.norm(), key


@pytest.mark.parametrize("name", ["llama", "gemma2, window and softcaps"])
def test_a_border_that_is_dropped_shows(name: str, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    policy, sequences = Policy(build(name, sizes, torch.float64), tokenizer, padding_free=True), ragged_sequences()
    batch = batch_of(sequences, "packed")
    joined = copy.copy(batch)
    object.__setattr__(joined, "packed_layout", packed_layout([Piece(0, batch.input_ids.shape[1])], device=CPU))
    with torch.no_grad():
        right, wrong = logprobs(policy, batch), logprobs(policy, joined)
    first = len(sequences[0].completion_ids)
    assert torch.allclose(right[:first], wrong[:first])
    assert (right[first:] - wrong[first:]).abs().max() > 1e-3


def test_sampling_is_left_as_it_was(sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name in ("llama", "gemma2, window and softcaps"):
        model = build(name, sizes, torch.float32)
        ids = torch.tensor([[0, 0, 5, 6, 7], [4, 5, 6, 7, 8]])
        mask = (ids > 0).long()
        before = model(input_ids=ids, attention_mask=mask).logits
        Policy(model, tokenizer, padding_free=True)
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
        model.save_pretrained(tmp_path / name)
        assert "packed" not in (tmp_path / name / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda sizes: BloomConfig(vocab_size=28, hidden_size=32, n_layer=2, n_head=2), "BloomForCausalLM does not tell its"),
        (lambda sizes: GptOssConfig(**sizes, num_local_experts=4, rope_parameters=None), "GptOssAttention adds s_aux"),
        (
            lambda sizes: GPTNeoConfig(
                vocab_size=28, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
            ),
            "GPTNeoForCausalLM computes attention by code of its own",  # whose masks end at the longest single sequence
        ),
    ],
    ids=["no flash attention", "sinks", "own attention"],
)
def test_a_model_that_cannot_is_refused_by_name_or_padded(
    make: Callable[[dict[str, Any]], PreTrainedConfig], message: str, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    config = make(sizes)
    config._attn_implementation = "eager"
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    with pytest.raises(ConfigError, match=f"padding_free=True: .*{message}.*set padding_free=False"):
        Policy(model, tokenizer, padding_free=True)
    assert Policy(model, tokenizer, padding_free=None).layout == "padded"
    assert model.config._attn_implementation == "eager"


def test_a_model_that_leaks_is_found_out(sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    class Leaking(LlamaForCausalLM):
        """Adds to each token something of the one before it, whoever's that is."""

        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.model.embed_tokens.register_forward_hook(lambda _, __, out: out + out.roll(1, dims=1) * (out.shape[1] > 1))

    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=r"Leaking mixes packed sequences \(hidden states differ by"):
        Policy(Leaking(LlamaConfig(**sizes)), tokenizer, padding_free=True)


def test_other_attention_is_named(sizes: dict[str, Any]) -> None:
    model = build("llama", sizes, torch.float32)
    model.set_attn_implementation("flex_attention")
    problem = let_pack(model)
    assert problem is not None
    assert problem.startswith("attn_implementation='flex_attention' does not support packed sequences")
    model.set_attn_implementation("sdpa")
    assert let_pack(model) is let_pack(model) is None
    assert model.config._attn_implementation == "packed_sdpa"
    let_pad(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_mode": "selective"},  # runs under a dispatch mode
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_checkpointing_and_bfloat16_go_with_it(tiny_model: Path, settings: dict[str, Any]) -> None:
    config = Config.parse({"model": str(tiny_model), "max_completion_length": 8})
    sequences = ragged_sequences()
    gradients = []
    for changes in ({}, settings):
        policy = PolicySource(config.replace(padding_free=True, **changes)).load()
        assert takes_shared_prompts(policy.model)  # which loading has tried
        logprobs(policy, batch_of(sequences, "packed")).sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in policy.model.parameters() if weight.grad is not None]))
    exact, found = gradients
    bound = 0.0 if "dtype" not in settings else 0.05
    assert (found - exact).norm() <= bound * exact.norm()


def test_the_configuration_decides(tiny_model: Path) -> None:
    config = Config.parse({"model": str(tiny_model), "max_completion_length": 8})
    chosen = [PolicySource(config.replace(padding_free=wanted)).load().layout for wanted in (None, True, False)]
    assert chosen == ["packed", "packed", "padded"]
    assert AutoConfig.from_pretrained(tiny_model).model_type == "llama"
