"""Rollout engines, which sample completions. Each is imported from its own module, so that the protocol costs no torch."""

from __future__ import annotations

from grpo_fast.rollout.engine import RolloutEngine as RolloutEngine
from grpo_fast.rollout.engine import RolloutError as RolloutError
from grpo_fast.rollout.engine import SamplingParams as SamplingParams
from grpo_fast.rollout.engine import WeightSyncError as WeightSyncError
