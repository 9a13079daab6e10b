from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_fast.config import Config, ConfigError
from grpo_fast.train.batch import TrainingSequence, build_batch
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


def test_a_mode_without_checkpointing_is_refused(tiny_config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="gradient_checkpointing_mode='selective' without gradient_checkpointing"):
        tiny_config(gradient_checkpointing_mode="selective")


def test_only_whole_layers_cost_products(tiny_config: Callable[..., Config]) -> None:
    assert not tiny_config().recomputes_products
    assert tiny_config(gradient_checkpointing=True).recomputes_products
    assert not tiny_config(gradient_checkpointing=True, gradient_checkpointing_mode="selective").recomputes_products
