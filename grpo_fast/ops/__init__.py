"""The numerical work of a step, one file an op: a plain PyTorch reference first, faster implementations after it."""

from __future__ import annotations

from grpo_fast.ops.fused_grpo import FusedLoss, fused_grpo
from grpo_fast.ops.group_advantage import GroupAdvantage, group_advantage
from grpo_fast.ops.lm_head import LMHead
from grpo_fast.ops.loss_spec import LossBatch, LossSpec, PolicyCoefficients, PolicyLoss, PolicyMetrics
from grpo_fast.ops.policy_loss import policy_coefficients, policy_loss
from grpo_fast.ops.row_plan import RowPlan, live_sequences, plan_microbatches, plan_rows, scored_rows
from grpo_fast.ops.token_logprob import token_logprob

__all__ = [
    "FusedLoss",
    "GroupAdvantage",
    "LMHead",
    "LossBatch",
    "LossSpec",
    "PolicyCoefficients",
    "PolicyLoss",
    "PolicyMetrics",
    "RowPlan",
    "fused_grpo",
    "group_advantage",
    "live_sequences",
    "plan_microbatches",
    "plan_rows",
    "policy_coefficients",
    "policy_loss",
    "scored_rows",
    "token_logprob",
]
