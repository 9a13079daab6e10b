"""Reward curves out of the logs of other tools, with numpy alone: no torch, no transformers."""

from __future__ import annotations

from grpo_fast.integrations.logs.raw_log import LogError, RunSettings
from grpo_fast.integrations.logs.reward_log import RewardLog, read_log

__all__ = ["LogError", "RewardLog", "RunSettings", "read_log"]
