"""The policy loss by the compiled extension, on a CPU: loss, metrics and ``dL/dlogp`` of a token come from one look at it.

Every loss of :mod:`grpo_fast.ops.policy_loss` is there, in float32; float64 stays with plain PyTorch. Terms are float32 and
sums float64, in an order that no number of threads changes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from grpo_fast.ops import native
from grpo_fast.ops.first_derivative import once_differentiable
from grpo_fast.ops.loss_spec import LossBatch, LossSpec, PolicyCoefficients, PolicyLoss
from grpo_fast.ops.policy_loss_triton import coefficients_by, input_gradients, loss_by, setup_context

_forward = functools.partial(native.call, "policy_loss")


class _PolicyLoss(torch.autograd.Function):
    # Without a setup_context, for which torch would look up the signature in every call: 20 of 85 us for 16,384 tokens.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output: tuple[torch.Tensor, torch.Tensor] = _forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        grad_logprobs, grad_loss = ctx.saved_tensors[0], grad_sums[0]
        # A loss that backward starts from has gradient 1, and a product would take a third of the time of all else.
        if torch.compiler.is_compiling() or grad_loss.item() != 1:
            grad_logprobs = grad_logprobs * grad_loss
        return input_gradients(ctx, grad_loss, grad_logprobs)


def policy_loss_native(
    logprobs: torch.Tensor, batch: LossBatch, *, spec: LossSpec, entropy: torch.Tensor | None = None
) -> PolicyLoss:
    """``impl="native"`` of :func:`~grpo_fast.ops.policy_loss.policy_loss`; differentiable once."""
    return loss_by(_PolicyLoss.apply, logprobs, batch, spec, entropy)


def policy_coefficients_native(
    logprobs: torch.Tensor, batch: LossBatch, *, spec: LossSpec, entropy: torch.Tensor | None = None
) -> PolicyCoefficients:
    """``impl="native"`` of :func:`~grpo_fast.ops.policy_loss.policy_coefficients`."""
    return coefficients_by(_forward, logprobs, batch, spec, entropy)


def obstacle(like: torch.Tensor) -> str | None:
    """Why the extension cannot compute the loss of log-probabilities like these; ``None`` where it can."""
    if like.dtype == torch.float64:
        return "the extension computes the loss in float32 and the input is float64"
    return native.host_obstacle(like)
