"""Costs of training: the FLOP model, the meter, and the budget that limits them."""

from __future__ import annotations

from grpo_fast.compute.budget import BUDGET_FIELDS, Budget, BudgetVerdict, Usage
from grpo_fast.compute.flops import (
    ModelShape,
    backward_flops,
    causal_pairs,
    decode_flops,
    forward_flops,
    prefill_flops,
    reference_flops,
)
from grpo_fast.compute.meter import ComputeMeter, EnergySource

__all__ = [
    "BUDGET_FIELDS",
    "Budget",
    "BudgetVerdict",
    "ComputeMeter",
    "EnergySource",
    "ModelShape",
    "Usage",
    "backward_flops",
    "causal_pairs",
    "decode_flops",
    "forward_flops",
    "prefill_flops",
    "reference_flops",
]
