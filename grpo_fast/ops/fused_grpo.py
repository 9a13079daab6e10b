"""From hidden rows to the policy loss and its gradients in one pass over the logits.

The gradient of the loss with respect to a token's log-probability needs that log-probability and constants only (at sequence
level: those of its sequence). So each block of rows makes its logits, reduces them to ``logp`` and ``H``, asks
:func:`~grpo_fast.ops.policy_loss.policy_coefficients` for the loss and ``g = dL/dlogp``, ``e = dL/dH``, and turns the very
same block into

    d hidden = dZ W,   d weight += dZ^T hidden,   dZ = g·(onehot - p) - e·p·(log p + H)

before it is freed: 6 T·H·V FLOP (4 with a frozen head), where recomputing logits in backward takes 8. Backward only
multiplies by the incoming scalar. Where the ratio is a sequence's, blocks are cut between sequences; a sequence longer than a
block is walked twice, its logits made again for the gradient.

``logp``, ``H``, the loss, ``d weight`` and ``d bias`` are accumulated in float32 (float64 for float64 rows), in an order that
the sizes fix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from grpo_fast.ops.dispatch import Impl, Implementation, resolve
from grpo_fast.ops.loss_spec import LossBatch, LossSpec, PolicyLoss, PolicyMetrics, check_needs, check_shapes
from grpo_fast.ops.policy_loss import policy_coefficients, policy_loss_reference, sequence_lengths
from grpo_fast.ops.token_logprob import (
    HeadGradient,
    HeadTensors,
    LMHead,
    LogitBlock,
    RowGradient,
    block_statistics,
    check_rows,
    full_precision,
    head_tensors,
    logit_block,
    logit_gradient,
    row_chunks,
    rows_per_chunk,
    token_logprob_reference,
)

_FEW_LOGITS = 2**18
"""T·V up to which plain autograd is the faster: the pass below costs 0.1 ms more of Python (one x86 core, V = 32)."""


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


class _Rows(NamedTuple):
    """What is fixed while the rows of one call are walked."""

    hidden: torch.Tensor
    head: LMHead
    tensors: HeadTensors
    targets: torch.Tensor
    max_rows: int

    def block(self, rows: slice) -> LogitBlock:
        return logit_block(self.hidden[rows], self.head, self.tensors)


def _fused_grpo_torch(
    hidden: torch.Tensor, head: LMHead, *, targets: torch.Tensor, batch: LossBatch, spec: LossSpec
) -> FusedLoss:
    max_rows = rows_per_chunk(hidden, head)
    if hidden.shape[0] <= max_rows and hidden.shape[0] * head.weight.shape[0] <= _FEW_LOGITS:
        return fused_grpo_reference(hidden, head, targets=targets, batch=batch, spec=spec)
    enabled = torch.is_grad_enabled()
    bias_wanted = head.bias is not None and head.bias.requires_grad
    wanted = (enabled and hidden.requires_grad, enabled and head.weight.requires_grad, enabled and bias_wanted)
    with torch.no_grad(), full_precision(hidden):
        tensors = head_tensors(hidden, head)
        rows = _Rows(hidden.detach(), head, tensors, targets, max_rows)
        gradient = HeadGradient(rows.hidden, tensors, wanted=wanted)
        logprobs = torch.empty(hidden.shape[0], dtype=tensors.weight.dtype, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        parts = [
            _one_unit(rows, unit, batch, spec, outputs=(logprobs, entropy), gradient=gradient)
            for unit in _units(batch, spec, num_rows=hidden.shape[0], max_rows=rows.max_rows)
        ]
        loss, metrics = parts[0].loss, parts[0].metrics
        for part in parts[1:]:
            loss, metrics = loss + part.loss, metrics.combine(part.metrics)
    if gradient.wanted:
        loss = _KnownGradient.apply(hidden, head.weight, head.bias, loss, gradient)  # type: ignore[no-untyped-call]
    return FusedLoss(loss, metrics, logprobs, entropy)


def _units(batch: LossBatch, spec: LossSpec, *, num_rows: int, max_rows: int) -> Iterator[slice]:
    """Cuts rows into what the loss can be taken of on its own: blocks, or blocks of whole sequences."""
    if spec.importance_sampling_level == "token" or num_rows <= max_rows:
        yield from row_chunks(0, num_rows, max_rows=max_rows)
        return
    start = stop = 0
    for length in sequence_lengths(batch.sequence_index, num_sequences=batch.advantages.shape[0]).tolist():
        if stop > start and stop + length - start > max_rows:
            yield slice(start, stop)
            start = stop
        stop += length
    if stop != num_rows:
        raise ValueError(f"sequence_index counts {stop} tokens in {num_rows} rows; it must ascend and stay under B")
    yield slice(start, stop)


def _one_unit(
    rows: _Rows,
    unit: slice,
    batch: LossBatch,
    spec: LossSpec,
    *,
    outputs: tuple[torch.Tensor, torch.Tensor],
    gradient: HeadGradient,
) -> PolicyLoss:
    logprobs, entropy = outputs
    chunks = list(row_chunks(unit.start, unit.stop, max_rows=rows.max_rows))
    block = None
    for chunk in chunks:
        block = rows.block(chunk)
        logprobs[chunk], entropy[chunk] = block_statistics(block, rows.targets[chunk])
    part, found = _loss_and_gradient(
        logprobs[unit], entropy[unit], batch.tokens(unit.start, unit.stop), spec, wanted=gradient.wanted
    )
    if found is None:
        return part
    for chunk in chunks:
        if block is None or len(chunks) > 1:
            block = rows.block(chunk)
        local = slice(chunk.start - unit.start, chunk.stop - unit.start)
        rows_gradient = RowGradient(found.logprobs[local], None if found.entropy is None else found.entropy[local])
        dz = logit_gradient(block, rows_gradient, targets=rows.targets[chunk], entropy=entropy[chunk], head=rows.head)
        gradient.add(chunk, rows.hidden[chunk], dz)
    return part


def _loss_and_gradient(
    logprobs: torch.Tensor, entropy: torch.Tensor, batch: LossBatch, spec: LossSpec, *, wanted: bool
) -> tuple[PolicyLoss, RowGradient | None]:
    """Loss of some rows and what it sends back to them."""
    if not wanted:
        return policy_loss_reference(logprobs, batch, spec=spec, entropy=entropy), None
    found = policy_coefficients(logprobs, batch, spec=spec, entropy=entropy, impl="torch")
    return PolicyLoss(found.loss, found.metrics), RowGradient(found.logprobs, found.entropy)


class _KnownGradient(torch.autograd.Function):
    """Lets a loss through and, backward, hands out gradients that are there already."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        loss: torch.Tensor,
        gradient: HeadGradient,
    ) -> torch.Tensor:
        ctx.gradient = gradient
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_loss: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None, None]:
        known = (ctx.gradient.hidden, ctx.gradient.weight, ctx.gradient.bias)
        hidden, weight, bias = (
            None if value is None else (value * grad_loss).to(dtype) for value, dtype in zip(known, ctx.dtypes, strict=True)
        )
        return hidden, weight, bias, None, None


_IMPLEMENTATIONS = {"torch": Implementation(_fused_grpo_torch)}


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
        ValueError: shapes that do not fit, or an input that ``spec`` needs is missing.
    """
    check_rows(hidden, head, targets)
    check_shapes(hidden, batch)
    check_needs(batch, spec, hidden)
    run = resolve("fused_grpo", _IMPLEMENTATIONS, impl=impl, like=hidden)
    return run(hidden, head, targets=targets, batch=batch, spec=spec)
