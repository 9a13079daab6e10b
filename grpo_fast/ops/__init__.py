"""The numerical work of a step, one file an op: a plain PyTorch reference first, faster implementations after it."""

from __future__ import annotations

from grpo_fast.ops.fused_grpo import FusedLoss, fused_grpo
from grpo_fast.ops.group_advantage import GroupAdvantage, group_advantage
from grpo_fast.ops.head_parallel import gathered_token_logprob, parallel_token_logprob
from grpo_fast.ops.kept_logprob import Kept, kept_logprob
from grpo_fast.ops.lm_head import LMHead
from grpo_fast.ops.loss_spec import LossBatch, LossSpec, PolicyCoefficients, PolicyLoss, PolicyMetrics
from grpo_fast.ops.packed_attention import PackedLayout, Piece, Scores, packed_attention, packed_layout
from grpo_fast.ops.packing import (
    PackedGroups,
    PackedIndex,
    PackedSequences,
    pack_sequences,
    pack_shared_prompts,
    packed_index,
)
from grpo_fast.ops.policy_loss import policy_coefficients, policy_loss
from grpo_fast.ops.row_plan import Layout, RowPlan, SharedPrompts, live_sequences, plan_microbatches, plan_rows, scored_rows
from grpo_fast.ops.token_logprob import token_logprob
from grpo_fast.ops.weight_delta import WeightDelta, apply_delta, split_delta, weight_delta
from grpo_fast.ops.weight_pack import LoraFactors, pack_weights, plan_buckets, slot_values, unpack_weights

__all__ = [
    "FusedLoss",
    "GroupAdvantage",
    "Kept",
    "LMHead",
    "Layout",
    "LoraFactors",
    "LossBatch",
    "LossSpec",
    "PackedGroups",
    "PackedIndex",
    "PackedLayout",
    "PackedSequences",
    "Piece",
    "PolicyCoefficients",
    "PolicyLoss",
    "PolicyMetrics",
    "RowPlan",
    "Scores",
    "SharedPrompts",
    "WeightDelta",
    "apply_delta",
    "fused_grpo",
    "gathered_token_logprob",
    "group_advantage",
    "kept_logprob",
    "live_sequences",
    "pack_sequences",
    "pack_shared_prompts",
    "pack_weights",
    "packed_attention",
    "packed_index",
    "packed_layout",
    "parallel_token_logprob",
    "plan_buckets",
    "plan_microbatches",
    "plan_rows",
    "policy_coefficients",
    "policy_loss",
    "scored_rows",
    "slot_values",
    "split_delta",
    "token_logprob",
    "unpack_weights",
    "weight_delta",
]
