"""Backward passes that make a gradient and know no derivative of it, and say so to whoever asks for one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

Backward: TypeAlias = Callable[..., Any]


def once_differentiable(backward: Backward) -> Backward:
    """Makes a second derivative an error.

    PyTorch's decorator of this name refuses one only where the incoming gradient requires a gradient itself. That of a loss
    is the constant 1, and a penalty on the loss's gradient then counted for nothing without a word.
    """

    @functools.wraps(backward)
    def first_alone(ctx: Any, *incoming: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *incoming)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # only create_graph=True enables it here
            return found
        return tuple(value if value is None else _Last.apply(value.detach().requires_grad_()) for value in found)  # type: ignore[no-untyped-call]

    return first_alone


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(
            "the gradient of a fused op has no derivative; for second derivatives take its function ..._reference "
            "(fused_grpo_reference, token_logprob_reference), and impl='torch' of policy_loss"
        )
