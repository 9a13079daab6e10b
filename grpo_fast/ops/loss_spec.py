"""Inputs and outputs of a policy loss: plain data, shared by every op that takes or makes the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeAlias, get_args

import torch

from grpo_fast.ops import native
from grpo_fast.ops.lm_head import check_device

Surrogate: TypeAlias = Literal["clip", "cispo", "sapo", "vespo"]
RatioLevel: TypeAlias = Literal["token", "sequence", "sequence_sum"]


@dataclass(frozen=True, slots=True)
class LossSpec:
    """The kind of loss and its coefficients.

    Raises:
        ValueError: values that do not go together, with the field named.
    """

    surrogate: Surrogate = "clip"
    importance_sampling_level: RatioLevel = "token"
    """Level of the ratio: a token, a sequence's geometric mean, or a whole sequence's probability."""
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
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    off_policy_mask_threshold: float | None = None
    """Mean of ``log sampler - log policy`` over a sequence above which one with a negative advantage loses its surrogate."""

    def __post_init__(self) -> None:
        for name, kinds in (("surrogate", Surrogate), ("importance_sampling_level", RatioLevel)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name}={getattr(self, name)!r}; choose one of {', '.join(get_args(kinds))}")
        for name in (field.name for field in fields(self) if isinstance(field.default, float)):  # not those that may be None
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r}; give a finite number")
            if name.startswith("epsilon") and value < 0:
                raise ValueError(f"{name}={value!r}; a clip range is 0 or more")
        if self.surrogate in ("cispo", "vespo") and self.importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r} has no meaning for "
                f"surrogate={self.surrogate!r}, which weighs log-probabilities of single tokens; use 'token'"
            )
        if self.delta is not None and self.surrogate != "clip":
            raise ValueError(
                f"delta={self.delta} bounds a clipped ratio; surrogate={self.surrogate!r} has none, set delta=None"
            )

    @property
    def couples_tokens(self) -> bool:
        """Whether a token's loss depends on the other tokens of its sequence."""
        by_sequence = self.importance_sampling_level != "token" or self.surrogate == "vespo"
        return by_sequence or self.off_policy_mask_threshold is not None


class LossBatch(NamedTuple):
    """Inputs of the loss for a micro-batch, in addition to the log-probabilities of its tokens."""

    sequence_index: torch.Tensor
    """int64 or int32 [T]: which of the B sequences a token belongs to, ascending."""
    advantages: torch.Tensor
    """float [B]."""
    loss_weights: torch.Tensor
    """float [B]: weight of the loss of each of a sequence's tokens."""
    old_logprobs: torch.Tensor | None = None
    """float [T]: nats under the old policy, the ratio's denominator; ``None``: on-policy, with a ratio of exactly 1."""
    ref_logprobs: torch.Tensor | None = None
    """float [T]: nats under the reference policy; read where ``beta`` is not 0."""
    num_items_in_batch: float | None = None
    """Scored tokens of the whole step; divides the entropy bonus, read where ``entropy_coef`` is not 0."""
    importance_weights: torch.Tensor | None = None
    """float [T], not negative and without gradient: multiplies a token's surrogate, and neither its KL term nor its entropy.

    TRL's product of ``off_policy_mask``, ``entropy_mask`` and ``importance_sampling_ratio`` (the policy against the engine
    that sampled); a weight of a whole sequence is repeated on its tokens."""
    token_mask: torch.Tensor | None = None
    """bool [T]: ``False`` tokens are ignored in loss, ratio, length and metrics, whatever their numbers are."""
    sampling_logprobs: torch.Tensor | None = None
    """float [T]: nats in the engine that sampled; read for ``off_policy_mask_threshold``, ``None``: as the old policy's."""
    sampler_log_ratios: torch.Tensor | None = None
    """float [B]: logarithm of a sequence's importance ratio between the old policy and the sampler; read by ``vespo``."""
    entropy_weights: torch.Tensor | None = None
    """float [T]: weight of a token's entropy in the bonus, for which ``num_items_in_batch`` is then their sum over the step."""

    def tokens(self, start: int, stop: int) -> LossBatch:
        """The same batch with the tokens from ``start`` to ``stop`` only; sequences are kept, some may be empty."""
        given = {name: getattr(self, name) for name in TOKEN_FIELDS}
        parts: dict[str, Any] = {name: None if values is None else values[start:stop] for name, values in given.items()}
        return self._replace(**parts)


TOKEN_FIELDS = (
    "sequence_index",
    "old_logprobs",
    "ref_logprobs",
    "importance_weights",
    "token_mask",
    "sampling_logprobs",
    "entropy_weights",
)
"""Fields of :class:`LossBatch` with one value a token."""


@dataclass(frozen=True, slots=True, eq=False)
class PolicyMetrics:
    """Sums over a batch, detached, in one tensor on the batch's device: one copy brings all of them to the host.

    Means are ``clip_* / num_ratios``, ``ratio_sum / num_ratios``, ``kl_sum / num_tokens`` and ``entropy_sum / num_tokens``:
    TRL's ``clip_ratio/low_mean``, ``clip_ratio/high_mean`` (``cispo_clip_ratio`` for cispo), ``clip_ratio/region_mean``,
    ``kl``, ``entropy``.
    """

    NAMES: ClassVar = (
        "num_tokens",
        "num_ratios",
        "clip_low",
        "clip_high",
        "kl_sum",
        "entropy_sum",
        "ratio_sum",
        "ratio_min",
        "ratio_max",
    )
    values: torch.Tensor
    """[9], in the order of ``NAMES``."""

    def combine(self, *others: Self) -> Self:
        """All parts as one."""
        parts = torch.stack([self.values, *(other.values for other in others)])
        return type(self)(torch.cat([parts[:, :-2].sum(0), parts[:, -2:-1].amin(0), parts[:, -1:].amax(0)]))

    def named(self) -> dict[str, torch.Tensor]:
        """Every value by its name, ``clip_region`` too."""
        return dict(zip(self.NAMES, self.values.unbind(), strict=True)) | {"clip_region": self.clip_region}

    @property
    def num_tokens(self) -> torch.Tensor:
        """Tokens in the loss."""
        return self.values[0]

    @property
    def num_ratios(self) -> torch.Tensor:
        """Tokens at token level; sequences that have tokens at sequence level."""
        return self.values[1]

    @property
    def clip_low(self) -> torch.Tensor:
        """Ratios under ``1 - epsilon_low`` with a negative advantage."""
        return self.values[2]

    @property
    def clip_high(self) -> torch.Tensor:
        """Ratios over ``1 + epsilon_high`` (``cispo``: over the cap) with a positive advantage."""
        return self.values[3]

    @property
    def clip_region(self) -> torch.Tensor:
        """Either."""
        return self.values[2] + self.values[3]

    @property
    def kl_sum(self) -> torch.Tensor:
        """Sum of the KL estimate, with its bias correction if that is on."""
        return self.values[4]

    @property
    def entropy_sum(self) -> torch.Tensor:
        """0 where no entropy was given."""
        return self.values[5]

    @property
    def ratio_sum(self) -> torch.Tensor:
        """Sum of the ratios."""
        return self.values[6]

    @property
    def ratio_min(self) -> torch.Tensor:
        """Infinity over nothing."""
        return self.values[7]

    @property
    def ratio_max(self) -> torch.Tensor:
        """Minus infinity over nothing."""
        return self.values[8]


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A loss and its metrics."""

    loss: torch.Tensor
    """Scalar, differentiable."""
    metrics: PolicyMetrics


class PolicyCoefficients(NamedTuple):
    """A loss with its own derivatives, all detached."""

    loss: torch.Tensor
    """Scalar."""
    logprobs: torch.Tensor
    """[T]: derivative with respect to each token's log-probability."""
    entropy: torch.Tensor | None
    """[T]: derivative with respect to each token's entropy; ``None`` without an entropy bonus."""
    metrics: PolicyMetrics


def check_shapes(per_token: torch.Tensor, batch: LossBatch) -> None:
    """Checks a batch against T, the number of tokens.

    Raises:
        ValueError: a tensor that does not fit, with both shapes or devices; or, seen on the CPU alone, as elsewhere nothing
            waits for the device: a ``sequence_index`` that does not ascend or leaves the B sequences.
        TypeError: a mask that is not boolean, indices that are not whole numbers, or what is no tensor.
    """
    _check_tensors(per_token, batch)
    num_tokens, weights = per_token.shape[0], tuple(batch.loss_weights.shape)
    for name in TOKEN_FIELDS:
        values = getattr(batch, name)
        if values is not None and tuple(values.shape) != (num_tokens,):
            raise ValueError(f"{name} has shape {tuple(values.shape)}; it must be ({num_tokens},), one a token")
    if batch.token_mask is not None and batch.token_mask.dtype != torch.bool:
        raise TypeError(f"token_mask is {batch.token_mask.dtype}; give booleans (mask.bool() of ones and zeros)")
    if batch.advantages.ndim != 1 or tuple(batch.advantages.shape) != weights:
        shape = tuple(batch.advantages.shape)
        raise ValueError(f"advantages {shape} and loss_weights {weights} must both have shape (B,), one a sequence")
    if batch.sampler_log_ratios is not None and tuple(batch.sampler_log_ratios.shape) != weights:
        shape = tuple(batch.sampler_log_ratios.shape)
        raise ValueError(f"sampler_log_ratios has shape {shape}; it must be {weights}, one a sequence")
    index = batch.sequence_index
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"sequence_index is {index.dtype}; give int64 or int32")
    if num_tokens and index.device.type == "cpu" and not torch.compiler.is_compiling():
        first, last = int(index[0]), int(index[-1])
        if first < 0 or last >= weights[0] or not _ascends(index):
            raise ValueError(f"sequence_index goes from {first} to {last}; it must ascend and stay under B, here {weights[0]}")


def _check_tensors(per_token: torch.Tensor, batch: LossBatch) -> None:
    if not isinstance(batch, LossBatch):
        raise TypeError(f"batch is a {type(batch).__name__}; give a LossBatch")
    for name, values in zip(batch._fields, batch, strict=True):
        if values is None or name == "num_items_in_batch":
            continue
        if not isinstance(values, torch.Tensor):
            raise TypeError(f"{name} is a {type(values).__name__}; give a tensor")
        check_device(per_token, {name: values})


def check_constants(batch: LossBatch) -> None:
    """Checks that no gradient is expected where none is made: implementations would differ in whether they make it.

    Raises:
        ValueError: a tensor of the batch requires a gradient, and gradients are recorded.
    """
    for name, values in zip(batch._fields, batch, strict=True):
        if isinstance(values, torch.Tensor) and values.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, and the loss has none for it: all of a batch is constant; give {name}.detach()"
            )


def _ascends(index: torch.Tensor) -> bool:
    if native.obstacle(index) is None:
        return bool(native.call("ascends", index))
    return not bool((index.diff() < 0).any())


def check_needs(batch: LossBatch, spec: LossSpec, entropy: torch.Tensor | None) -> None:
    """Checks that a batch has everything that a loss reads.

    Raises:
        ValueError: something that ``spec`` needs is missing.
        TypeError: ``spec`` is no LossSpec.
    """
    if not isinstance(spec, LossSpec):
        raise TypeError(f"spec is {spec!r}; give a LossSpec, or that of an objective: OBJECTIVES['dapo'].spec(Config())")
    if spec.beta != 0 and batch.ref_logprobs is None:
        raise ValueError("beta is not 0, so ref_logprobs are needed; score the tokens under the reference, or set beta=0")
    if spec.entropy_coef != 0 and entropy is None:
        raise ValueError("entropy_coef is not 0, so the tokens' entropy is needed; pass entropy=")
    if spec.entropy_coef != 0 and batch.num_items_in_batch is None:
        raise ValueError("entropy_coef is not 0, so num_items_in_batch, the scored tokens of the step, is needed")


def entropy_slope(batch: LossBatch, spec: LossSpec) -> float:
    """Derivative of the loss with respect to the entropy of any one token of weight 1; 0 without an entropy bonus."""
    if spec.entropy_coef == 0:
        return 0.0
    assert batch.num_items_in_batch is not None
    return -spec.entropy_coef / max(batch.num_items_in_batch, 1.0)


def weighted_entropy(entropy: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    """Sum of the tokens' entropies times ``batch.entropy_weights``: a differentiable scalar."""
    mask = batch.token_mask
    present = entropy if mask is None else torch.where(mask, entropy, 0.0)
    dtype = torch.float64 if entropy.dtype == torch.float64 else torch.float32
    return (present_entropy_weights(batch, dtype=dtype) * present.to(dtype)).sum()


def present_entropy_weights(batch: LossBatch, *, dtype: torch.dtype) -> torch.Tensor:
    """``batch.entropy_weights`` [T], 0 for masked tokens."""
    assert batch.entropy_weights is not None
    weights = batch.entropy_weights.to(dtype)
    return weights if batch.token_mask is None else torch.where(batch.token_mask, weights, 0.0)
