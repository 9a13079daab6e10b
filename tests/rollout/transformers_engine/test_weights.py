"""Whose weights are sampled from, and that the model is left as it was."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from grpo_fast.rollout import SamplingParams, decode_batch
from grpo_fast.rollout.transformers_engine import TransformersEngine
from tests.rollout.transformers_engine.tiny import PROMPTS, build, flat, forward_logprobs


def test_modes_are_restored_module_by_module_and_training_goes_on(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    engine = TransformersEngine(model, tokenizer)
    engine.generate(PROMPTS, SamplingParams(max_tokens=4), num_generations=2, seed=0)
    assert [module.training for module in model.modules()] == modes
    assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])
    model(input_ids=torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_samples_from_the_weights_of_the_moment(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    engine = TransformersEngine(model, tokenizer)
    params = SamplingParams(max_tokens=4, temperature=0.0)
    before = engine.generate(PROMPTS, params, num_generations=1, seed=0)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert engine.sync_weights(model, 3) == {}
    after = engine.generate(PROMPTS, params, num_generations=1, seed=0)
    assert {completion.weight_version for completion in flat(before)} == {0}
    assert {completion.weight_version for completion in flat(after)} == {3} == {engine.weight_version}
    assert [c.token_ids for c in flat(before)] != [c.token_ids for c in flat(after)]
    for prompt, (completion,) in zip(PROMPTS, after, strict=True):
        torch.testing.assert_close(
            torch.tensor(completion.logprobs).double(), forward_logprobs(model, prompt, completion, 1.0), rtol=0, atol=1e-5
        )


def test_weights_of_its_own_change_by_a_sync_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    engine, shared = TransformersEngine(model, tokenizer, own_weights=True), TransformersEngine(model, tokenizer)
    params = SamplingParams(max_tokens=6)

    def sample(each: TransformersEngine) -> list[tuple[int, ...]]:
        return [completion.token_ids for completion in flat(each.generate(PROMPTS, params, num_generations=2, seed=0))]

    before = sample(engine)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert sample(engine) == before
    engine.sync_weights(model, 1)
    assert sample(engine) == sample(shared) != before


def test_weights_of_its_own_are_those_that_autocast_would_make(tokenizer: PreTrainedTokenizerFast) -> None:
    model, params = build("llama"), SamplingParams(max_tokens=6)
    engine, shared = (
        TransformersEngine(model, tokenizer, autocast_dtype=torch.bfloat16, own_weights=own) for own in (True, False)
    )
    assert {own.dtype for own in engine._model.parameters() if own.ndim > 1} == {torch.bfloat16, torch.float32}
    assert engine._model.get_input_embeddings().weight.dtype == torch.float32, "hidden states are of its type"
    with torch.no_grad():
        model.lm_head.weight.neg_()
    engine.sync_weights(model, 0)
    expected = shared.generate(PROMPTS, params, num_generations=2, seed=0)
    assert engine.generate(PROMPTS, params, num_generations=2, seed=0) == expected
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_layers_that_share_a_weight_share_it_in_the_copy(tokenizer: PreTrainedTokenizerFast) -> None:
    model, params = build("llama"), SamplingParams(max_tokens=6)
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    engine, shared = (
        TransformersEngine(model, tokenizer, autocast_dtype=torch.bfloat16, own_weights=own) for own in (True, False)
    )
    own = [layer.mlp.up_proj.weight for layer in engine._model.model.layers]
    assert own[0] is own[1]
    assert own[0].dtype == torch.bfloat16
    with torch.no_grad():
        first.mlp.up_proj.weight.neg_()
    engine.sync_weights(model, 0)
    expected = shared.generate(PROMPTS, params, num_generations=2, seed=0)
    assert engine.generate(PROMPTS, params, num_generations=2, seed=0) == expected


def test_of_a_model_with_adapters_those_alone_are_copied(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False), model)
    model.requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.requires_grad_(".lora_" in name)
    engine = TransformersEngine(model, tokenizer, own_weights=True)
    for (name, weight), own in zip(model.named_parameters(), engine._model.parameters(), strict=True):
        assert (own is weight) == (".lora_" not in name)
    params = SamplingParams(max_tokens=6)
    before = engine.generate(PROMPTS, params, num_generations=2, seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.mul_(-3)
    assert engine.generate(PROMPTS, params, num_generations=2, seed=0) == before
    engine.sync_weights(model, 0)
    assert engine.generate(PROMPTS, params, num_generations=2, seed=0) != before


def test_sync_takes_a_wrapper_and_refuses_a_stranger(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(llama, tokenizer)
    wrapper = torch.nn.Module()
    wrapper.module = llama
    engine.sync_weights(wrapper, 5)
    assert engine.weight_version == 5
    with pytest.raises(ValueError, match="samples from the module that it was built with"):
        engine.sync_weights(build("qwen2"), 6)
    assert engine.weight_version == 5


def test_an_interrupt_leaves_the_model_as_it_was(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    model.train()
    engine = TransformersEngine(model, tokenizer)
    params = SamplingParams(max_tokens=6)
    expected = engine.generate(PROMPTS, params, num_generations=2, seed=0)
    calls = 0
    original = decode_batch.sample

    def interrupted(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(decode_batch, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, params, num_generations=2, seed=0)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert engine.generate(PROMPTS, params, num_generations=2, seed=0) == expected


def test_close_twice(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(llama, tokenizer)
    engine.close()
    engine.close()
