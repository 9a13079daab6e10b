from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    OPTConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from grpo_fast.config import Config, ConfigError
from grpo_fast.train.batch import TrainingSequence, build_batch
from grpo_fast.train.checkpointing import checkpoint_layers
from grpo_fast.train.policy import Policy
from grpo_fast.train.policy_source import PolicySource


class CountedOps(TorchDispatchMode):
    """Counts every op that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def backward(policy: Policy) -> tuple[torch.Tensor, Counter[str]]:
    """Gradients, and what ran in the backward pass."""
    sequences = [
        TrainingSequence((4, 5, 6), (7, 8, 9, 10), (-1.0,) * 4, 1.0, in_loss=True),
        TrainingSequence((11,), (12, 13), (-1.0,) * 2, -1.0, in_loss=True),
    ]
    batch = build_batch(sequences, [1.0, 1.0], torch.device("cpu"), layout=policy.layout)
    loss = policy.scored_hidden_states(batch).square().sum()
    with CountedOps() as counted:
        loss.backward()
    return torch.cat([w.grad.flatten() for w in policy.model.parameters() if w.grad is not None]), counted.counts


@pytest.mark.parametrize("padding_free", [True, False])
def test_no_mode_changes_a_bit_and_selective_repeats_no_product(tiny_config: Callable[..., Config], padding_free: bool) -> None:
    config = tiny_config(padding_free=padding_free)
    plain, full, selective = (
        backward(PolicySource(config.replace(**changes)).load())
        for changes in (
            {},
            {"gradient_checkpointing": True},
            {"gradient_checkpointing": True, "gradient_checkpointing_mode": "selective"},
        )
    )
    assert torch.equal(plain[0], full[0])
    assert torch.equal(plain[0], selective[0])
    products = [counts["mm"] for _, counts in (plain, full, selective)]
    assert products[0] == products[2]
    assert products[1] == products[0] + 2 * 6, "two layers of seven projections, the last of which nothing reads"
    attention = [counts["_scaled_dot_product_flash_attention_for_cpu"] for _, counts in (plain, full, selective)]
    assert attention == [0, 2, 0]
    assert selective[1]["rsqrt"] == full[1]["rsqrt"] > plain[1]["rsqrt"], "norms are computed again"


NOISY: dict[str, Callable[[dict[str, Any]], PreTrainedConfig]] = {
    "rates in modules": lambda sizes: OPTConfig(
        **{name: sizes[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        ffn_dim=48,
        word_embed_proj_dim=32,
        dropout=0.5,
        layerdrop=0.5,
    ),
    "rates in the configuration": lambda sizes: FalconConfig(
        **{name: size for name, size in sizes.items() if name != "head_dim"}, hidden_dropout=0.5, attention_dropout=0.5
    ),
    "a router that draws": lambda sizes: PhimoeConfig(**sizes, num_local_experts=4, input_jitter_noise=0.5),
}


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_what_is_random_in_training_stays_off(
    name: str,
    mode: str,
    tiny_config: Callable[..., Config],
    tmp_path: Path,
    sizes: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(NOISY[name](sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = tiny_config(model=str(tmp_path))
    checkpointed = plain.replace(gradient_checkpointing=True, gradient_checkpointing_mode=mode)
    expected, found = (backward(PolicySource(config).load()) for config in (plain, checkpointed))
    assert found[1].total() > expected[1].total(), "the guard: something is computed again"
    assert torch.equal(found[0], expected[0])


def test_a_model_that_cannot_checkpoint_is_refused() -> None:
    class Plain(PreTrainedModel):
        config_class = OPTConfig

    with pytest.raises(ConfigError, match=r"gradient_checkpointing=True: Plain .*; leave it out"):
        checkpoint_layers(Plain(OPTConfig()), "full")


def test_a_mode_without_checkpointing_is_refused(tiny_config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="gradient_checkpointing_mode='selective' without gradient_checkpointing"):
        tiny_config(gradient_checkpointing_mode="selective")


def test_only_whole_layers_cost_products(tiny_config: Callable[..., Config]) -> None:
    assert not tiny_config().recomputes_products
    assert tiny_config(gradient_checkpointing=True).recomputes_products
    assert not tiny_config(gradient_checkpointing=True, gradient_checkpointing_mode="selective").recomputes_products
