from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import (
    AutoTokenizer,
    DynamicCache,
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

from grpo_fast.assets import embedded_model_dir
from grpo_fast.ops import decoder_layer
from grpo_fast.rollout import native_step
from grpo_fast.rollout.engine import SamplingParams
from grpo_fast.rollout.kv_cache import cache_argument
from grpo_fast.rollout.llama_step import supports
from grpo_fast.rollout.native_step import NativeStep, takes
from grpo_fast.rollout.shared_prefix import SharedPrefixCache
from grpo_fast.rollout.transformers_engine import TransformersEngine
from tests.rollout.transformers_engine.tiny import flat

pytestmark = pytest.mark.skipif(bool(decoder_layer.problem()), reason=decoder_layer.problem())

SIZES = {
    "vocab_size": 37,
    "hidden_size": 42,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama, scaled angles": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0})
    ),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "adapters": lambda: adapted(LlamaForCausalLM(LlamaConfig(**SIZES)), "all-linear"),
    "adapters of some, with biases": lambda: adapted(Qwen2ForCausalLM(Qwen2Config(**SIZES)), ["q_proj", "down_proj"]),
    "scaled adapters": lambda: adapted(LlamaForCausalLM(LlamaConfig(**SIZES)), ["v_proj"], lora_alpha=40),
}
PROMPTS = ([3, 4, 5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16])


def adapted(model: PreTrainedModel, targets: str | list[str], **settings: Any) -> PreTrainedModel:
    config = peft.LoraConfig(r=5, target_modules=targets, init_lora_weights=False, **settings)
    peft.inject_adapter_in_model(config, model)
    return model


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # a bias is 0 at first, and a norm 1
    assert supports(model)
    return model


def prefilled(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache()
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    model(ids, attention_mask=seen, position_ids=(seen.cumsum(-1) - 1).clamp(min=0), **{cache_argument(model): cache})
    return cache


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_steps_equal_the_module_in_float64(name: str) -> None:
    """Over prompts of several lengths, and after sequences were moved into the places of ended ones."""
    model = build(name)
    source = np.array([0, 0, 1, 2, 2, 2])
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    cache = SharedPrefixCache(source, lengths.max() - lengths, max_tokens=6, like=prefilled(model))
    cache.fill(slice(0, 3), prefilled(model))
    step = NativeStep(model, 20)
    tokens = torch.randint(3, 37, (6, 6), generator=torch.Generator().manual_seed(0))
    exact = build(name).double()
    rows = list(range(6))
    for position in range(6):
        if position == 3:  # rows 4 and 5 take the places of rows 0 and 2; prompt 1 is forgotten
            cache.move(torch.tensor([4, 5]), torch.tensor([0, 2]), 4)
            rows = [4, 1, 5, 3]
        found = step(cache, tokens[rows, position], torch.from_numpy(lengths[source[rows]]) + position)
        for row, logits in zip(rows, found, strict=True):
            whole = torch.tensor([PROMPTS[source[row]] + tokens[row, : position + 1].tolist()])
            expected = exact(whole).logits[0, -1]
            torch.testing.assert_close(logits.double().log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "adapters"])
def test_an_engine_samples_what_the_module_samples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = build(name), AutoTokenizer.from_pretrained(embedded_model_dir())
    steps = []
    call = NativeStep.__call__
    monkeypatch.setattr(NativeStep, "__call__", lambda *arguments: (steps.append(0), call(*arguments))[1])
    sampling = SamplingParams(max_tokens=24)
    sampled = []
    for impl in ("auto", "module"):
        engine = TransformersEngine(model, tokenizer, eos_token_ids=[20], impl=impl)  # some end early
        sampled.append(engine.generate(PROMPTS, sampling, num_generations=4, seed=1))
        assert len(steps) in range(12, 24), "the module's run adds none"
    for ours, its in zip(*map(flat, sampled), strict=True):
        assert ours.token_ids == its.token_ids
        assert ours.logprobs == pytest.approx(its.logprobs, abs=1e-5)


def switched_off(model: PreTrainedModel) -> None:
    for module in adapted(model, ["q_proj"]).modules():
        if hasattr(module, "base_layer"):
            module.enable_adapters(False)


def decomposed(model: PreTrainedModel) -> None:
    adapted(model, ["q_proj"], use_dora=True)


def adapted_head(model: PreTrainedModel) -> None:
    adapted(model, ["q_proj", "lm_head"])


def adapted_embedding(model: PreTrainedModel) -> None:
    adapted(model, ["embed_tokens"])


def widened(model: PreTrainedModel) -> None:
    model.double()


def transposed(model: PreTrainedModel) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T


def elsewhere(model: PreTrainedModel) -> None:
    model.to("meta")


@pytest.mark.parametrize(
    "change",
    [switched_off, decomposed, adapted_head, adapted_embedding, widened, transposed, elsewhere],
    ids=lambda change: change.__name__,
)
def test_other_models_are_left_to_torch(change: Callable[[PreTrainedModel], None]) -> None:
    model = build("llama")
    assert takes(model, 8)
    change(model)
    assert not takes(model, 8)


def test_many_rows_and_missing_extensions_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    most = decoder_layer.MOST_NUMBERS // 42
    assert takes(model, most)
    assert not takes(model, most + 1)
    monkeypatch.setattr(native_step, "problem", lambda: "not built")
    assert not takes(model, 8)
