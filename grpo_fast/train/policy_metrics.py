"""Metrics of the policy loss, by TRL's names."""

from __future__ import annotations

import torch

from grpo_fast.metrics import MetricSums
from grpo_fast.ops import LossBatch, LossSpec, PolicyMetrics
from grpo_fast.ops.sequence_weights import gamma_weights, off_policy_mask, sequence_lengths


def add_policy_metrics(sums: MetricSums, metrics: PolicyMetrics, *, surrogate: str) -> None:
    """Adds what a loss reports; ``kl`` is there whether or not it is in the loss, and 0 without a reference."""
    sums.add("_tokens", metrics.num_tokens)
    sums.add("_ratios", metrics.num_ratios)
    sums.add("entropy", metrics.entropy_sum, weight="_tokens")
    sums.add("kl", metrics.kl_sum, weight="_tokens")
    if surrogate == "cispo":
        sums.add("cispo_clip_ratio", metrics.clip_high, weight="_ratios")
    elif surrogate != "vespo":
        sums.add("clip_ratio/low_mean", metrics.clip_low, weight="_ratios")
        sums.add("clip_ratio/high_mean", metrics.clip_high, weight="_ratios")
        sums.add("clip_ratio/region_mean", metrics.clip_region, weight="_ratios")


def add_sequence_metrics(sums: MetricSums, logprobs: torch.Tensor, batch: LossBatch, spec: LossSpec) -> None:
    """Adds the mean of VESPO's weights, and the share of sequences that the off-policy mask leaves out, where there are any."""
    if spec.surrogate != "vespo" and spec.off_policy_mask_threshold is None:
        return
    present = sequence_lengths(batch.sequence_index, num_sequences=len(batch.advantages)) > 0
    sums.add("_sequences", present.sum())
    if spec.surrogate == "vespo":
        sums.add("vespo/phi_seq_mean", (present * gamma_weights(logprobs, batch, spec)).sum(), weight="_sequences")
    if spec.off_policy_mask_threshold is not None:
        left_out = present & ~off_policy_mask(logprobs, batch, spec)
        sums.add("sampling/off_policy_mask/masked_fraction", left_out.sum(), weight="_sequences")
