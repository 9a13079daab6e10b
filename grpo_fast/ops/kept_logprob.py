"""Log-probability of the chosen token among the tokens that its sampler kept, and entropy, without logits of the others.

With ``K_t`` the kept tokens of row t, ``y_t`` the drawn one and ``z`` the logits of the head (:mod:`grpo_fast.ops.lm_head`):

    logp_t = z_y - log Σ_{v in K_t} e^{z_v}       nats
    H_t    = -Σ_{v in K_t} p_v log p_v,           p the softmax over K_t

    dL/dz_v = g_t·(1[v = y] - p_v) - c_t·p_v·(log p_v + H_t) for v in K_t, otherwise 0;   g = dL/dlogp, c = dL/dH

Rows are walked in chunks, narrow supports first. A chunk of C rows copies the U head rows that any of its supports names and
makes a product of [C, H] and [H, U], of which each row reads its own places: products are fast where gathering K head rows for
every row would move C·K·H numbers, and supports of one text share tokens. Where U is more than a quarter of the vocabulary, the
head is taken as it is. So 2 T·U·H FLOP forward and 6 T·U·H backward, which makes a chunk's logits again; U is at most C·K.

Logits and ``d weight`` are float32 (float64 for float64 rows). No sum depends on the order of atomics: the head rows of a chunk
are distinct.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from grpo_fast.ops.first_derivative import once_differentiable
from grpo_fast.ops.lm_head import (
    LMHead,
    check_rows,
    full_precision,
    head_options,
    row_chunks,
    rows_per_chunk,
    short_operands,
    working_dtype,
)
from grpo_fast.ops.products import as_operand, mm_of, with_gradient

_ROWS = {"cpu": 32, "cuda": 512}
"""Rows of a chunk: more of them share head rows, and make products of rows with other rows' tokens."""
_DENSE_SHARE = 4
"""The head is not copied where more than one in so many of its rows would be."""


class Kept(NamedTuple):
    """The kept tokens of T rows, one row after the other; each row begins with the drawn token."""

    token_ids: torch.Tensor
    """int64 [M]: where the head is; none twice within a row."""
    sizes: torch.Tensor
    """int64 [T], on the CPU: how many each row has, at least 1 and M together."""


def kept_chunk_bytes(  # noqa: PLR0913
    vocabulary: int, hidden: int, *, num_kept: int, kind: str, copied: bool, trained: bool, itemsize: int = 4
) -> int:
    """Memory that a chunk takes at most in backward, beside the gradients of all rows and of the head, in bytes.

    That is logits of its rows for the U head rows that they name, with their gradient; these head rows, while those of the next
    chunk are read; and a part of the head's gradient.

    Args:
        vocabulary: V.
        hidden: H.
        num_kept: the widest support.
        kind: "cuda" or "cpu".
        copied: whether the head is of another type than it is multiplied in.
        trained: whether it has a gradient.
        itemsize: bytes of a number as it is multiplied.
    """
    rows = _ROWS.get(kind, _ROWS["cpu"])
    named, of_row = rows * num_kept, 2 * itemsize + 4 * trained
    if named * _DENSE_SHARE > vocabulary:
        named, of_row = vocabulary, max(2 * itemsize, itemsize + 4 * trained) if copied else 4 * trained
    return named * (of_row * hidden + 8 * rows)


class _Chunk(NamedTuple):
    """C rows against the head rows that they name."""

    rows: torch.Tensor
    """int64 [C]: which of the T rows."""
    hidden: torch.Tensor
    """[C, H]."""
    tokens: torch.Tensor | None
    """int64 [U], distinct; ``None`` for the whole vocabulary."""
    weight: torch.Tensor
    """[U, H]."""
    place: torch.Tensor
    """int64 [C, K]: column of each kept token among U; that of the drawn one where a row has fewer than K."""
    logits: torch.Tensor
    """[C, K]; minus infinity where a row has fewer."""


def kept_logprob_reference(hidden: torch.Tensor, head: LMHead, *, kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of :func:`kept_logprob`, in plain differentiable PyTorch: full logits, all others masked."""
    work = working_dtype(hidden)
    with full_precision(hidden):
        every = head.operand(hidden).to(work) @ head.operand(head.weight).to(work).T
        bias = head.finite_bias(work)
        every = head.logits_of(every if bias is None else every + bias)
        sizes = kept.sizes.to(hidden.device)
        inside = torch.zeros_like(every, dtype=torch.bool)
        inside[torch.repeat_interleave(torch.arange(len(sizes), device=hidden.device), sizes), kept.token_ids] = True
        logprobs = every.masked_fill(~inside, -torch.inf).log_softmax(1)
        entropy = -(logprobs.exp() * logprobs.masked_fill(~inside, 0.0)).sum(1)
        return logprobs.gather(1, kept.token_ids[sizes.cumsum(0) - sizes, None])[:, 0], entropy


def _chunks(hidden: torch.Tensor, head: LMHead, kept: Kept) -> Iterator[_Chunk]:
    work, short, device = working_dtype(hidden), short_operands(hidden, head), hidden.device
    bias = head.finite_bias(work)
    order = torch.argsort(kept.sizes, stable=True)
    widths, starts = kept.sizes[order], (kept.sizes.cumsum(0) - kept.sizes)[order]
    most = min(_ROWS.get(device.type, _ROWS["cpu"]), rows_per_chunk(head, device, bytes_per_logit=work.itemsize))
    for part in row_chunks(0, len(order), max_rows=most):
        column = torch.arange(int(widths[part.stop - 1]))
        missing = column >= widths[part, None]
        ids = kept.token_ids[torch.where(missing, 0, column).add_(starts[part, None]).to(device)]
        tokens, place = torch.unique(ids, return_inverse=True)
        rows = order[part].to(device)
        chosen: torch.Tensor | None = tokens
        if len(tokens) * _DENSE_SHARE > len(head.weight):
            chosen, place = None, ids
        weight = as_operand((head.weight if chosen is None else head.weight[chosen]).detach(), short, work)
        inputs = as_operand(hidden[rows].detach(), short, work)
        logits = mm_of(inputs, weight.T).gather(1, place)
        if bias is not None:
            logits += bias.detach()[ids]
        logits = head.logits_of(logits).masked_fill_(missing.to(device), -torch.inf)
        yield _Chunk(rows, inputs, chosen, weight, place, logits)


def _statistics(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities [C, K] of all kept tokens, with 0 for those that are none, the same as probabilities, and entropy [C].

    ``logp = -log(1 + e^a)`` of the drawn token, with ``a`` the log-sum-exp of the *others* over it, keeps the tail of a
    confident one.
    """
    others = logits.clone()
    others[:, 0] = -torch.inf
    rest = others.logsumexp(1)
    odds = rest - logits[:, 0]
    logprobs = logits - torch.logaddexp(rest, logits[:, 0])[:, None]
    logprobs[:, 0] = -torch.logaddexp(odds, torch.zeros_like(odds))
    probs = logprobs.exp()
    logprobs = logprobs.masked_fill_(logits == -torch.inf, 0.0)
    return logprobs, probs, -(probs * logprobs).sum(1)


class _KeptLogprob(torch.autograd.Function):
    """Keeps nothing of a chunk: backward makes it again."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        options: tuple[Any, ...],
        token_ids: torch.Tensor,
        sizes: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(hidden, weight, bias, token_ids, sizes)
        ctx.options = options
        logprobs = torch.zeros(len(hidden), dtype=working_dtype(hidden), device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        with full_precision(hidden):
            for chunk in _chunks(hidden, LMHead(weight, bias, *options), Kept(token_ids, sizes)):
                found, _, entropy[chunk.rows] = _statistics(chunk.logits)
                logprobs[chunk.rows] = found[:, 0]
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, *kept = ctx.saved_tensors
        head, work = LMHead(weight, bias, *ctx.options), working_dtype(hidden)
        wanted = ctx.needs_input_grad[:3]
        dhidden, dweight, dbias = (
            torch.zeros_like(value, dtype=work) if asked else None
            for value, asked in zip((hidden, weight, bias), wanted, strict=True)
        )
        with full_precision(hidden):
            for chunk in _chunks(hidden, head, Kept(*kept)):
                slopes = _slopes(chunk, head, grad_logprobs[chunk.rows], grad_entropy[chunk.rows])
                # places of rows with fewer tokens point at the drawn one and add 0
                dense = slopes.new_zeros(len(slopes), len(chunk.weight)).scatter_add_(1, chunk.place, slopes)
                if dhidden is not None:
                    dhidden[chunk.rows] = mm_of(*with_gradient(dense, chunk.weight))
                for gradient, inputs in ((dweight, chunk.hidden), (dbias, None)):
                    if gradient is not None:
                        # the part has no name, under which it would stay while the next one is made
                        gradient[... if chunk.tokens is None else chunk.tokens] += (
                            dense.sum(0) if inputs is None else mm_of(*with_gradient(dense.T, inputs))
                        )
        found = zip((dhidden, dweight, dbias), (hidden, weight, bias), strict=True)
        return (*(None if value is None else value.to(own.dtype) for value, own in found), None, None, None)


def _slopes(chunk: _Chunk, head: LMHead, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor) -> torch.Tensor:
    """Derivative of the loss by ``h W^T + b``, [C, K]."""
    logprobs, probs, entropy = _statistics(chunk.logits)
    slopes = -grad_logprobs[:, None] * probs
    slopes[:, 0] = grad_logprobs * -torch.expm1(logprobs[:, 0])
    slopes -= grad_entropy[:, None] * probs * (logprobs + entropy[:, None])
    if head.bound is not None:
        inside = chunk.logits.masked_fill(chunk.logits == -torch.inf, 0.0)
        slopes *= 1 - (inside / head.bound).square()
    return slopes.mul_(head.slope)


def kept_logprob(hidden: torch.Tensor, head: LMHead, *, kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each row's drawn token among the tokens kept for it, and entropy, without logits of all tokens.

    Args:
        hidden: float [T, H], final hidden states of the rows that predict the drawn tokens.
        head: how they become logits.
        kept: what the sampler drew from; the drawn token of each row first.

    Returns:
        float32 (float64 for float64 rows) log-probabilities [T] and entropy [T], in nats, both differentiable with respect to
        ``hidden``, ``head.weight`` and ``head.bias``.

    Raises:
        ValueError: shapes that do not fit, or a row without a token.
        TypeError: sizes are not int64.
    """
    check_rows(hidden, head, kept.sizes, name="sizes")
    if kept.sizes.device.type != "cpu" or int(kept.sizes.sum()) != len(kept.token_ids) or bool((kept.sizes < 1).any()):
        raise ValueError(
            f"sizes must be on the CPU, each at least 1, and sum to len(token_ids)={len(kept.token_ids)}; they are on "
            f"{kept.sizes.device}, the smallest is {int(kept.sizes.min()) if len(kept.sizes) else 1}, and they sum to "
            f"{int(kept.sizes.sum())}"
        )
    found = _KeptLogprob.apply(hidden, head.weight, head.bias, head_options(head), kept.token_ids, kept.sizes)  # type: ignore[no-untyped-call]
    logprobs, entropy = found
    return logprobs, entropy
