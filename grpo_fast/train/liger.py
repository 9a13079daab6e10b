"""Liger's kernels for what lies between a layer's matrix products: norms, rotary positions, gated activations.

Liger's own loss and its forward pass of the head stay out: the head is read by the fused loss here. Rotary positions are
replaced for all models of a kind in the process, the rest for one model.

Source: https://github.com/linkedin/Liger-Kernel; what is called is transformers' door to it.
"""

from __future__ import annotations

from importlib.util import find_spec

from transformers import PreTrainedModel

from grpo_fast.config import ConfigError

KERNELS = {
    "rope": True,
    "rms_norm": True,
    "swiglu": True,
    "geglu": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}
"""Liger's replacements that are made, if a model has such a part."""


def require_liger(model_type: str) -> None:
    """Checks that Liger can work on a model.

    Args:
        model_type: of its configuration, such as ``llama``.

    Raises:
        ConfigError: Liger is not installed, or does not know the model.
    """
    if find_spec("liger_kernel") is None:
        raise ConfigError("use_liger_kernel needs liger-kernel; `pip install 'grpo-fast[liger]'`")
    from liger_kernel.transformers.monkey_patch import (  # noqa: PLC0415 (an optional package)
        MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN,
    )

    if model_type not in KNOWN:
        raise ConfigError(f"use_liger_kernel=True: Liger does not know models of type {model_type!r}; leave it out")


def use_liger_kernels(model: PreTrainedModel) -> None:
    """Replaces a model's norms, rotary positions and activations, in place; weights and names stay."""
    from transformers.integrations.liger import apply_liger_kernel  # noqa: PLC0415 (it imports transformers' trainer, and peft)

    apply_liger_kernel(model, KERNELS)
