"""The mismatch between the sampling engine and the trained policy on the same weights: its size, and its correction.

Both give log-probabilities of the sampled tokens; other kernels and other roundings set them apart. With
``d_t = log policy - log sampler`` a token's loss is multiplied by an importance weight made of ``e^d``: of the token alone,
of its sequence (``e^sum d``), or of the sequence's geometric mean (``e^mean d``); cut off at bounds (truncated importance
sampling, TIS) or set to 0 beyond them (masked, MIS; IcePop is the token's mask with both bounds).

Source: TRL 1.16, ``vllm_importance_sampling_mode``, whose four modes these are; the geometric mean is verl's Geo-RS.
"""

from __future__ import annotations

import math

import torch

from grpo_fast.metrics import MetricSums


def importance_weights(
    difference: torch.Tensor,
    sequence_index: torch.Tensor,
    *,
    num_sequences: int,
    mode: str,
    bounds: tuple[float | None, float | None],
) -> torch.Tensor:
    """Importance weights, by which each token's loss is multiplied.

    Args:
        difference: float [T], log-probabilities of the policy less those of the sampler, at the same temperature.
        sequence_index: int64 [T], the sequence of each token.
        num_sequences: how many there are.
        mode: ``token``, ``sequence`` or ``geometric``, an underscore, ``truncate`` or ``mask``.
        bounds: least and greatest ratio; ``None`` bounds nothing.

    Returns:
        float32 [T].
    """
    level, action = mode.split("_")
    log_ratio = difference.float()
    if level != "token":
        sums = torch.zeros(num_sequences, device=log_ratio.device).index_add_(0, sequence_index, log_ratio)
        if level == "geometric":
            lengths = torch.zeros_like(sums).index_add_(0, sequence_index, torch.ones_like(log_ratio))
            sums /= lengths.clamp(min=1)
        log_ratio = sums[sequence_index]
    ratio = log_ratio.exp()
    low, high = (-math.inf if bounds[0] is None else bounds[0], math.inf if bounds[1] is None else bounds[1])
    if action == "truncate":
        return ratio.clamp(low, high)
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def add_mismatch(sums: MetricSums, difference: torch.Tensor) -> None:
    """Measures ``difference``, float [T], as above; TRL's names where it has one.

    ``sampling/kl`` is the mean of ``e^d - d - 1``, which estimates KL(sampler, policy) and is never negative.
    """
    ratio = difference.exp()
    sums.add("_first_tokens", _number_of(difference))
    sums.add("sampling/sampling_logp_difference/mean", difference.abs().sum(), weight="_first_tokens")
    sums.add("sampling/sampling_logp_difference/max", difference.abs().max(), reduction="max")
    sums.add("sampling/importance_sampling_ratio/min", ratio.min(), reduction="min")
    sums.add("sampling/importance_sampling_ratio/mean", ratio.sum(), weight="_first_tokens")
    sums.add("sampling/importance_sampling_ratio/max", ratio.max(), reduction="max")
    sums.add("sampling/kl", (torch.expm1(difference) - difference).sum(), weight="_first_tokens")
    sums.add("_ratio_squares", ratio.square().sum(), weight="_first_tokens")


def add_weights(sums: MetricSums, weights: torch.Tensor) -> None:
    """Measures importance weights, float [T]: their mean, and the share of tokens that they leave out."""
    sums.add("_weighted_tokens", _number_of(weights))
    sums.add("sampling/importance_weight/mean", weights.sum(), weight="_weighted_tokens")
    sums.add("sampling/importance_weight/masked_fraction", (weights == 0).sum(), weight="_weighted_tokens")


def effective_sample_size(metrics: dict[str, float]) -> dict[str, float]:
    """``sampling/effective_sample_size``: share of the tokens that a step is worth, (mean ratio)^2 / mean of ratio^2."""
    if "_ratio_squares" not in metrics:
        return {}
    mean = metrics["sampling/importance_sampling_ratio/mean"]
    return {"sampling/effective_sample_size": mean**2 / metrics["_ratio_squares"]}


def _number_of(tokens: torch.Tensor) -> torch.Tensor:
    """Filled in by the device itself; a number that is copied there has the host wait until the device has come that far."""
    return torch.full((), tokens.numel(), dtype=torch.float32, device=tokens.device)
