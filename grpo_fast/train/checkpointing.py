"""Gradient checkpointing: which activations a layer keeps, and which it computes once more in the backward pass.

``full`` keeps a layer's input. ``selective`` also keeps what matrix products and attention gave, so that what is computed again
is cheap: norms, rotary positions, the activation, sums. ``offload`` is ``full`` with the inputs in the host's memory (see
:mod:`~grpo_fast.train.offload`). None changes a bit of a gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from grpo_fast.ops.products import ONEDNN_OPS

CheckpointingMode: TypeAlias = Literal["full", "selective", "offload"]

_aten = torch.ops.aten
KEPT_OPS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        *ONEDNN_OPS,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""What ``selective`` does not run again."""


def checkpoint_layers(model: PreTrainedModel, mode: CheckpointingMode) -> None:
    """Makes every layer of a model checkpointed; transformers does so in training mode only."""
    arguments: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    # transformers renamed it; the old name warns where the new one exists
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(arguments)


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE
