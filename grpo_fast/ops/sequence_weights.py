"""Weights of whole sequences that the policy's own log-probabilities decide: factors of the surrogate, without gradient.

With ``i`` the sequence of token ``t``, ``d_t = logp_t - old_t``, ``A_i`` its advantage, ``u_i`` the logarithm of its importance
ratio between the old policy and the sampler (0 where none is given) and ``s_t`` the sampler's log-probability (``old_t`` where
none is given):

    vespo             φ_i = e^λ·w_i^k·e^(-λ·w_i),  w_i = exp(Σ_{t in i} d_t + u_i);  φ(1) = 1
                      k, λ = k_pos, λ_pos where A_i ≥ 0, else k_neg, λ_neg
    off-policy mask   m_i = 0 where A_i < 0 and Σ_{t in i} (s_t - logp_t) / n_i > threshold, else 1

``d_t`` is held within ±20 and ``log w_i`` between log 1e-8 and 20. Sums are float64 and taken over an ascending index, so that
nothing depends on the order of atomics, and nothing is read back to the host.

Source: VESPO, arXiv 2602.10693; DeepSeek-V3.2, arXiv 2512.02556, equation 9; TRL 1.16 ``get_gamma_weights`` and
``get_off_policy_mask``.
"""

from __future__ import annotations

import math

import torch

from grpo_fast.ops.loss_spec import LossBatch, LossSpec

_MOST = 20.0
_LEAST = math.log(1e-8)


def sequence_lengths(sequence_index: torch.Tensor, *, num_sequences: int) -> torch.Tensor:
    """Tokens of each sequence, int64 [B], of an ascending index [T]; nothing is read back to the host."""
    sequences = torch.arange(num_sequences, device=sequence_index.device, dtype=sequence_index.dtype)
    ends = torch.searchsorted(sequence_index, sequences, right=True)
    return torch.diff(ends, prepend=ends.new_zeros(1))


def segment_sum(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums over sequences, [B], of values [T]."""
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0, unsafe=True)


@torch.no_grad()
def gamma_weights(logprobs: torch.Tensor, batch: LossBatch, spec: LossSpec) -> torch.Tensor:
    """φ of each sequence, float64 [B]; 1 for one without tokens."""
    old = logprobs if batch.old_logprobs is None else batch.old_logprobs
    total = _sums(batch, (logprobs.double() - old.double()).clamp(-_MOST, _MOST))
    if batch.sampler_log_ratios is not None:
        total = total + batch.sampler_log_ratios.double()
    log_ratio = total.clamp(_LEAST, _MOST)
    positive = batch.advantages >= 0
    power = _either(positive, spec.vespo_k_pos, spec.vespo_k_neg)
    decay = _either(positive, spec.vespo_lambda_pos, spec.vespo_lambda_neg)
    return (decay + power * log_ratio - decay * log_ratio.exp()).exp()


@torch.no_grad()
def off_policy_mask(logprobs: torch.Tensor, batch: LossBatch, spec: LossSpec) -> torch.Tensor:
    """Whether each sequence keeps its surrogate, bool [B]."""
    assert spec.off_policy_mask_threshold is not None
    old = logprobs if batch.old_logprobs is None else batch.old_logprobs
    gap = (old if batch.sampling_logprobs is None else batch.sampling_logprobs).double() - logprobs.double()
    count = _sums(batch, torch.ones_like(gap))
    return (batch.advantages >= 0) | (_sums(batch, gap) / count.clamp(min=1.0) <= spec.off_policy_mask_threshold)


def sampler_log_ratios(importance_weights: torch.Tensor, sequence_index: torch.Tensor, *, num_sequences: int) -> torch.Tensor:
    """Logarithms of sequences' importance ratios, float64 [B], from those of tokens, [T], each held within 1e-8 and e^20."""
    logarithms = importance_weights.double().log().clamp(_LEAST, _MOST)
    return segment_sum(logarithms, sequence_lengths(sequence_index, num_sequences=num_sequences))


def weighted(logprobs: torch.Tensor, batch: LossBatch, spec: LossSpec) -> LossBatch:
    """The batch with these weights, where ``spec`` asks for them, in its importance weights."""
    each = []
    if spec.surrogate == "vespo":
        each.append(gamma_weights(logprobs, batch, spec))
    if spec.off_policy_mask_threshold is not None:
        each.append(off_policy_mask(logprobs, batch, spec))
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    for weights in each:
        spread = weights.to(dtype)[batch.sequence_index]
        known = batch.importance_weights
        batch = batch._replace(importance_weights=spread if known is None else known * spread)
    return batch


def _sums(batch: LossBatch, values: torch.Tensor) -> torch.Tensor:
    values = values.double() if batch.token_mask is None else torch.where(batch.token_mask, values.double(), 0.0)
    return segment_sum(values, sequence_lengths(batch.sequence_index, num_sequences=batch.advantages.shape[0]))


def _either(positive: torch.Tensor, yes: float, no: float) -> torch.Tensor:
    return torch.full_like(positive, no, dtype=torch.float64).masked_fill(positive, yes)
