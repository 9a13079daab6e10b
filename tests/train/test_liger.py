from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_fast.config import Config, ConfigError
from grpo_fast.train.batch import TrainingSequence, build_batch
from grpo_fast.train.liger import require_liger, use_liger_kernels
from grpo_fast.train.policy import Policy
from grpo_fast.train.policy_source import PolicySource

INSTALLED = importlib.util.find_spec("liger_kernel") is not None
needs_liger = pytest.mark.skipif(not INSTALLED, reason="liger-kernel is not installed")
MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": lambda sizes: LlamaForCausalLM(LlamaConfig(**sizes)),
    "qwen3": lambda sizes: Qwen3ForCausalLM(Qwen3Config(**sizes)),
    "gemma2": lambda sizes: Gemma2ForCausalLM(Gemma2Config(**sizes)),
}


def test_on_a_cpu_it_is_refused_before_anything_is_read(tiny_config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="use_liger_kernel=True on a CPU: Liger's kernels are for GPUs; leave it out"):
        PolicySource(tiny_config(use_liger_kernel=True, device="cpu"))


@pytest.mark.skipif(INSTALLED, reason="liger-kernel is installed")
def test_where_it_is_missing_it_is_named() -> None:
    with pytest.raises(ConfigError, match=r"use_liger_kernel needs liger-kernel; `pip install 'grpo-fast\[liger\]'`"):
        require_liger("llama")


@needs_liger
def test_a_model_that_liger_does_not_know_is_refused() -> None:
    require_liger("llama")
    with pytest.raises(ConfigError, match="Liger does not know models of type 'gpt2'"):
        require_liger("gpt2")


@needs_liger
@pytest.mark.parametrize("name", MODELS)
def test_layers_are_replaced_and_the_head_and_its_loss_are_not(name: str, sizes: dict[str, Any]) -> None:
    model: Any = MODELS[name](sizes)
    before, names = model.forward.__func__, [name for name, _ in model.named_parameters()]
    use_liger_kernels(model)
    assert model.forward.__func__ is before
    assert [name for name, _ in model.named_parameters()] == names
    for layer in model.model.layers:
        assert "liger" in layer.input_layernorm.forward.__module__
        assert "liger" in layer.mlp.forward.__module__
    assert "liger" in model.model.norm.forward.__module__
    assert "forward" not in vars(model.lm_head)


@needs_liger
@pytest.mark.gpu
@pytest.mark.parametrize("use_peft", [False, True])
def test_hidden_states_and_gradients_are_those_without_it(use_peft: bool, tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(device="cuda", dtype="float32", use_peft=use_peft)
    sequences = [
        TrainingSequence((4, 5, 6), tuple(7 + number % 9 for number in range(40)), (-1.0,) * 40, 1.0, in_loss=True),
        TrainingSequence((11,), (12, 13), (-1.0,) * 2, -1.0, in_loss=True),
    ]

    def pass_of(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
        batch = build_batch(sequences, [1.0, 1.0], policy.device, layout=policy.layout)
        hidden = policy.scored_hidden_states(batch)
        hidden.square().sum().backward()
        return hidden, torch.cat([w.grad.flatten() for w in policy.model.parameters() if w.grad is not None])

    plain, replaced = (pass_of(PolicySource(config.replace(use_liger_kernel=on)).load()) for on in (False, True))
    torch.testing.assert_close(replaced[0], plain[0], rtol=1e-4, atol=1e-5)
    assert (replaced[1] - plain[1]).norm() <= 1e-4 * plain[1].norm()
