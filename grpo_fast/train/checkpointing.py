"""Gradient checkpointing: which activations a layer keeps, and which it computes once more in the backward pass.

``full`` keeps a layer's input. ``selective`` also keeps what matrix products and attention gave, so that what is computed again
is cheap: norms, rotary positions, the activation, sums. ``offload`` is ``full`` with the inputs in the host's memory (see
:mod:`~grpo_fast.train.offload`). None changes a bit of a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_fast.config import ConfigError
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
"""Operators whose outputs ``selective`` keeps."""
_KEPT_NAMES = frozenset(
    {
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::_flash_attn_forward",
    }
)
"""Attention that is no op before its library is imported."""


def checkpoint_layers(model: PreTrainedModel, mode: CheckpointingMode) -> None:
    """Makes every layer of a model checkpointed, once :func:`let_checkpoint` has been called.

    Raises:
        ConfigError: transformers can checkpoint none of its layers.
    """
    arguments: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    # transformers renamed it; the old name warns where the new one exists
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable(arguments)
    except ValueError as error:
        raise ConfigError(f"gradient_checkpointing=True: {error}; leave it out") from error
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            known: Any = layer
            known._gradient_checkpointing_func = partial(_checkpointed, layer, known._gradient_checkpointing_func)


def let_checkpoint(model: PreTrainedModel) -> None:
    """Puts what checkpoints in training mode, without which transformers checkpoints nothing."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def _checkpointed(layer: torch.nn.Module, checkpoint: Any, run: Callable[..., Any], *given: Any) -> Any:
    return checkpoint(partial(_evaluated, layer, run), *given)


def _evaluated(layer: torch.nn.Module, run: Callable[..., Any], *given: Any) -> Any:
    """Runs a layer in evaluation mode: dropout, or a router that draws in training, would make another policy of it."""
    layer.training = False
    try:
        return run(*given)
    finally:
        layer.training = True


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in KEPT_OPS or op.name() in _KEPT_NAMES
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
