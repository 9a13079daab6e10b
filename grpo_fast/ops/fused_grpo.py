"""From hidden rows to the policy loss and its gradients in one pass over the logits.

The gradient of the loss with respect to a token's log-probability needs that log-probability and constants only (at sequence
level: those of its sequence). So each chunk of rows makes its logits, reduces them to ``logp`` and ``H``, asks
:func:`~grpo_fast.ops.policy_loss.policy_coefficients` for ``g = dL/dlogp`` and ``c = dL/dH``, and turns the very same block
into

    d hidden = dZ W,   d weight += dZ^T hidden,   dZ as in :mod:`grpo_fast.ops.head_pass`

before the next chunk takes its place: 6 T·H·V FLOP (4 with a frozen head), where recomputing logits in backward takes 8. Rows
that turn out to carry no gradient (clipped, advantage 0) are left out of the last two products. Backward only multiplies by
the incoming scalar. Where the ratio, or a weight, is a sequence's, chunks are cut between sequences; a sequence longer than a
chunk is walked twice, its logits made again for the gradient.

``logp``, ``H``, the loss, ``d weight`` and ``d bias`` are accumulated in float32 (float64 for float64 rows), in an order that
the sizes fix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from grpo_fast.ops.dispatch import Impl, Implementation, resolve, triton_kernels
from grpo_fast.ops.first_derivative import once_differentiable
from grpo_fast.ops.head_pass import HeadPass, RowGradient, row_statistics
from grpo_fast.ops.lm_head import LMHead, check_rows, check_targets, full_precision, head_options, row_chunks, working_dtype
from grpo_fast.ops.loss_spec import (
    LossBatch,
    LossSpec,
    PolicyCoefficients,
    PolicyMetrics,
    check_constants,
    check_needs,
    check_shapes,
)
from grpo_fast.ops.policy_loss import policy_coefficients, policy_loss_reference
from grpo_fast.ops.sequence_weights import sequence_lengths
from grpo_fast.ops.token_logprob import HEAD_PASSES, token_logprob_reference


@dataclass(frozen=True, slots=True)
class FusedLoss:
    """A loss whose gradients are known already, and what else the pass over the logits found."""

    loss: torch.Tensor
    """Scalar, differentiable with respect to hidden rows, weight and bias."""
    metrics: PolicyMetrics
    logprobs: torch.Tensor
    """float [T], detached: ``old_logprobs`` of later iterations on the same tokens."""
    entropy: torch.Tensor
    """float [T], detached."""


def fused_grpo_reference(
    hidden: torch.Tensor, head: LMHead, *, targets: torch.Tensor, batch: LossBatch, spec: LossSpec
) -> FusedLoss:
    """The specification of :func:`fused_grpo`: both ops in plain differentiable PyTorch, one after the other."""
    logprobs, entropy = token_logprob_reference(hidden, head, targets=targets)
    assert entropy is not None
    with full_precision(hidden):
        result = policy_loss_reference(logprobs, batch, spec=spec, entropy=entropy)
    return FusedLoss(result.loss, result.metrics, logprobs.detach(), entropy.detach())


class _Outputs(NamedTuple):
    """Numbers of all T rows, filled chunk by chunk."""

    logprobs: torch.Tensor
    entropy: torch.Tensor


def _one_pass(  # noqa: PLR0913, PLR0917
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    logits_dtype: torch.dtype | None,
    operand_dtype: torch.dtype | None,
    chunk_bytes: int | None,
    tensors: list[torch.Tensor | None],
    num_items_in_batch: float | None,
    surrogate: str,
    level: str,
    numbers: list[float],
    delta: float | None,
    mask_threshold: float | None,
    bias_correction: bool,
    wanted: list[bool],
    name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, metric sums, logp [T], H [T] and three gradients, of which one that is not wanted is empty.

    ``tensors`` are those of the batch, in its order; ``numbers``: ε_low, ε_high, β, the entropy's coefficient, τ_pos, τ_neg,
    k_pos, λ_pos, k_neg, λ_neg.
    """
    head = LMHead(weight, bias, temperature, softcap, logit_scale, logits_dtype, operand_dtype, chunk_bytes)
    batch = LossBatch._make([*tensors[:5], num_items_in_batch, *tensors[5:]])
    low, high, beta, entropy_coef, *shapes = numbers
    spec = LossSpec(surrogate, level, low, high, delta, beta, bias_correction, entropy_coef, *shapes)  # type: ignore[arg-type]
    spec = replace(spec, off_policy_mask_threshold=mask_threshold)
    with full_precision(hidden):
        reached = (wanted[0], wanted[1], wanted[2])
        work = HEAD_PASSES[name](hidden, head, targets=targets, wanted=reached, gated=entropy_coef == 0)
        logprobs = torch.empty(hidden.shape[0], dtype=working_dtype(hidden), device=hidden.device)
        outputs = _Outputs(logprobs, torch.empty_like(logprobs))
        coefficients = functools.partial(policy_coefficients, spec=spec, impl=name)  # type: ignore[arg-type]
        parts = [
            _one_unit(work, unit, batch, coefficients, outputs=outputs, wanted=any(wanted))
            for unit in _units(batch, spec, num_rows=hidden.shape[0], max_rows=work.max_rows)
        ]
        loss = torch.stack([part.loss for part in parts]).sum()
        metrics = parts[0].metrics.combine(*(part.metrics for part in parts[1:]))
        found = [hidden.new_empty(0) if value is None else value for value in work.gradients()]
    return loss, metrics.values, outputs.logprobs, outputs.entropy, found[0], found[1], found[2]


_fused_grpo_fwd = torch.library.custom_op("grpo_fast::fused_grpo_fwd", _one_pass, mutates_args=())


@_fused_grpo_fwd.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    work, wanted = working_dtype(hidden), rest[-2]
    loss, metrics, logprobs, entropy = (
        hidden.new_empty(shape, dtype=work) for shape in ((), len(PolicyMetrics.NAMES), hidden.shape[0], hidden.shape[0])
    )
    kinds = ((hidden.shape, hidden.dtype), (weight.shape, work), (weight.shape[:1], work))
    gradients = (
        hidden.new_empty(shape, dtype=dtype) if asked else hidden.new_empty(0)
        for (shape, dtype), asked in zip(kinds, wanted, strict=True)
    )
    return loss, metrics, logprobs, entropy, *gradients


def _units(batch: LossBatch, spec: LossSpec, *, num_rows: int, max_rows: int) -> Iterator[slice]:
    """Cuts rows into what the loss can be taken of on its own: blocks, or blocks of whole sequences."""
    if num_rows <= max_rows:
        yield slice(0, num_rows)
        return
    if not spec.couples_tokens:
        yield from row_chunks(0, num_rows, max_rows=max_rows)
        return
    start = stop = 0
    for length in sequence_lengths(batch.sequence_index, num_sequences=batch.advantages.shape[0]).tolist():
        if stop > start and stop + length - start > max_rows:
            yield slice(start, stop)
            start = stop
        stop += length
    assert stop == num_rows, "sequence_index ascends and stays under B"
    yield slice(start, stop)


def _one_unit(
    work: HeadPass,
    unit: slice,
    batch: LossBatch,
    coefficients: Callable[..., PolicyCoefficients],
    *,
    outputs: _Outputs,
    wanted: bool,
) -> PolicyCoefficients:
    chunks = list(row_chunks(unit.start, unit.stop, max_rows=work.max_rows))
    one = len(chunks) == 1
    for chunk in chunks:
        block = work.block(chunk, want_entropy=True, want_exp=wanted and one)
        statistics = row_statistics(block)
        assert statistics.entropy is not None
        outputs.logprobs[chunk], outputs.entropy[chunk] = statistics.logprobs, statistics.entropy
    found = coefficients(outputs.logprobs[unit], batch.tokens(unit.start, unit.stop), entropy=outputs.entropy[unit])
    if not wanted:
        return found
    gradient = RowGradient(found.logprobs, found.entropy)
    for chunk in chunks:
        if not one:
            block = work.block(chunk, want_entropy=True, want_exp=True)
            statistics = row_statistics(block)
        work.add(block, statistics, gradient.rows(chunk.start - unit.start, chunk.stop - unit.start))
    return found


class _KnownGradient(torch.autograd.Function):
    """Lets a loss through and, backward, hands out gradients that are there already."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        loss: torch.Tensor,
        dhidden: torch.Tensor,
        dweight: torch.Tensor,
        dbias: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # On a CPU, reading the scalar costs nothing and usually saves a pass over every gradient.
        as_is = not torch.compiler.is_compiling() and grad_loss.device.type == "cpu" and grad_loss.item() == 1
        found = (
            (value.to(dtype) if as_is else _scaled(value, grad_loss, dtype)) if asked else None
            for value, dtype, asked in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        )
        return (*found, None, None, None, None)


def _scaled(value: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value * factor`` in another type, in one pass."""
    return torch.mul(value, factor, out=torch.empty_like(value, dtype=dtype))


def _by(name: str) -> Callable[..., FusedLoss]:
    def run(hidden: torch.Tensor, head: LMHead, *, targets: torch.Tensor, batch: LossBatch, spec: LossSpec) -> FusedLoss:
        enabled = torch.is_grad_enabled()
        bias_wanted = head.bias is not None and head.bias.requires_grad
        wanted = [enabled and hidden.requires_grad, enabled and head.weight.requires_grad, enabled and bias_wanted]
        loss, metrics, logprobs, entropy, *gradients = _fused_grpo_fwd(
            hidden.detach(),
            head.weight.detach(),
            None if head.bias is None else head.bias.detach(),
            targets,
            *head_options(head),
            [*batch[:5], *batch[6:]],
            batch.num_items_in_batch,
            spec.surrogate,
            spec.importance_sampling_level,
            [
                float(number)
                for number in (
                    spec.epsilon_low,
                    spec.epsilon_high,
                    spec.beta,
                    spec.entropy_coef,
                    spec.sapo_temperature_pos,
                    spec.sapo_temperature_neg,
                    spec.vespo_k_pos,
                    spec.vespo_lambda_pos,
                    spec.vespo_k_neg,
                    spec.vespo_lambda_neg,
                )
            ],
            spec.delta,
            spec.off_policy_mask_threshold,
            spec.use_bias_correction_kl,
            wanted,
            name,
        )
        if any(wanted):
            loss = _KnownGradient.apply(hidden, head.weight, head.bias, loss, *gradients)  # type: ignore[no-untyped-call]
        return FusedLoss(loss, PolicyMetrics(metrics), logprobs, entropy)

    return run


_IMPLEMENTATIONS = {"triton": triton_kernels(_by("triton")), "torch": Implementation(_by("torch"))}


def fused_grpo(
    hidden: torch.Tensor,
    head: LMHead,
    *,
    targets: torch.Tensor,
    batch: LossBatch,
    spec: LossSpec,
    impl: Impl = "auto",
) -> FusedLoss:
    """Policy loss of T rows straight from their hidden states; gradients are made on the way.

    Args:
        hidden: float [T, H], final hidden states of the rows that predict the targets.
        head: how they become logits; ``chunk_bytes`` bounds the logits that live at once.
        targets: int64 [T].
        batch: what else is known of the tokens and their sequences.
        spec: which loss.
        impl: how it is computed.

    Returns:
        The loss, differentiable with respect to ``hidden``, ``head.weight`` and ``head.bias`` where those require it, metric
        sums, and detached log-probabilities and entropy of every row. With T = 0 the loss is a differentiable 0.

    Raises:
        ValueError: shapes or devices that do not fit, an input that ``spec`` needs is missing, one of the batch, which is
            constant, requires a gradient, or, on the CPU, a target is outside the vocabulary.
        TypeError: targets are not int64, or ``head`` is a layer.
        RuntimeError: a second derivative is asked for.
    """
    check_rows(hidden, head, targets)
    check_targets(hidden, head, targets)
    check_shapes(hidden, batch)
    check_constants(batch)
    check_needs(batch, spec, hidden)
    run = resolve("fused_grpo", _IMPLEMENTATIONS, impl=impl, like=hidden)
    return run(hidden, head, targets=targets, batch=batch, spec=spec)
