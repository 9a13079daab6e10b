"""Log-probability of the chosen token, and entropy, from hidden states; logits of all rows never live at once.

For row t of ``hidden`` [T, H] with target ``y_t`` and logits ``z`` of the head (:mod:`grpo_fast.ops.lm_head`):

    logp_t = z_y - log Σ_v e^{z_v}             nats
    H_t    = -Σ_v p_v log p_v,  p = softmax(z)

    dL/dz_v = g_t·(1[v = y] - p_v) - c_t·p_v·(log p_v + H_t),   g = dL/dlogp, c = dL/dH

Rows are walked in chunks of ``LMHead.chunk_bytes`` of logits. Forward keeps two numbers a row (2 T·H·V FLOP); backward makes
each chunk's logits again (8 T·H·V in all). Logits, ``d weight`` and ``d bias`` are float32 (float64 for float64 inputs)
whatever the type of hidden states and weight, also under autocast and where both are rounded to ``operand_dtype``: bfloat16
logits are wrong by 0.02 nat in the mean at a vocabulary of 151,936. The order of every sum is fixed by the sizes, so a repeated
call is bitwise the same, and the same bits come out of :func:`~grpo_fast.ops.fused_grpo.fused_grpo`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from grpo_fast.ops.dispatch import Impl, Implementation, resolve, triton_kernels
from grpo_fast.ops.first_derivative import once_differentiable
from grpo_fast.ops.head_pass import HeadPass, HeadPassFactory, RowGradient, row_statistics
from grpo_fast.ops.head_torch import TorchHeadPass
from grpo_fast.ops.head_triton import TritonHeadPass
from grpo_fast.ops.lm_head import LMHead, check_rows, check_targets, full_precision, head_options, row_chunks, working_dtype

HEAD_PASSES: Mapping[str, HeadPassFactory] = {"triton": TritonHeadPass, "torch": TorchHeadPass}
"""The passes that make the blocks of a call, by the name of the implementation."""


def token_logprob_reference(
    hidden: torch.Tensor, head: LMHead, *, targets: torch.Tensor, want_entropy: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The specification of :func:`token_logprob`, in plain differentiable PyTorch, all rows at once.

    ``logp = -log(1 + e^a)`` with ``a`` the log-sum-exp of the *other* logits over the target's keeps the tail of a confident
    token, and its gradient, which ``z_y - logsumexp(z)`` rounds to 0.
    """
    work = working_dtype(hidden)
    with full_precision(hidden):
        logits = head.operand(hidden).to(work) @ head.operand(head.weight).to(work).T
        bias = head.finite_bias(work)
        logits = head.logits_of(logits if bias is None else logits + bias)
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


def _token_logprob_of_rows(  # noqa: PLR0913, PLR0917
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
    want_entropy: bool,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    head = LMHead(weight, bias, temperature, softcap, logit_scale, logits_dtype, operand_dtype, chunk_bytes)
    with full_precision(hidden):
        return statistics_of_rows(HEAD_PASSES[name](hidden, head, targets=targets), hidden, want_entropy=want_entropy)


def _token_logprob_gradients(  # noqa: PLR0913, PLR0917
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
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
    wanted: list[bool],
    name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden rows, weight and bias in their own types; one that is not wanted is empty."""
    head = LMHead(weight, bias, temperature, softcap, logit_scale, logits_dtype, operand_dtype, chunk_bytes)
    gradient = RowGradient(grad_logprobs, grad_entropy)
    with full_precision(hidden):
        work = HEAD_PASSES[name](
            hidden, head, targets=targets, wanted=(wanted[0], wanted[1], wanted[2]), gated=grad_entropy is None
        )
        for rows in row_chunks(0, hidden.shape[0], max_rows=work.max_rows):
            block = work.block(rows, want_entropy=grad_entropy is not None, want_exp=True)
            work.add(block, row_statistics(block), gradient.rows(rows.start, rows.stop))
        found = work.gradients()
    like = (hidden, weight, weight if bias is None else bias)
    dhidden, dweight, dbias = (
        own.new_empty(0) if value is None else value.to(own.dtype) for value, own in zip(found, like, strict=True)
    )
    return dhidden, dweight, dbias


_token_logprob_fwd = torch.library.custom_op("grpo_fast::token_logprob_fwd", _token_logprob_of_rows, mutates_args=())
_token_logprob_bwd = torch.library.custom_op("grpo_fast::token_logprob_bwd", _token_logprob_gradients, mutates_args=())


@_token_logprob_fwd.register_fake
def _(hidden: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = hidden.new_empty(hidden.shape[0], dtype=working_dtype(hidden))
    return logprobs, torch.empty_like(logprobs)


@_token_logprob_bwd.register_fake
def _(
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    like = (hidden, weight, weight if bias is None else bias)
    return tuple(own.new_empty(own.shape if wanted else 0) for own, wanted in zip(like, rest[-2], strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options, want_entropy, ctx.name = inputs[4:10], *inputs[10:]
    ctx.set_materialize_grads(False)
    if not want_entropy:
        ctx.mark_non_differentiable(output[1])


@once_differentiable
def _backward(
    ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    nothing = (None,) * 9
    if grad_logprobs is None:
        if grad_entropy is None:
            return (None, None, None, *nothing)
        grad_logprobs = torch.zeros_like(grad_entropy)
    wanted = list(ctx.needs_input_grad[:3])
    found = _token_logprob_bwd(grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.options, wanted, ctx.name)
    gradients = (value if asked else None for value, asked in zip(found, wanted, strict=True))
    return (*gradients, *nothing)


_token_logprob_fwd.register_autograd(_backward, setup_context=_setup_context)


def _by(name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def run(
        hidden: torch.Tensor, head: LMHead, *, targets: torch.Tensor, want_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        options = head_options(head)
        logprobs, entropy = _token_logprob_fwd(hidden, head.weight, head.bias, targets, *options, want_entropy, name)
        return logprobs, entropy if want_entropy else None

    return run


_IMPLEMENTATIONS = {"triton": triton_kernels(_by("triton")), "torch": Implementation(_by("torch"))}


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
        ValueError: shapes or devices that do not fit. A target outside the vocabulary is an error on the CPU, and NaN by
            kernels, which nothing waits for.
        TypeError: targets are not int64, or ``head`` is a layer.
        RuntimeError: a second derivative is asked for.
    """
    check_rows(hidden, head, targets)
    check_targets(hidden, head, targets)
    run = resolve("token_logprob", _IMPLEMENTATIONS, impl=impl, like=hidden)
    return run(hidden, head, targets=targets, want_entropy=want_entropy)
