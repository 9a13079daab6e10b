"""Reward functions and the pool of worker processes that runs them under a deadline.

A reward function has TRL's signature, ``fn(prompts, completions, completion_ids, **columns) -> list[float | None]``, and may be
``async``. As there it is also given ``trainer_state``, ``log_extra(column, values)`` and ``log_metric(name, value)``, and here
``completion_openings``, the text with which each prompt began the answer, such as ``<think>``.
Nothing here imports torch, so that a worker starts in a fraction of a second.
"""

from __future__ import annotations

from grpo_fast.rewards.call import HeldHere, RewardFunction, names_model, resolve_reward, reward_name
from grpo_fast.rewards.pool import RewardError, RewardPool
from grpo_fast.rewards.report import RewardReport

__all__ = [
    "HeldHere",
    "RewardError",
    "RewardFunction",
    "RewardPool",
    "RewardReport",
    "names_model",
    "resolve_reward",
    "reward_name",
]
