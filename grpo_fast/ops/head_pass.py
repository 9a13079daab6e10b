"""One chunk of C rows against the head: what every implementation makes, and the row-wise formulas on top of it.

With ``z`` the logits of a row, ``y`` its target and ``ref`` any number near the larger logits (the largest one, ``z_y``,
whatever is cheaper to know), an implementation makes in one pass

    E_v = e^{z_v - ref} for v != y, 0 for v = y,    S_o = Σ_{v != y} E_v,    Q_o = Σ_{v != y} E_v (z_v - ref)

and everything else follows from numbers per row, with ``e = e^{z_y - ref}`` and ``S = S_o + e``:

    logp = -log(1 + S_o / e)          H = log S - (Q_o + e (z_y - ref)) / S          1 - p_y = S_o / S

(``logp = z_y - ref - log S`` for e < S_o, where e may be 0), so that a confident token keeps its tail: for p_y = 1 - 1e-12,
log-softmax in float32 would say 0 and send no gradient. The gradient of the logits is the same block again, scaled row by row:

    dZ_v = -(g / S) E_v                                       g = dL/dlogp
    dZ_v = -(1 / S) E_v (g + c (log E_v - log S + H))          with c = dL/dH
    dZ_y = g (1 - p_y) - c p_y (logp + H)

A softcap's derivative is multiplied into E when it is stored (sums use the plain values); where the entropy sends a gradient, E
stays plain and the derivative is taken from ``log E``.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from grpo_fast.ops.lm_head import LMHead


class Block(NamedTuple):
    """Results of an implementation for C rows; float32 (float64 for float64 rows) except ``exp``."""

    rows: slice
    """Which of the T rows."""
    exp: torch.Tensor | None
    """[C or more, V or more]: E, also of padding; ``None`` where no gradient is wanted."""
    reference: torch.Tensor
    """[C]: ref."""
    target_logits: torch.Tensor
    """[C]: z_y."""
    others: torch.Tensor
    """[C]: S_o."""
    weighted: torch.Tensor | None
    """[C]: Q_o; ``None`` where no entropy is wanted."""
    peak: torch.Tensor | None = None
    """[C]: the largest logit, where ``weighted`` is Σ E_v (z_v - peak) instead: the entropy is then no difference of numbers as
    large as peak - ref."""


class RowStatistics(NamedTuple):
    """Statistics of a block's rows, each [C]."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    target_exp: torch.Tensor
    """e."""
    total: torch.Tensor
    """S."""
    log_total: torch.Tensor
    """log S."""

    def telling(self) -> torch.Tensor:
        """[C]: a number that is finite only where all of its row are, E and its scales included."""
        return self.logprobs if self.entropy is None else self.entropy


class RowGradient(NamedTuple):
    """Gradients of the loss with respect to the rows' outputs."""

    logprobs: torch.Tensor
    """[C]: g."""
    entropy: torch.Tensor | None = None
    """[C]: c; ``None`` where no entropy is in the loss."""

    def rows(self, start: int, stop: int) -> RowGradient:
        """The gradients of some of the rows."""
        return RowGradient(self.logprobs[start:stop], None if self.entropy is None else self.entropy[start:stop])

    def live(self) -> torch.Tensor:
        """Bool [C]: rows that anything reaches; NaN counts."""
        return self.logprobs != 0 if self.entropy is None else (self.logprobs != 0) | (self.entropy != 0)


class RowScales(NamedTuple):
    """How a block becomes the gradient of ``u = h W^T + b``, each [C]."""

    others: torch.Tensor
    """Multiplies E (after the entropy's pass over it) to give dZ of every token but the target, up to the sign."""
    target: torch.Tensor
    """dZ of the target."""
    patch: torch.Tensor
    """Value written to E in the target's column, so that ``-others·E`` is the whole of dZ."""


class HeadPass(Protocol):
    """An implementation, bound to the rows and the head of one call; gradients gather in it."""

    max_rows: int
    """Most rows of a block."""

    def block(self, rows: slice, *, want_entropy: bool, want_exp: bool) -> Block:
        """Makes the logits of some rows and what is needed of them. A new block may overwrite the last one's ``exp``."""
        ...

    def add(self, block: Block, statistics: RowStatistics, gradient: RowGradient) -> None:
        """Adds a block's part to the gradients. Overwrites its ``exp``."""
        ...

    def gradients(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gradients of hidden rows, weight and bias; ``None`` for one that was not wanted."""
        ...


class HeadPassFactory(Protocol):
    """How a driver makes the pass of a call: the class of an implementation."""

    def __call__(
        self,
        hidden: torch.Tensor,
        head: LMHead,
        *,
        targets: torch.Tensor,
        wanted: tuple[bool, bool, bool] = ...,
        gated: bool = ...,
    ) -> HeadPass:
        """``wanted``: gradients of hidden, weight, bias. ``gated``: a softcap's derivative goes into E when it is stored."""
        ...


def row_statistics(block: Block) -> RowStatistics:
    """Log-probabilities and entropy of a block, in nats."""
    offset = block.target_logits - block.reference
    target_exp = offset.exp()
    total = block.others + target_exp
    # log1p keeps a tail that S would round away; a target without half the mass has none.
    confident, tail = block.others <= target_exp, torch.log1p(block.others / target_exp)
    log_total = torch.log(total)
    logprobs = torch.where(confident, -tail, offset - log_total)
    log_total = torch.where(confident, offset + tail, log_total)
    entropy = None
    if block.weighted is not None:
        peak, log_share = block.peak, log_total
        if peak is None:
            peak = block.reference
        else:
            below = block.reference - peak
            log_share = torch.where(confident, log_total + below, torch.log(total * below.exp()))
        entropy = log_share - (block.weighted + target_exp * (block.target_logits - peak)) / total
    return RowStatistics(logprobs, entropy, target_exp, total, log_total)


def row_scales(
    block: Block, statistics: RowStatistics, gradient: RowGradient, *, slope: float, bound: float | None
) -> RowScales:
    """The three vectors that turn a block into dU.

    Args:
        block: of C rows.
        statistics: its own.
        gradient: of the C rows.
        slope: ``scale / temperature``.
        bound: of z under a softcap.
    """
    slopes = slope / statistics.total
    if gradient.entropy is None:
        others, patch = gradient.logprobs * slopes, -block.others
        target = others * block.others
    else:
        assert statistics.entropy is not None
        inner = gradient.entropy * statistics.target_exp * (statistics.logprobs + statistics.entropy)
        others, patch = slopes, inner - gradient.logprobs * block.others
        target = -slopes * patch
    if bound is not None:
        gate = 1 - (block.target_logits / bound).square()
        target, patch = target * gate, patch * gate
    return RowScales(others, target, patch)
