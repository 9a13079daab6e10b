"""Optimiser, learning-rate schedule, and progress measured in learning rate spent."""

from __future__ import annotations

import itertools
import math

import torch

from grpo_fast.config import Config


def build_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW with decay on matrices only, in torch's fused implementation (CPU and GPU)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Gives every parameter group the learning rate ``value``."""
    for group in optimizer.param_groups:
        group["lr"] = value


def learning_rate_at(step: int, config: Config) -> float:
    """Learning rate of step 1, 2, ...: linear warm-up, then the chosen shape down to 0 just after ``max_steps``.

    Source: the schedules of ``transformers.get_scheduler``, counted in steps from 1.
    """
    if step <= config.num_warmup_steps:
        return config.learning_rate * step / (config.num_warmup_steps + 1)
    done = (step - 1 - config.num_warmup_steps) / max(1, config.max_steps - config.num_warmup_steps)
    match config.lr_scheduler_type:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - done
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * max(0.0, share)


def progress_schedule(config: Config) -> list[float]:
    """Share of the run's summed learning rate spent after step 1, 2, ..., ``max_steps``; the last is 1.

    Learning curves are functions of learning rate spent rather than of steps, so the forecast reads this clock.
    """
    spent = list(itertools.accumulate(learning_rate_at(step, config) for step in range(1, config.max_steps + 1)))
    return [value / spent[-1] for value in spent]
