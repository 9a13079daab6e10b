"""The optimiser, and its state as it is put back."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from grpo_fast.config import Config, ConfigError
from grpo_fast.train.adamw import OffloadedAdamW, StochasticAdamW
from grpo_fast.train.policy_source import pick_device
from grpo_fast.train.quantised import require_bitsandbytes

_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit", "paged_adamw_32bit": "PagedAdamW32bit"}
_PAGED = ("state1", "state2")
"""State that bitsandbytes keeps in paged memory for each weight."""


def check_optimizer(config: Config) -> None:
    """Checks what the optimiser needs, before anything is loaded.

    Raises:
        ConfigError: bitsandbytes is missing, or paged memory is asked for where there is no GPU.
    """
    if config.optim == "adamw_torch_fused":
        return
    require_bitsandbytes(f"optim={config.optim!r}")
    if config.optim.startswith("paged_") and pick_device(config.device).type == "cpu":
        plain = config.optim.removeprefix("paged_")
        raise ConfigError(
            f"optim={config.optim!r} pages between GPU and host, but this run is on a CPU; use "
            f"{plain if plain in _BITSANDBYTES else 'adamw_torch_fused'!r}"
        )


def build_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only, over the weights that are trained.

    It is torch's fused implementation (CPU and GPU), bitsandbytes' with moments of 8 bits or in paged memory, or one of
    :mod:`grpo_fast.train.adamw` for bfloat16 weights or state in host memory.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.offload_optimizer:
        return OffloadedAdamW(groups, **settings)
    if config.weights_dtype == "bfloat16":
        return StochasticAdamW(groups, **settings, seed=config.seed)
    if config.optim == "adamw_torch_fused":
        return torch.optim.AdamW(groups, **settings, fused=True)
    found: torch.optim.Optimizer = getattr(import_module("bitsandbytes.optim"), _BITSANDBYTES[config.optim])(groups, **settings)
    return found


def load_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Puts back a saved state; what was in paged memory goes there again.

    bitsandbytes (0.50) would load all of it into plain memory of the GPU, and leave it there.

    Args:
        optimizer: of any kind.
        saved: its ``state_dict`` on the CPU; moments may be taken out of it.
    """
    paged: Any = optimizer if getattr(optimizer, "is_paged", False) else None
    moments = [_take_moments(saved, number) for group in saved["param_groups"] for number in group["params"] if paged]
    optimizer.load_state_dict(saved)
    weights = [weight for group in optimizer.param_groups for weight in group["params"] if paged]
    for weight, found in zip(weights, moments, strict=True):
        for name, value in found.items():
            optimizer.state[weight][name] = paged.get_state_buffer(weight, dtype=value.dtype).copy_(value)


def _take_moments(saved: dict[str, Any], number: int) -> dict[str, torch.Tensor]:
    """A weight's; they stand among the rest of its state or, by bitsandbytes 0.50, a level deeper."""
    state = saved["state"].get(number, {})
    places = [state, *(place for place in state.values() if isinstance(place, dict))]
    return {name: place.pop(name) for place in places for name in _PAGED if name in place}


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Gives every parameter group the learning rate ``value``."""
    for group in optimizer.param_groups:
        group["lr"] = value
