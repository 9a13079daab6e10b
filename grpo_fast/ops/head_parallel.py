"""Log-probabilities over a head whose vocabulary is spread over ranks (tensor parallel); logits of it all exist nowhere.

Rank r holds rows V_r of the head and sees the same hidden rows as every other. With its own logits ``z_v``, v in V_r, sums over
the ranks make what :func:`~grpo_fast.ops.head_pass.row_statistics` needs of a row:

    m = max_r max_v z_v,    S_o = Σ_r Σ_{v != y} e^{z_v - m},    Q_o = Σ_r Σ_{v != y} e^{z_v - m} (z_v - m),    z_y - m

and each rank makes the gradient of its own logits alone,

    dZ_v = g·(1[v = y] - p_v) - c·p_v·(log p_v + H),    d hidden = Σ_r dZ_r W_r,    d W_r = dZ_r^T hidden

Exchanged are 4 numbers a row forward and the sum of ``d hidden`` backward: 4·T·(4 + H) bytes beside 8 T·H·V/R FLOP a rank.
Rows are walked in chunks of ``LMHead.chunk_bytes`` of a rank's own logits, the largest part's where they differ; backward makes
them again. Logits and gradients of the head are float32 (float64 for float64 rows).

Where each rank has rows of its own, as under FSDP, :func:`gathered_token_logprob` brings them together first, T then being the
rows of all: H numbers a row more are exchanged, and none of the head.

Source: the vocabulary-parallel cross-entropy of Megatron-LM (arXiv 1909.08053, section 3), with entropy and tail added.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from grpo_fast.ops.first_derivative import once_differentiable
from grpo_fast.ops.head_pass import Block, RowStatistics, row_statistics
from grpo_fast.ops.lm_head import LMHead, check_rows, full_precision, row_chunks, rows_per_chunk, short_operands, working_dtype
from grpo_fast.ops.products import as_operand, mm_into, mm_of, with_gradient


class _Own(NamedTuple):
    """A chunk's logits in this rank's part of the vocabulary."""

    logits: torch.Tensor
    """[C, V/R]: z."""
    gate: torch.Tensor | float
    """dz / du."""
    column: torch.Tensor
    """[C, 1]: where the target is; 0 where it is another rank's."""
    mine: torch.Tensor
    """Bool [C, 1]: whether it is here."""


def _own(hidden: torch.Tensor, weight: torch.Tensor, head: LMHead, targets: torch.Tensor, first_token: int) -> _Own:
    """Logits of rows and a weight as they are multiplied."""
    u = mm_of(hidden, weight.T)
    work = u.dtype
    bias = head.finite_bias(work)
    if bias is not None:
        u += bias
    if head.rounds_logits:
        u = u.to(head.logits_dtype).to(work)
    gate: torch.Tensor | float = head.slope
    inner, outer, softcap, _ = head.numbers
    logits = u * inner
    if softcap:
        logits.tanh_()
        gate = (1 - logits.square()) * head.slope
        logits *= outer
    column = targets[:, None] - first_token
    mine = (column >= 0) & (column < logits.shape[1])
    return _Own(logits, gate, column.where(mine, 0), mine)


def _operands(hidden: torch.Tensor, head: LMHead) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and weight as they are multiplied."""
    short, work = short_operands(hidden, head), working_dtype(hidden)
    return as_operand(hidden.detach(), short, work), as_operand(head.weight.detach(), short, work)


def _statistics(own: _Own, rows: slice, group: dist.ProcessGroup | None) -> tuple[RowStatistics, Block]:
    reference = own.logits.amax(1)
    dist.all_reduce(reference, dist.ReduceOp.MAX, group=group)
    shifted = own.logits - reference[:, None]
    target = shifted.gather(1, own.column).where(own.mine, 0.0)[:, 0]
    exp = shifted.exp()
    exp = exp.scatter(1, own.column, exp.gather(1, own.column).masked_fill(own.mine, 0.0))
    sums = torch.stack([exp.sum(1), (exp * shifted).sum(1), target])
    dist.all_reduce(sums, group=group)
    block = Block(rows, None, reference, reference + sums[2], sums[0], sums[1])
    return row_statistics(block), block


class _ParallelLogprob(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 (autograd takes tensors apart)
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        head: LMHead,
        first_token: int,
        ranks: _Rows,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        group = ranks.group
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.head, ctx.first_token, ctx.ranks = head, first_token, ranks
        inputs, matrix = _operands(hidden, head)
        found = torch.empty(2, hidden.shape[0], dtype=working_dtype(hidden), device=hidden.device)
        for rows in row_chunks(0, hidden.shape[0], max_rows=ranks.max_rows):
            own = _own(inputs[rows], matrix, head, targets[rows], first_token)
            statistics, _ = _statistics(own, rows, group)
            assert statistics.entropy is not None
            found[0, rows], found[1, rows] = statistics.logprobs, statistics.entropy
        return found[0], found[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        hidden, weight, bias, targets = ctx.saved_tensors
        group, max_rows = ctx.ranks.group, ctx.ranks.max_rows
        work = working_dtype(hidden)
        dhidden = torch.zeros_like(hidden, dtype=work)
        dweight = torch.zeros_like(weight, dtype=work) if ctx.needs_input_grad[1] else None
        dbias = torch.zeros_like(bias, dtype=work) if bias is not None and ctx.needs_input_grad[2] else None
        inputs, matrix = _operands(hidden, ctx.head)
        with full_precision(hidden):
            for rows in row_chunks(0, hidden.shape[0], max_rows=max_rows):
                own = _own(inputs[rows], matrix, ctx.head, targets[rows], ctx.first_token)
                g, c = (gradient[rows, None].to(work) for gradient in gradients)
                du = _gradient(own, *_statistics(own, rows, group), g=g, c=c) * own.gate
                dhidden[rows] = mm_of(*with_gradient(du, matrix))
                if dweight is not None:
                    mm_into(*with_gradient(du.T, inputs[rows]), out=dweight, add=True)
                if dbias is not None:
                    dbias += du.sum(0)
        dist.all_reduce(dhidden, group=group)
        of_head = [None if made is None else made.to(given.dtype) for made, given in ((dweight, weight), (dbias, bias))]
        return dhidden.to(hidden.dtype), *of_head, None, None, None, None


def _gradient(own: _Own, statistics: RowStatistics, block: Block, *, g: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """[C, V/R]: dZ."""
    assert statistics.entropy is not None
    entropy, logprob = statistics.entropy[:, None], statistics.logprobs[:, None]
    surprise = own.logits - (block.reference + statistics.total.log())[:, None]
    dz = -surprise.exp() * (g + c * (surprise + entropy))
    # of the target from its own numbers: 1 - p_y keeps what p_y near 1 would round away
    target = g * (block.others / statistics.total)[:, None] - c * logprob.exp() * (logprob + entropy)
    return dz.scatter(1, own.column, target.where(own.mine, dz.gather(1, own.column)))


def _check(hidden: torch.Tensor, head: LMHead, targets: torch.Tensor, first_token: int) -> None:
    check_rows(hidden, head, targets)
    if first_token < 0:
        raise ValueError(f"first_token={first_token}; it is the number of a token, 0 or more")


def parallel_token_logprob(
    hidden: torch.Tensor,
    head: LMHead,
    *,
    targets: torch.Tensor,
    first_token: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of the chosen token, and entropy; with :func:`~grpo_fast.ops.policy_loss.policy_loss`, the whole loss.

    Every rank of the group has to call it, forward and backward, with the same rows.

    Args:
        hidden: float [T, H], the same on every rank.
        head: this rank's part: weight [V/R, H] and bias [V/R], parts of any size, in the order of the ranks.
        targets: int64 [T], tokens of the whole vocabulary; one outside it gets NaN.
        first_token: token of the part's first row.
        group: over which the vocabulary is spread; torch's default group without one.

    Returns:
        Log-probabilities and entropies, each [T], in nats, the same on every rank. Differentiable with respect to ``hidden``
        (the gradient is whole on every rank), and to this rank's ``weight`` and ``bias``.

    Raises:
        ValueError: shapes that do not fit, or ``first_token`` below 0.
        TypeError: targets are not int64.
    """
    _check(hidden, head, targets, first_token)
    return _of_every_row(hidden, head, targets, first_token, _Rows.of(hidden, head, first_token, group))


def _of_every_row(
    hidden: torch.Tensor, head: LMHead, targets: torch.Tensor, first_token: int, ranks: _Rows
) -> tuple[torch.Tensor, torch.Tensor]:
    with full_precision(hidden):
        found: tuple[torch.Tensor, torch.Tensor] = _ParallelLogprob.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, targets, head, first_token, ranks
        )
    outside = (targets < 0) | (targets >= ranks.vocabulary)  # no rank's: each would take it for another's
    return found[0].masked_fill(outside, math.nan), found[1].masked_fill(outside, math.nan)


class _Rows(NamedTuple):
    """Numbers that ranks tell each other before they begin."""

    counts: list[int]
    """How many each has."""
    own: slice
    """This rank's among those of all, one rank's below the other's."""
    max_rows: int
    """Of a chunk: as many as fit on every rank, whose parts of the head and devices may differ; all must cut alike."""
    vocabulary: int
    """Tokens of all parts."""
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, hidden: torch.Tensor, head: LMHead, first_token: int, group: dist.ProcessGroup | None) -> _Rows:
        num_rows, rank = hidden.shape[0], dist.get_rank(group)
        told = torch.zeros(3, dist.get_world_size(group), dtype=torch.int64, device=hidden.device)
        told[0, rank].fill_(num_rows)
        told[1, rank].fill_(rows_per_chunk(head, hidden.device, bytes_per_logit=working_dtype(hidden).itemsize))
        told[2, rank].fill_(first_token + head.weight.shape[0])
        dist.all_reduce(told, group=group)
        counts, limits, ends = told.tolist()
        first = sum(counts[:rank])
        return cls(counts, slice(first, first + num_rows), min(limits), max(ends), group)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [T_r, ...] of each rank, one rank's below the other's."""
        longest = max(self.counts)
        padded = torch.cat([rows, rows.new_zeros(longest - rows.shape[0], *rows.shape[1:])])
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])


class _Gather(torch.autograd.Function):
    """Rows of all ranks, whose gradient is whole on every rank."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, rows: _Rows) -> torch.Tensor:
        ctx.rows = rows
        return rows.gather(own.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0][ctx.rows.own], None


class _TakeOwn(torch.autograd.Function):
    """A rank's own rows, each of which has its gradient on that rank alone."""

    @staticmethod
    def forward(ctx: Any, every: torch.Tensor, rows: _Rows) -> torch.Tensor:
        ctx.rows = rows
        return every[rows.own]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return ctx.rows.gather(gradients[0]), None


def gathered_token_logprob(
    hidden: torch.Tensor,
    head: LMHead,
    *,
    targets: torch.Tensor,
    first_token: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`parallel_token_logprob` of rows that differ between ranks: each gets the log-probabilities of its own.

    Every rank of the group has to call it, forward and backward; how many rows it has is its own affair.

    Args:
        hidden: float [T_r, H], this rank's.
        head: this rank's part.
        targets: int64 [T_r].
        first_token: token of the part's first row.
        group: over which vocabulary and rows are spread.

    Returns:
        Log-probabilities and entropies, each [T_r], in nats. Gradients of ``weight`` and ``bias`` are those of all ranks' rows.

    Raises:
        ValueError: as :func:`parallel_token_logprob`.
    """
    _check(hidden, head, targets, first_token)
    rows = _Rows.of(hidden, head, first_token, group)
    every: torch.Tensor = _Gather.apply(hidden, rows)  # type: ignore[no-untyped-call]
    found = _of_every_row(every, head, rows.gather(targets), first_token, rows)
    own: torch.Tensor = _TakeOwn.apply(torch.stack(found, 1), rows)  # type: ignore[no-untyped-call]
    return own[:, 0], own[:, 1]
