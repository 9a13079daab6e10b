from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from grpo_fast.ops import Kept, LMHead, LossBatch, LossSpec, fused_grpo, kept_logprob, policy_loss, token_logprob
from grpo_fast.ops.first_derivative import once_differentiable

BATCH = LossBatch(
    sequence_index=torch.tensor([0, 0, 1, 1]), advantages=torch.tensor([1.0, -1.0]), loss_weights=torch.tensor([0.25, 0.25])
)
HEAD = LMHead(torch.linspace(-1, 1, 35).reshape(7, 5))
TARGETS = torch.tensor([3, 0, 6, 2])


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(value)
        return value**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: torch.Tensor) -> tuple[torch.Tensor, None]:
        (value,) = ctx.saved_tensors
        return 3 * value**2 * incoming, None


LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "any function": lambda rows: _Cube.apply(rows, rows.detach()).sum(),
    "fused_grpo": lambda rows: fused_grpo(rows, HEAD, targets=TARGETS, batch=BATCH, spec=LossSpec()).loss,
    "token_logprob": lambda rows: token_logprob(rows, HEAD, targets=TARGETS)[0].sum(),
    "entropy": lambda rows: token_logprob(rows, HEAD, targets=TARGETS)[1].sum(),
    "kept_logprob": lambda rows: kept_logprob(rows, HEAD, kept=Kept(TARGETS, torch.ones(4).long()))[0].sum(),
    "policy_loss": lambda rows: policy_loss(rows[:, 0], BATCH, spec=LossSpec()).loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_penalty_on_the_gradient_is_refused_and_never_left_out(name: str) -> None:
    rows = torch.linspace(-2, 2, 20).reshape(4, 5).requires_grad_()
    loss = LOSSES[name](rows)
    (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
    (plain,) = torch.autograd.grad(LOSSES[name](rows), rows)
    assert torch.equal(gradient, plain)
    with pytest.raises(RuntimeError, match="the gradient of a fused op has no derivative; for second derivatives take"):
        (loss + gradient.square().sum()).backward()
