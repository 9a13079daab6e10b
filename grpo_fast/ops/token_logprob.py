"""Log-probability of the chosen token, and entropy, from hidden states; logits of all rows never live at once.

For row t of ``hidden`` [T, H] with target ``y_t`` and logits ``z`` of the head (:mod:`grpo_fast.ops.lm_head`):

    logp_t = z_y - log Σ_v e^{z_v}             nats
    H_t    = -Σ_v p_v log p_v,  p = softmax(z)

    dL/dz_v = g_t·(1[v = y] - p_v) - c_t·p_v·(log p_v + H_t),   g = dL/dlogp, c = dL/dH

Rows are walked in chunks of ``LMHead.chunk_bytes`` of logits. Forward keeps two numbers a row (2 T·H·V FLOP); backward makes
each chunk's logits again (8 T·H·V in all). Logits, ``d weight`` and ``d bias`` are float32 (float64 for float64 inputs)
whatever the type of hidden states and weight, also under autocast: bfloat16 logits are wrong by 0.02 nat in the mean at a
vocabulary of 151,936. The order of every sum is fixed by the sizes, so a repeated call is bitwise the same, and the same bits
come out of
:func:`~grpo_fast.ops.fused_grpo.fused_grpo`.
"""

from __future__ import annotations

from typing import Any

import torch

from grpo_fast.ops.dispatch import Impl, Implementation, resolve
from grpo_fast.ops.head_pass import HeadPass, RowGradient, row_statistics
from grpo_fast.ops.head_torch import TorchHeadPass
from grpo_fast.ops.lm_head import LMHead, check_rows, full_precision, row_chunks, working_dtype


def token_logprob_reference(
    hidden: torch.Tensor, head: LMHead, *, targets: torch.Tensor, want_entropy: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The specification of :func:`token_logprob`, in plain differentiable PyTorch, all rows at once.

    ``logp = -log(1 + e^a)`` with ``a`` the log-sum-exp of the *other* logits over the target's keeps the tail of a confident
    token, and its gradient, which ``z_y - logsumexp(z)`` rounds to 0.
    """
    work = working_dtype(hidden)
    with full_precision(hidden):
        logits = hidden.to(work) @ head.weight.to(work).T
        if head.bias is not None:
            # A finite floor for -inf: 0·(-inf) in the entropy would be NaN.
            logits = logits + head.bias.to(work).clamp(min=torch.finfo(work).min / 1e6)
        if head.rounds_logits:
            logits = logits + (logits.detach().to(head.logits_dtype).to(work) - logits.detach())
        logits = logits * head.logit_scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        logits = logits / head.temperature
        target = logits.gather(1, targets[:, None])[:, 0]
        others = logits.scatter(1, targets[:, None], torch.finfo(work).min)
        odds = torch.logsumexp(others, dim=1) - target
        logprobs = -torch.logaddexp(odds, torch.zeros_like(odds))
        if not want_entropy:
            return logprobs, None
        # Surprise of the others, e^(z - z_y)·..., and of the target, each from its own exact log-probability.
        log_rest = others - (target - logprobs)[:, None]
        return logprobs, -(log_rest.exp() * log_rest).sum(1) - logprobs.exp() * logprobs


def statistics_of_rows(work: HeadPass, hidden: torch.Tensor, *, want_entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropy (zeros where not wanted) of all rows, each [T]; no gradient."""
    logprobs = torch.zeros(hidden.shape[0], dtype=working_dtype(hidden), device=hidden.device)
    entropy = torch.zeros_like(logprobs)
    for rows in row_chunks(0, hidden.shape[0], max_rows=work.max_rows):
        found = row_statistics(work.block(rows, want_entropy=want_entropy, want_exp=False))
        logprobs[rows] = found.logprobs
        if found.entropy is not None:
            entropy[rows] = found.entropy
    return logprobs, entropy


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 (autograd passes arguments by position)
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        head: LMHead,
        want_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with full_precision(hidden):
            outputs = statistics_of_rows(TorchHeadPass(hidden, head, targets=targets), hidden, want_entropy=want_entropy)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.head, ctx.want_entropy = head, want_entropy
        if not want_entropy:
            ctx.mark_non_differentiable(outputs[1])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None, None, None]:
        hidden, weight, bias, targets = ctx.saved_tensors
        with full_precision(hidden):
            work = TorchHeadPass(hidden, ctx.head, targets=targets, wanted=ctx.needs_input_grad[:3], gated=not ctx.want_entropy)
            gradient = RowGradient(grad_logprobs, grad_entropy if ctx.want_entropy else None)
            for rows in row_chunks(0, hidden.shape[0], max_rows=work.max_rows):
                block = work.block(rows, want_entropy=ctx.want_entropy, want_exp=True)
                work.add(block, row_statistics(block), gradient.rows(rows.start, rows.stop))
            dhidden, dweight, dbias = work.gradients()
        return (
            dhidden,
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(bias.dtype),
            None,
            None,
            None,
        )


def _token_logprob_torch(
    hidden: torch.Tensor, head: LMHead, *, targets: torch.Tensor, want_entropy: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    outputs: tuple[torch.Tensor, torch.Tensor] = _TokenLogprob.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, targets, head, want_entropy
    )
    return outputs[0], outputs[1] if want_entropy else None


_IMPLEMENTATIONS = {"torch": Implementation(_token_logprob_torch)}


def token_logprob(
    hidden: torch.Tensor, head: LMHead, *, targets: torch.Tensor, want_entropy: bool = True, impl: Impl = "auto"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each row's target, and entropy, without logits of all rows.

    Args:
        hidden: float [T, H], final hidden states of the rows that predict the targets.
        head: how they become logits.
        targets: int64 [T].
        want_entropy: also return the entropy.
        impl: how it is computed.

    Returns:
        float32 (float64 for float64 rows) log-probabilities [T] and entropy [T] or ``None``, in nats, both differentiable with
        respect to ``hidden``, ``head.weight`` and ``head.bias``.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_rows(hidden, head, targets)
    run = resolve("token_logprob", _IMPLEMENTATIONS, impl=impl, like=hidden)
    return run(hidden, head, targets=targets, want_entropy=want_entropy)
