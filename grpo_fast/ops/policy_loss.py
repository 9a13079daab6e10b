"""Policy-gradient loss of packed tokens: the one place that holds the mathematics of every objective.

With ``i`` the sequence of token ``t``, ``n_i`` its scored tokens, ``w_i`` its loss weight (the objective's normaliser),
``A_i`` its advantage and ``d_t = logp_t - old_t``:

    ratio      r = exp(d_t)                token
               r = exp(Σ_{t in i} d_t / n_i)   sequence
               r = exp(Σ_{t in i} d_t)         sequence_sum

    clip       l = -min(min(r, δ)·A, clamp(r, 1 - ε_low, 1 + ε_high)·A)
    cispo      l_t = -stop_grad(min(r, ε_high))·A·logp_t
    sapo       l = -sigmoid(τ·(r - 1))·4/τ·A,  τ = τ_pos where A > 0, else τ_neg

    k3         kl_t = e^{ref_t - logp_t} - (ref_t - logp_t) - 1,  times r with the bias correction

    loss       Σ_t w_i·(l + β·kl_t) - c·Σ_t H_t / num_items_in_batch

Everything is float32, or float64 for float64 inputs; the sum over tokens is one reduction. Sums over sequences are segment
sums of an ascending index, forward and backward, so that nothing depends on the order of atomics. Nothing is read back to the
host. A ratio that overflows (d above 88 in float32) makes the gradient NaN; nothing hides it.

Source: TRL 1.16 ``GRPOTrainer._compute_loss`` and ``RLOOTrainer._compute_loss``; papers stand in :mod:`grpo_fast.objective`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, Self, TypeAlias

import torch

from grpo_fast.ops.dispatch import Impl, Implementation, resolve

Surrogate: TypeAlias = Literal["clip", "cispo", "sapo"]
RatioLevel: TypeAlias = Literal["token", "sequence", "sequence_sum"]


@dataclass(frozen=True, slots=True)
class LossSpec:
    """Which loss it is and with which numbers.

    Raises:
        ValueError: values that do not go together, with the field named.
    """

    surrogate: Surrogate = "clip"
    importance_sampling_level: RatioLevel = "token"
    """What the ratio is of: a token, a sequence's geometric mean, or a whole sequence's probability."""
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    """Upper clip range of ``clip``; the absolute cap of the ratio for ``cispo``."""
    delta: float | None = None
    """Cap of the ratio for negative advantages too (two-sided clipping); ``clip`` only."""
    beta: float = 0.0
    """Weight of the KL term; 0 needs no reference log-probabilities."""
    use_bias_correction_kl: bool = True
    """Multiply the KL estimate by the ratio, as DeepSeek-V3.2 (arXiv 2512.02556) and TRL do."""
    entropy_coef: float = 0.0
    """Weight of the mean token entropy, which is subtracted from the loss."""
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05

    def __post_init__(self) -> None:
        if self.surrogate == "cispo" and self.importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r} has no meaning for surrogate='cispo', "
                "which weighs single tokens; use 'token'"
            )
        if self.delta is not None and self.surrogate != "clip":
            raise ValueError(
                f"delta={self.delta} bounds a clipped ratio; surrogate={self.surrogate!r} has none, set delta=None"
            )


class LossBatch(NamedTuple):
    """What the loss reads of a micro-batch beside the log-probabilities of its tokens."""

    sequence_index: torch.Tensor
    """int64 [T]: which of the B sequences a token belongs to, ascending."""
    advantages: torch.Tensor
    """float [B]."""
    loss_weights: torch.Tensor
    """float [B]: what multiplies each token's loss of a sequence."""
    old_logprobs: torch.Tensor | None = None
    """float [T]: nats under the policy that the ratio is against; ``None`` is on-policy, with a ratio of exactly 1."""
    ref_logprobs: torch.Tensor | None = None
    """float [T]: nats under the reference policy; read where ``beta`` is not 0."""
    num_items_in_batch: float | None = None
    """Scored tokens of the whole step; divides the entropy bonus, read where ``entropy_coef`` is not 0."""

    def tokens(self, start: int, stop: int) -> LossBatch:
        """The same batch with the tokens from ``start`` to ``stop`` only; sequences are kept, some may be empty."""
        return self._replace(
            sequence_index=self.sequence_index[start:stop],
            old_logprobs=None if self.old_logprobs is None else self.old_logprobs[start:stop],
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[start:stop],
        )


@dataclass(frozen=True, slots=True)
class PolicyMetrics:
    """Sums over a batch: detached scalar tensors on the batch's device.

    Means are ``clip_* / num_ratios``, ``ratio_sum / num_ratios``, ``kl_sum / num_tokens`` and ``entropy_sum / num_tokens``:
    TRL's ``clip_ratio/low_mean``, ``clip_ratio/high_mean`` (``cispo_clip_ratio`` for cispo), ``clip_ratio/region_mean``,
    ``kl``, ``entropy``.
    """

    num_tokens: torch.Tensor
    num_ratios: torch.Tensor
    """Tokens at token level; sequences that have tokens at sequence level."""
    clip_low: torch.Tensor
    """Ratios under ``1 - epsilon_low`` with a negative advantage."""
    clip_high: torch.Tensor
    """Ratios over ``1 + epsilon_high`` (``cispo``: over the cap) with a positive advantage."""
    clip_region: torch.Tensor
    """Either."""
    kl_sum: torch.Tensor
    entropy_sum: torch.Tensor
    ratio_sum: torch.Tensor
    ratio_min: torch.Tensor
    """Infinity over nothing."""
    ratio_max: torch.Tensor
    """Minus infinity over nothing."""

    def combine(self, other: Self) -> Self:
        """Both parts as one."""
        combined = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            operation = {"ratio_min": torch.minimum, "ratio_max": torch.maximum}.get(field.name, torch.add)
            combined[field.name] = operation(mine, theirs)
        return type(self)(**combined)


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A loss and what to report of it."""

    loss: torch.Tensor
    """Scalar, differentiable."""
    metrics: PolicyMetrics


class _Units(NamedTuple):
    """What has a ratio of its own, U of them: tokens (U = T), or sequences (U = B)."""

    log_ratio: torch.Tensor
    """[U], differentiable."""
    advantages: torch.Tensor
    weights: torch.Tensor
    num_tokens: torch.Tensor
    """float [U]: tokens that share the ratio."""
    kl: torch.Tensor | None
    """[U]: summed over the unit's tokens."""


def policy_loss_reference(
    logprobs: torch.Tensor, batch: LossBatch, *, spec: LossSpec, entropy: torch.Tensor | None = None
) -> PolicyLoss:
    """The specification of :func:`policy_loss`, in plain differentiable PyTorch."""
    logprobs = _working(logprobs)
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs.to(logprobs.dtype)
    kl = _k3(logprobs, batch.ref_logprobs) if spec.beta != 0 else None
    units = _units(logprobs - old, kl, batch, spec)
    ratio = units.log_ratio.exp()
    per_unit = _surrogate(ratio, logprobs, units.advantages, spec) * units.num_tokens
    unit_kl = units.kl
    if unit_kl is not None:
        unit_kl = unit_kl * ratio if spec.use_bias_correction_kl else unit_kl
        per_unit = per_unit + spec.beta * unit_kl
    loss = (units.weights * per_unit).sum()
    if spec.entropy_coef != 0:
        loss = loss - spec.entropy_coef * _mean_entropy(entropy, batch)
    with torch.no_grad():
        metrics = _metrics(ratio, units._replace(kl=unit_kl), entropy, spec)
    return PolicyLoss(loss, metrics)


def _working(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor | None) -> torch.Tensor:
    if ref_logprobs is None:
        raise ValueError("beta is not 0, so ref_logprobs are needed; score the tokens under the reference, or set beta=0")
    difference = ref_logprobs.to(logprobs.dtype) - logprobs
    return difference.exp() - difference - 1


def _mean_entropy(entropy: torch.Tensor | None, batch: LossBatch) -> torch.Tensor:
    if entropy is None:
        raise ValueError("entropy_coef is not 0, so the tokens' entropy is needed; pass entropy=")
    if batch.num_items_in_batch is None:
        raise ValueError("entropy_coef is not 0, so num_items_in_batch, the scored tokens of the step, is needed")
    return _working(entropy).sum() / max(batch.num_items_in_batch, 1.0)


def _units(log_ratio: torch.Tensor, kl: torch.Tensor | None, batch: LossBatch, spec: LossSpec) -> _Units:
    advantages = batch.advantages.to(log_ratio.dtype)
    weights = batch.loss_weights.to(log_ratio.dtype)
    if spec.importance_sampling_level == "token":
        index = batch.sequence_index
        return _Units(log_ratio, advantages[index], weights[index], torch.ones_like(log_ratio), kl)
    lengths = sequence_lengths(batch.sequence_index, num_sequences=advantages.shape[0])
    num_tokens = lengths.to(log_ratio.dtype)
    summed = _segment_sum(log_ratio, lengths)
    if spec.importance_sampling_level == "sequence":
        summed = summed / num_tokens.clamp(min=1.0)
    return _Units(summed, advantages, weights, num_tokens, None if kl is None else _segment_sum(kl, lengths))


def sequence_lengths(sequence_index: torch.Tensor, *, num_sequences: int) -> torch.Tensor:
    """Tokens of each sequence, int64 [B], of an ascending int64 index [T]; nothing is read back to the host."""
    ends = torch.searchsorted(sequence_index, torch.arange(num_sequences, device=sequence_index.device), right=True)
    return torch.diff(ends, prepend=ends.new_zeros(1))


def _segment_sum(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0, unsafe=True)


def _surrogate(ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, spec: LossSpec) -> torch.Tensor:
    if spec.surrogate == "cispo":
        return -ratio.clamp(max=spec.epsilon_high).detach() * advantages * logprobs
    if spec.surrogate == "sapo":
        tau = torch.full_like(advantages, spec.sapo_temperature_neg).masked_fill(advantages > 0, spec.sapo_temperature_pos)
        return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    clipped = ratio.clamp(1 - spec.epsilon_low, 1 + spec.epsilon_high)
    bounded = ratio if spec.delta is None else ratio.clamp(max=spec.delta)
    return -torch.minimum(bounded * advantages, clipped * advantages)


def _metrics(ratio: torch.Tensor, units: _Units, entropy: torch.Tensor | None, spec: LossSpec) -> PolicyMetrics:
    ratio = ratio.detach()
    zero = ratio.new_zeros(())
    live = units.num_tokens > 0
    low = high = zero
    if spec.surrogate == "clip":
        low = (live & (ratio < 1 - spec.epsilon_low) & (units.advantages < 0)).sum().to(ratio.dtype)
        high = (live & (ratio > 1 + spec.epsilon_high) & (units.advantages > 0)).sum().to(ratio.dtype)
    elif spec.surrogate == "cispo":
        high = (live & (ratio > spec.epsilon_high) & (units.advantages > 0)).sum().to(ratio.dtype)
    nothing = ratio.new_full((1,), float("inf"))
    return PolicyMetrics(
        num_tokens=units.num_tokens.sum(),
        num_ratios=live.sum().to(ratio.dtype),
        clip_low=low,
        clip_high=high,
        clip_region=low + high,
        kl_sum=zero if units.kl is None else units.kl.detach().sum(),
        entropy_sum=zero if entropy is None else _working(entropy.detach()).sum(),
        ratio_sum=torch.where(live, ratio, zero).sum(),
        ratio_min=torch.cat([torch.where(live, ratio, nothing), nothing]).amin(),
        ratio_max=torch.cat([torch.where(live, ratio, -nothing), -nothing]).amax(),
    )


_IMPLEMENTATIONS = {"torch": Implementation(policy_loss_reference)}


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
        ValueError: shapes that do not fit, or an input that ``spec`` needs is missing.

    Source:
        See the module; TRL 1.16 is matched term by term.
    """
    check_shapes(logprobs, batch)
    return resolve("policy_loss", _IMPLEMENTATIONS, impl=impl, like=logprobs)(logprobs, batch, spec=spec, entropy=entropy)


def check_shapes(per_token: torch.Tensor, batch: LossBatch) -> None:
    """Holds a batch against the T of its first dimension.

    Raises:
        ValueError: a tensor that does not fit, with both shapes.
    """
    num_tokens, weights = per_token.shape[0], tuple(batch.loss_weights.shape)
    for name in ("sequence_index", "old_logprobs", "ref_logprobs"):
        values = getattr(batch, name)
        if values is not None and tuple(values.shape) != (num_tokens,):
            raise ValueError(f"{name} has shape {tuple(values.shape)}; it must be ({num_tokens},), one a token")
    if batch.advantages.ndim != 1 or tuple(batch.advantages.shape) != weights:
        shape = tuple(batch.advantages.shape)
        raise ValueError(f"advantages {shape} and loss_weights {weights} must both have shape (B,), one a sequence")
