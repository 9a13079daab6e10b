"""The trainer: the loop and what it is made of."""

from __future__ import annotations

from grpo_fast.train.checkpoint import CheckpointError
from grpo_fast.train.results import StepResult
from grpo_fast.train.reward_model import RewardModel
from grpo_fast.train.step import NonFiniteGradientError
from grpo_fast.train.trainer import GRPOTrainer

__all__ = ["CheckpointError", "GRPOTrainer", "NonFiniteGradientError", "RewardModel", "StepResult"]
