"""The policy loss by Triton kernels: launches, the operator that torch knows, and its gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch

from grpo_fast.ops.first_derivative import once_differentiable
from grpo_fast.ops.loss_spec import (
    LossBatch,
    LossSpec,
    PolicyCoefficients,
    PolicyLoss,
    PolicyMetrics,
    entropy_slope,
    present_entropy_weights,
    weighted_entropy,
)
from grpo_fast.ops.policy_loss_kernels import (
    _policy_loss_sequence_kernel,
    _policy_loss_sum_kernel,
    _policy_loss_token_kernel,
)
from grpo_fast.ops.sequence_weights import weighted

NUM_SUMS = 10
"""The loss, and then the order of ``PolicyMetrics.NAMES``."""
_BLOCK = 1024
_MAX_PROGRAMS = 1024
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
"""Eight warps: with four, ptxas spills for one surrogate on sm_90."""


class LaunchShape(NamedTuple):
    """How the tokens of one call are cut into programs."""

    num_programs: int
    tiles_per_program: int


def _launch_shape(num_tokens: int) -> LaunchShape:
    """Deals tiles to at most so many programs as the second launch adds up in one go; of T alone, as is the order of sums."""
    tiles = -(-num_tokens // _BLOCK)
    tiles_per_program = max(1, -(-tiles // _MAX_PROGRAMS))
    return LaunchShape(-(-tiles // tiles_per_program), tiles_per_program)


class _Tensors(NamedTuple):
    """Contiguous, in the order of the kernels."""

    logprobs: torch.Tensor
    sequence_index: torch.Tensor
    """[T] sequence of each token; for sequences [B + 1], where each begins."""
    advantages: torch.Tensor
    loss_weights: torch.Tensor
    old: torch.Tensor | None
    ref: torch.Tensor | None
    importance: torch.Tensor | None
    mask: torch.Tensor | None
    entropy: torch.Tensor | None
    coefficients: torch.Tensor
    """float32 [T], to be filled."""


def _launch_policy_loss(  # noqa: PLR0913, PLR0917
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    sequence_index: torch.Tensor,
    advantages: torch.Tensor,
    loss_weights: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    importance_weights: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    surrogate: str,
    level: str,
    numbers: list[float],
    two_sided: bool,
    bias_correction: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums [10] and coefficients [T], float32. ``numbers``: lower and upper bound, δ, β, τ_pos, τ_neg, and dL/dH."""
    coefficients = torch.empty(logprobs.shape[0], dtype=torch.float32, device=logprobs.device)
    given = (old_logprobs, ref_logprobs, importance_weights, token_mask, entropy)
    sequences = (sequence_index, advantages, loss_weights)
    tensors = _Tensors._make(
        None if values is None else values.contiguous() for values in (logprobs, *sequences, *given, coefficients)
    )
    flags = {"SURROGATE": surrogate, "TWO_SIDED": two_sided, "BIAS_CORRECTION": bias_correction, "BLOCK": _BLOCK, **_OPTIONS}
    if level == "token":
        sums = _launch_tokens(tensors, numbers[:-1], flags)
    else:
        sums = _launch_sequences(tensors, numbers[:-1], flags | {"MEAN": level == "sequence"})
    result = torch.empty(NUM_SUMS, dtype=torch.float32, device=logprobs.device)
    _policy_loss_sum_kernel[(NUM_SUMS,)](sums, result, sums.shape[1], numbers[-1], BLOCK=_BLOCK, **_OPTIONS)
    return result, coefficients


def _launch_tokens(tensors: _Tensors, numbers: list[float], flags: dict[str, Any]) -> torch.Tensor:
    """Sums [10, programs], float64, where each token has a ratio of its own."""
    num_tokens = len(tensors.logprobs)
    shape = _launch_shape(num_tokens)
    sums = torch.empty(NUM_SUMS, shape.num_programs, dtype=torch.float64, device=tensors.logprobs.device)
    if shape.num_programs > 0:
        sizes = (num_tokens, num_tokens // 16, shape.tiles_per_program)
        _policy_loss_token_kernel[(shape.num_programs,)](*tensors, sums, *sizes, *numbers, **flags)
    return sums


def _launch_sequences(tensors: _Tensors, numbers: list[float], flags: dict[str, Any]) -> torch.Tensor:
    """Sums [10, B], float64, where each sequence has one."""
    num_sequences, device = len(tensors.advantages), tensors.logprobs.device
    sums = torch.empty(NUM_SUMS, num_sequences, dtype=torch.float64, device=device)
    if num_sequences > 0:
        sequences = torch.arange(num_sequences + 1, dtype=tensors.sequence_index.dtype, device=device)
        starts = torch.searchsorted(tensors.sequence_index, sequences)
        _policy_loss_sequence_kernel[(num_sequences,)](*tensors._replace(sequence_index=starts), sums, *numbers, **flags)
    return sums


_policy_loss_fwd = torch.library.custom_op("grpo_fast::policy_loss_fwd", _launch_policy_loss, mutates_args=())


@_policy_loss_fwd.register_fake
def _(logprobs: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return logprobs.new_empty(NUM_SUMS, dtype=torch.float32), logprobs.new_empty(logprobs.shape, dtype=torch.float32)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Keeps what the gradient is made of; arguments and results are those of ``_launch_policy_loss``."""
    logprobs, entropy, mask, numbers = inputs[0], inputs[1], inputs[8], inputs[11]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], mask)
    ctx.dtypes = (logprobs.dtype, None if entropy is None else entropy.dtype)
    ctx.entropy_slope = numbers[-1]


def input_gradients(ctx: Any, grad_loss: torch.Tensor, grad_logprobs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the operator's arguments; that of the log-probabilities is known, in the working type."""
    coefficients, mask = ctx.saved_tensors
    grad_entropy = None
    if ctx.needs_input_grad[1] and ctx.entropy_slope != 0:
        slope = (grad_loss * ctx.entropy_slope).to(ctx.dtypes[1])
        grad_entropy = slope.expand_as(coefficients) if mask is None else slope * mask
    return (grad_logprobs.to(ctx.dtypes[0]), grad_entropy, *(None,) * 12)


@once_differentiable
def _policy_loss_bwd(ctx: Any, grad_sums: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return input_gradients(ctx, grad_sums[0], ctx.saved_tensors[0] * grad_sums[0])


_policy_loss_fwd.register_autograd(_policy_loss_bwd, setup_context=setup_context)


Forward: TypeAlias = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""An operator with the arguments and results of ``_launch_policy_loss``."""


def _sums_and_coefficients(
    forward: Forward, logprobs: torch.Tensor, batch: LossBatch, spec: LossSpec, entropy: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    batch = weighted(logprobs, batch, spec)
    sapo = (spec.sapo_temperature_pos, spec.sapo_temperature_neg)
    high = spec.epsilon_high if spec.surrogate == "cispo" else 1 + spec.epsilon_high
    delta = float("inf") if spec.delta is None else spec.delta
    slope = entropy_slope(batch, spec) if batch.entropy_weights is None else 0.0  # weighed ones are added in PyTorch
    numbers = [1 - spec.epsilon_low, high, delta, spec.beta, *sapo, slope]
    return forward(
        logprobs,
        entropy,
        batch.sequence_index,
        batch.advantages,
        batch.loss_weights,
        batch.old_logprobs,
        batch.ref_logprobs if spec.beta != 0 else None,
        batch.importance_weights,
        batch.token_mask,
        spec.surrogate,
        spec.importance_sampling_level,
        [float(number) for number in numbers],
        spec.delta is not None,
        spec.use_bias_correction_kl,
    )


def loss_by(
    forward: Forward, logprobs: torch.Tensor, batch: LossBatch, spec: LossSpec, entropy: torch.Tensor | None
) -> PolicyLoss:
    """:func:`~grpo_fast.ops.policy_loss.policy_loss` by an operator; differentiable once."""
    sums, _ = _sums_and_coefficients(forward, logprobs, batch, spec, entropy)
    return PolicyLoss(_with_bonus(sums[0], batch, spec, entropy), PolicyMetrics(sums[1:].detach()))


def _with_bonus(loss: torch.Tensor, batch: LossBatch, spec: LossSpec, entropy: torch.Tensor | None) -> torch.Tensor:
    """Adds the bonus of weighed entropies, which is not in the kernels."""
    if spec.entropy_coef == 0 or batch.entropy_weights is None:
        return loss
    assert entropy is not None
    return loss + entropy_slope(batch, spec) * weighted_entropy(entropy, batch)


@torch.no_grad()
def coefficients_by(
    forward: Forward, logprobs: torch.Tensor, batch: LossBatch, spec: LossSpec, entropy: torch.Tensor | None
) -> PolicyCoefficients:
    """:func:`~grpo_fast.ops.policy_loss.policy_coefficients` by an operator."""
    sums, coefficients = _sums_and_coefficients(forward, logprobs, batch, spec, entropy)
    slopes = None
    if spec.entropy_coef != 0:
        slopes = coefficients.new_full((), entropy_slope(batch, spec)).expand_as(coefficients)
        if batch.entropy_weights is not None:
            slopes = slopes * present_entropy_weights(batch, dtype=coefficients.dtype)
        elif batch.token_mask is not None:
            slopes = slopes * batch.token_mask
    loss = _with_bonus(sums[0], batch, spec, entropy)
    return PolicyCoefficients(loss, coefficients, slopes, PolicyMetrics(sums[1:]))


def policy_loss_triton(
    logprobs: torch.Tensor, batch: LossBatch, *, spec: LossSpec, entropy: torch.Tensor | None = None
) -> PolicyLoss:
    """``impl="triton"`` of :func:`~grpo_fast.ops.policy_loss.policy_loss`; differentiable once."""
    return loss_by(_policy_loss_fwd, logprobs, batch, spec, entropy)


def policy_coefficients_triton(
    logprobs: torch.Tensor, batch: LossBatch, *, spec: LossSpec, entropy: torch.Tensor | None = None
) -> PolicyCoefficients:
    """``impl="triton"`` of :func:`~grpo_fast.ops.policy_loss.policy_coefficients`."""
    return coefficients_by(_policy_loss_fwd, logprobs, batch, spec, entropy)


def aot_calls() -> dict[str, Callable[[], object]]:
    """Launches that cover every branch of the kernels, on tensors that hold nothing; for ahead-of-time compilation."""

    def call(surrogate: str, level: str, extras: bool) -> object:
        tokens, sequences = (torch.empty(n, dtype=torch.float32, device="meta") for n in (2**14, 2**4))
        index, mask = torch.empty_like(tokens, dtype=torch.int64), torch.empty_like(tokens, dtype=torch.bool)
        return _launch_policy_loss(
            tokens,
            tokens,
            index,
            advantages=sequences,
            loss_weights=sequences,
            old_logprobs=tokens,
            ref_logprobs=tokens if extras else None,
            importance_weights=tokens if extras else None,
            token_mask=mask if extras else None,
            surrogate=surrogate,
            level=level,
            numbers=[0.8, 1.2, 2.0, 0.1, 1.0, 1.05, -0.1],
            two_sided=extras and surrogate == "clip",
            bias_correction=extras,
        )

    rows = [(surrogate, "token") for surrogate in ("clip", "cispo", "sapo", "vespo")]
    rows += [("clip", "sequence"), ("sapo", "sequence_sum")]
    return {
        f"{surrogate}-{level}{'-extras' if extras else ''}": functools.partial(call, surrogate, level, extras)
        for surrogate, level in rows
        for extras in (False, True)
    }
