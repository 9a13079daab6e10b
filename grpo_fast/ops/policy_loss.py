"""Policy-gradient loss of packed tokens: the one place that holds the mathematics of every objective.

With ``i`` the sequence of token ``t``, ``n_i`` its scored tokens, ``w_i`` its loss weight (the objective's normaliser),
``A_i`` its advantage, ``v_t`` its importance weight, ``u_t`` its weight in the entropy bonus (1 where none is given) and
``d_t = logp_t - old_t``:

    ratio      r = exp(d_t)                token
               r = exp(Σ_{t in i} d_t / n_i)   sequence
               r = exp(Σ_{t in i} d_t)         sequence_sum

    clip       l = -min(min(r, δ)·A, clamp(r, 1 - ε_low, 1 + ε_high)·A)
    cispo      l_t = -stop_grad(min(r, ε_high))·A·logp_t
    sapo       l = -sigmoid(τ·(r - 1))·4/τ·A,  τ = τ_pos where A > 0, else τ_neg
    vespo      l_t = -A·logp_t,  v_t multiplied by φ_i of :mod:`grpo_fast.ops.sequence_weights`

    k3         kl_t = e^{ref_t - logp_t} - (ref_t - logp_t) - 1,  times r with the bias correction

    loss       Σ_t w_i·(v_t·l + β·kl_t) - c·Σ_t u_t·H_t / num_items_in_batch

and its derivatives, with ``s = ∂l/∂log r`` (for cispo and vespo ``∂l/∂logp``), ``V_i = Σ v_t`` and ``K_i = Σ kl_t`` over the
tokens that share a ratio, and ``∂log r/∂logp_t`` = 1, 1/n_i, 1:

    dL/dlogp_t = w_i·(s·V_i + β·K_i·r·[bias correction])·∂log r/∂logp_t + w_i·β·(1 - e^{ref_t - logp_t})·(r or 1)
    dL/dH_t    = -c·u_t / num_items_in_batch

Everything is float32, or float64 for float64 inputs; the sum over tokens is one reduction. Sums over sequences are segment
sums of an ascending index, forward and backward, so that nothing depends on the order of atomics. Nothing is read back to the
host. A ratio or a KL term that overflows (exponents above 88 in float32) makes its gradient NaN or infinite, also where the
clip would have made it 0 and where its weight is 0; nothing hides it.

Source: TRL 1.16 ``GRPOTrainer._compute_loss`` and ``RLOOTrainer._compute_loss``; papers stand in :mod:`grpo_fast.objective`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from grpo_fast.ops import native
from grpo_fast.ops.dispatch import Impl, Implementation, resolve, triton_kernels
from grpo_fast.ops.loss_spec import (
    LossBatch,
    LossSpec,
    PolicyCoefficients,
    PolicyLoss,
    PolicyMetrics,
    check_constants,
    check_needs,
    check_shapes,
    entropy_slope,
    present_entropy_weights,
    weighted_entropy,
)
from grpo_fast.ops.policy_loss_native import obstacle, policy_coefficients_native, policy_loss_native
from grpo_fast.ops.policy_loss_triton import policy_coefficients_triton, policy_loss_triton
from grpo_fast.ops.sequence_weights import segment_sum, sequence_lengths, weighted


class _Tokens(NamedTuple):
    """Numbers of the tokens, in the working type; those of a masked one are 0."""

    logprobs: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor | None
    importance: torch.Tensor
    """[T]."""
    present: torch.Tensor
    """[T]: 1, or 0 for a masked token."""


class _Units(NamedTuple):
    """Numbers of the U units that have a ratio of their own: tokens (U = T), or sequences (U = B)."""

    log_ratio: torch.Tensor
    """[U], differentiable."""
    advantages: torch.Tensor
    weights: torch.Tensor
    num_tokens: torch.Tensor
    """float [U]: tokens that share the ratio."""
    importance: torch.Tensor
    """[U]: sum of their importance weights."""
    kl: torch.Tensor | None
    """[U]: summed over the unit's tokens, without the bias correction."""


class _Terms(NamedTuple):
    tokens: _Tokens
    units: _Units
    ratio: torch.Tensor
    """[U]."""
    loss: torch.Tensor
    """Scalar."""
    metrics: PolicyMetrics


def policy_loss_reference(
    logprobs: torch.Tensor, batch: LossBatch, *, spec: LossSpec, entropy: torch.Tensor | None = None
) -> PolicyLoss:
    """The specification of :func:`policy_loss`, in plain differentiable PyTorch."""
    terms = _terms(logprobs, batch, spec, entropy)
    return PolicyLoss(terms.loss, terms.metrics)


def _terms(logprobs: torch.Tensor, batch: LossBatch, spec: LossSpec, entropy: torch.Tensor | None) -> _Terms:
    batch = weighted(logprobs, batch, spec)
    tokens = _tokens(logprobs, batch)
    units = _units(tokens, batch, spec)
    ratio = units.log_ratio.exp()
    per_unit = _surrogate(ratio, tokens.logprobs, units.advantages, spec) * units.importance
    kl = units.kl * ratio if units.kl is not None and spec.use_bias_correction_kl else units.kl
    if kl is not None:
        per_unit = per_unit + spec.beta * kl
    loss = (units.weights * per_unit).sum()
    total_entropy = None if entropy is None else (_where(batch.token_mask, _working(entropy))).sum()
    if spec.entropy_coef != 0:
        assert entropy is not None
        assert total_entropy is not None
        weighed = total_entropy if batch.entropy_weights is None else weighted_entropy(entropy, batch)
        loss = loss + entropy_slope(batch, spec) * weighed
    with torch.no_grad():
        metrics = _metrics(ratio.detach(), units, spec, kl=kl, entropy=total_entropy)
    return _Terms(tokens, units, ratio, loss, metrics)


def _working(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _where(mask: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    return values if mask is None else torch.where(mask, values, values.new_zeros(()))


def _tokens(logprobs: torch.Tensor, batch: LossBatch) -> _Tokens:
    mask = batch.token_mask
    logprobs = _where(mask, _working(logprobs))
    present = torch.ones_like(logprobs, requires_grad=False) if mask is None else mask.to(logprobs.dtype)
    old, ref, importance = (
        None if values is None else _where(mask, values.to(logprobs.dtype))
        for values in (batch.old_logprobs, batch.ref_logprobs, batch.importance_weights)
    )
    return _Tokens(
        logprobs, logprobs.detach() if old is None else old, ref, present if importance is None else importance, present
    )


def _units(tokens: _Tokens, batch: LossBatch, spec: LossSpec) -> _Units:
    log_ratio = tokens.logprobs - tokens.old
    kl = None
    if spec.beta != 0:
        assert tokens.ref is not None
        difference = tokens.ref - tokens.logprobs
        kl = difference.exp() - difference - 1
    advantages = batch.advantages.to(log_ratio.dtype)
    weights = batch.loss_weights.to(log_ratio.dtype)
    if spec.importance_sampling_level == "token":
        index = batch.sequence_index
        return _Units(log_ratio, advantages[index], weights[index], tokens.present, tokens.importance, kl)
    lengths = sequence_lengths(batch.sequence_index, num_sequences=advantages.shape[0])
    num_tokens = lengths.to(log_ratio.dtype) if batch.token_mask is None else segment_sum(tokens.present, lengths)
    importance = num_tokens if batch.importance_weights is None else segment_sum(tokens.importance, lengths)
    summed = segment_sum(log_ratio, lengths)
    if spec.importance_sampling_level == "sequence":
        summed = summed / num_tokens.clamp(min=1.0)
    return _Units(summed, advantages, weights, num_tokens, importance, None if kl is None else segment_sum(kl, lengths))


def _surrogate(ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, spec: LossSpec) -> torch.Tensor:
    if spec.surrogate == "cispo":
        return -ratio.clamp(max=spec.epsilon_high).detach() * advantages * logprobs
    if spec.surrogate == "vespo":
        return -advantages * logprobs
    if spec.surrogate == "sapo":
        tau = _sapo_temperature(advantages, spec)
        return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    clipped = _clipped(ratio, 1 - spec.epsilon_low, 1 + spec.epsilon_high)
    bounded = ratio if spec.delta is None else _clipped(ratio, -math.inf, spec.delta)
    return -torch.minimum(bounded * advantages, clipped * advantages)


def _clipped(ratio: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The ratio inside its range, whose bounds pass the gradient on: those of torch's own clamp do so until 2.13."""
    return torch.where(ratio < low, low, torch.where(ratio > high, high, ratio))


def _sapo_temperature(advantages: torch.Tensor, spec: LossSpec) -> torch.Tensor:
    return torch.full_like(advantages, spec.sapo_temperature_neg).masked_fill(advantages > 0, spec.sapo_temperature_pos)


def _metrics(
    ratio: torch.Tensor, units: _Units, spec: LossSpec, *, kl: torch.Tensor | None, entropy: torch.Tensor | None
) -> PolicyMetrics:
    zero = ratio.new_zeros(())
    live = units.num_tokens > 0
    low = high = zero
    if spec.surrogate == "clip":
        low = (live & (ratio < 1 - spec.epsilon_low) & (units.advantages < 0)).sum().to(ratio.dtype)
        high = (live & (ratio > 1 + spec.epsilon_high) & (units.advantages > 0)).sum().to(ratio.dtype)
    elif spec.surrogate == "cispo":
        high = (live & (ratio > spec.epsilon_high) & (units.advantages > 0)).sum().to(ratio.dtype)
    nothing = ratio.new_full((1,), float("inf"))
    values = {
        "num_tokens": units.num_tokens.sum(),
        "num_ratios": live.sum().to(ratio.dtype),
        "clip_low": low,
        "clip_high": high,
        "kl_sum": zero if kl is None else kl.detach().sum(),
        "entropy_sum": zero if entropy is None else entropy.detach().to(ratio.dtype),
        "ratio_sum": torch.where(live, ratio, zero).sum(),
        "ratio_min": torch.cat([torch.where(live, ratio, nothing), nothing]).amin(),
        "ratio_max": torch.cat([torch.where(live, ratio, -nothing), -nothing]).amax(),
    }
    return PolicyMetrics(torch.stack([values[name] for name in PolicyMetrics.NAMES]))


def _policy_coefficients_torch(
    logprobs: torch.Tensor, batch: LossBatch, *, spec: LossSpec, entropy: torch.Tensor | None = None
) -> PolicyCoefficients:
    by_token, beta = spec.importance_sampling_level == "token", spec.beta
    with torch.no_grad():
        tokens, units, ratio, loss, metrics = _terms(logprobs, batch, spec, entropy)
        slope = _surrogate_slope(ratio, units.advantages, spec) * units.importance
        kl_ratio = ratio if spec.use_bias_correction_kl else torch.ones_like(ratio)
        if units.kl is not None and spec.use_bias_correction_kl and not by_token:
            slope = slope + beta * units.kl * ratio
        if spec.importance_sampling_level == "sequence":
            slope = slope / units.num_tokens.clamp(min=1.0)
        slopes, kl_weights = slope * units.weights, kl_ratio * units.weights
        if not by_token:
            slopes, kl_weights = slopes[batch.sequence_index], kl_weights[batch.sequence_index]
        if units.kl is not None:
            assert tokens.ref is not None
            difference = tokens.ref - tokens.logprobs
            # A token's own ratio: r·(kl + 1 - e^difference) is this, without its cancellation.
            own = by_token and spec.use_bias_correction_kl
            slopes = slopes + beta * kl_weights * (-difference if own else 1 - torch.exp(difference))
        slopes = _where(batch.token_mask, slopes)
        entropy_slopes = None
        if spec.entropy_coef != 0:
            own = batch.entropy_weights is None
            weights = tokens.present if own else present_entropy_weights(batch, dtype=tokens.present.dtype)
            entropy_slopes = weights * entropy_slope(batch, spec)
    return PolicyCoefficients(loss, slopes, entropy_slopes, metrics)


def _surrogate_slope(ratio: torch.Tensor, advantages: torch.Tensor, spec: LossSpec) -> torch.Tensor:
    """Derivative of the surrogate with respect to the ratio's logarithm (``cispo``, ``vespo``: to the log-probability).

    Products with the ratio, never choices, take a slope to 0: 0 times an infinite ratio has to be NaN.
    """
    if spec.surrogate == "cispo":
        return -ratio.clamp(max=spec.epsilon_high) * advantages
    if spec.surrogate == "vespo":
        return -advantages
    if spec.surrogate == "sapo":
        argument = _sapo_temperature(advantages, spec) * (ratio - 1)
        return torch.sigmoid(argument) * torch.sigmoid(-argument) * -4 * advantages * ratio
    low, high = 1 - spec.epsilon_low, 1 + spec.epsilon_high
    bounded = ratio if spec.delta is None else ratio.clamp(max=spec.delta)
    first, second = bounded * advantages, ratio.clamp(low, high) * advantages
    # Where both are equal, as they are inside the range, each has half a share, as autograd gives to a minimum.
    half = (first == second) * 0.5
    share = torch.where(first < second, 1.0, half)
    reaches_first = share if spec.delta is None else share * (ratio <= spec.delta)
    reaches_second = torch.where(second < first, 1.0, half) * ((ratio >= low) & (ratio <= high))
    return -(reaches_first + reaches_second) * advantages * ratio


_COEFFICIENTS = {
    "triton": triton_kernels(policy_coefficients_triton),
    "native": Implementation(policy_coefficients_native, obstacle, native.tracing),
    "torch": Implementation(_policy_coefficients_torch),
}
_IMPLEMENTATIONS = {
    "triton": triton_kernels(policy_loss_triton),
    "native": Implementation(policy_loss_native, obstacle, native.tracing),
    "torch": Implementation(policy_loss_reference),
}


def policy_coefficients(
    logprobs: torch.Tensor,
    batch: LossBatch,
    *,
    spec: LossSpec,
    entropy: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> PolicyCoefficients:
    """Loss of T packed tokens together with its derivatives, without autograd and without waiting for the device.

    Args:
        logprobs: float [T], nats under the current policy.
        batch: what else is known of the tokens and their sequences. ``batch.tokens(start, stop)`` gives the part of a block of
            tokens: any block will do, unless ``spec.couples_tokens``; then it is one that no sequence reaches out of.
        spec: which loss.
        entropy: float [T], nats.
        impl: how it is computed.

    Returns:
        The loss and metrics that :func:`policy_loss` has, and ``dloss/dlogprobs`` and ``dloss/dentropy`` [T]; all of them
        float32 (float64 for float64 inputs) and detached. Losses and metrics of blocks add up to those of the whole.

    Raises:
        ValueError: shapes or devices that do not fit, or an input that ``spec`` needs is missing.
        TypeError: an input that is not a tensor, or one of another type.
    """
    check_shapes(logprobs, batch)
    check_needs(batch, spec, entropy)
    run = resolve("policy_loss", _COEFFICIENTS, impl=impl, like=logprobs)
    return run(logprobs, batch, spec=spec, entropy=entropy)


def policy_loss(
    logprobs: torch.Tensor,
    batch: LossBatch,
    *,
    spec: LossSpec,
    entropy: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> PolicyLoss:
    """Loss of T packed tokens of B sequences, with what to report of it.

    Args:
        logprobs: float [T], nats under the current policy; differentiable.
        batch: what else is known of the tokens and their sequences.
        spec: which loss.
        entropy: float [T], nats; differentiable where ``entropy_coef`` is not 0, otherwise only reported.
        impl: how it is computed.

    Returns:
        The scalar loss, float32 (float64 for float64 inputs), and metric sums. With T = 0 the loss is a differentiable 0.

    Raises:
        ValueError: shapes or devices that do not fit, an input that ``spec`` needs is missing, or one of the batch, which is
            constant, requires a gradient.
        TypeError: an input that is not a tensor, or one of another type.

    Source:
        See the module; TRL 1.16 is matched term by term.
    """
    check_shapes(logprobs, batch)
    check_constants(batch)
    check_needs(batch, spec, entropy)
    run = resolve("policy_loss", _IMPLEMENTATIONS, impl=impl, like=logprobs)
    return run(logprobs, batch, spec=spec, entropy=entropy)
