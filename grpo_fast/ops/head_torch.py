"""The head in PyTorch operations, for every device and type: one matrix product, one pass over its result.

Logits of a chunk are made in float32 (float64 for float64 rows) in a buffer that all chunks share. Elementwise work goes over
it in blocks of rows that stay in cache, in place, so that the buffer is written once and read once more: 0.13 s of it
beside 1.2 s for one of three products at T = 2048, H = 576, V = 49,152 (one EPYC core, November 2026), entropy included.

    d hidden = -s ⊙ (E W),   d weight -= E^T (s ⊙ hidden),   d bias -= E^T s

with E's target column patched and s the row scales of :mod:`grpo_fast.ops.head_pass`. Every order of sums is fixed by the
sizes; logits and ``d hidden`` of a row do not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from grpo_fast.ops.head_pass import Block, RowGradient, RowStatistics, row_scales
from grpo_fast.ops.lm_head import LMHead, pad_rows, padded, rows_per_chunk, working_dtype
from grpo_fast.ops.products import add_outer, linear_into, mm, rounded_rows

CACHE_BYTES = 2**22
"""Blocks of a quarter of it are no faster, and threads wait for each other four times as often."""
_LIVE_SHARE = 0.85
"""Share of live rows from which it no longer pays to copy them together before the gradient's products."""


def block_rows(num_rows: int, *, max_rows: int, device: torch.device) -> int:
    """How many rows a block holds and multiplies, with zeros below.

    Args:
        num_rows: of them real, or more than fit into one block.
        max_rows: what :func:`~grpo_fast.ops.lm_head.rows_per_chunk` says.
        device: where they lie.
    """
    return min(max_rows, rounded_rows(padded(num_rows), device))


class TorchHeadPass:
    """See :class:`~grpo_fast.ops.head_pass.HeadPass`.

    Args:
        hidden: float [T, H].
        head: the head; its tensors are cast once.
        targets: int64 [T].
        wanted: which of hidden, weight and bias need a gradient.
        gated: whether a softcap's derivative goes into E: when the entropy sends no gradient.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        head: LMHead,
        *,
        targets: torch.Tensor,
        wanted: tuple[bool, bool, bool] = (False, False, False),
        gated: bool = True,
    ) -> None:
        work = working_dtype(hidden)
        self.max_rows = rows_per_chunk(head, hidden.device, bytes_per_logit=work.itemsize)
        self._hidden, self._targets, self._head, self._wanted, self._gated = hidden.detach(), targets, head, wanted, gated
        self._work, self._operand_dtype = work, head.operand_dtype
        self._weight = self._operand(head.weight.detach())
        bias = head.finite_bias(work)
        self._bias = None if bias is None else bias.detach()
        rows = self._height(hidden.shape[0])
        self._exp = torch.empty(rows, head.weight.shape[0], dtype=work, device=hidden.device)
        self._cache_rows = max(2, CACHE_BYTES // max(1, self._exp[:1].nbytes) // 2 * 2)
        self._scratch = [torch.empty_like(self._exp[: self._cache_rows])]
        if head.softcap is not None:
            self._scratch.append(torch.empty_like(self._scratch[0]))
        self._dhidden = hidden.new_empty(hidden.shape) if wanted[0] else None
        self._dweight: torch.Tensor | None = None
        self._dbias: torch.Tensor | None = None

    def block(self, rows: slice, *, want_entropy: bool, want_exp: bool) -> Block:
        """See :class:`~grpo_fast.ops.head_pass.HeadPass`."""
        count = rows.stop - rows.start
        inputs = self._padded(self._operand(self._hidden[rows]))
        targets = self._padded(self._targets[rows])
        exp = self._exp[: inputs.shape[0]]
        linear_into(inputs, self._weight, out=exp)
        per_row = torch.empty(4, inputs.shape[0], dtype=exp.dtype, device=exp.device)
        for part in self._cache_blocks(inputs.shape[0]):
            self._one_cache_block(exp[part], targets[part, None], per_row[:, part], want_entropy=want_entropy)
        reference, target_logits, others, weighted = per_row[:, :count]
        return Block(rows, exp if want_exp else None, reference, target_logits, others, weighted if want_entropy else None)

    def _one_cache_block(self, z: torch.Tensor, targets: torch.Tensor, per_row: torch.Tensor, *, want_entropy: bool) -> None:
        """Turns rows of ``h W^T`` into rows of E, in place."""
        head, gate = self._head, None
        if self._bias is not None:
            z.add_(self._bias)
        if head.rounds_logits:
            z.copy_(z.to(head.logits_dtype))
        if head.softcap is not None:
            z.mul_(head.logit_scale / head.softcap).tanh_()
            gate = torch.square(z, out=self._scratch[1][: z.shape[0]]).neg_().add_(1.0)
            z.mul_(head.softcap)
        elif head.logit_scale != 1:
            z.mul_(head.logit_scale)
        if head.temperature != 1:
            z.div_(head.temperature)
        target, reference = z.gather(1, targets), z.amax(1, keepdim=True)
        shifted = torch.sub(z, reference, out=self._scratch[0][: z.shape[0]])
        torch.exp(shifted, out=z).scatter_(1, targets, 0.0)
        per_row[0], per_row[1], per_row[2] = reference[:, 0], target[:, 0], z.sum(1)
        if want_entropy:
            per_row[3] = shifted.mul_(z).sum(1)
        if gate is not None and self._gated:
            z.mul_(gate)

    def add(self, block: Block, statistics: RowStatistics, gradient: RowGradient) -> None:
        """See :class:`~grpo_fast.ops.head_pass.HeadPass`."""
        assert block.exp is not None
        head, count = self._head, len(block.others)
        exp, targets, rows = block.exp, self._targets[block.rows], self._hidden[block.rows]
        scales = row_scales(block, statistics, gradient, slope=head.slope, bound=head.bound)
        if gradient.entropy is not None:
            self._add_entropy(exp, block, statistics, gradient)
        exp[:count].scatter_(1, targets[:, None], scales.patch[:, None])
        negative = -scales.others
        live = gradient.live()
        num_live = int(torch.count_nonzero(live))
        # A dead row that is not finite (a masked one, say) must not come in as 0·NaN.
        if num_live < _LIVE_SHARE * count or not bool(statistics.telling()[~live].isfinite().all()):
            index = live.nonzero()[:, 0]
            self._add_products(block.rows, self._padded(exp[index]), rows[index], negative[index], index=index)
        else:
            self._add_products(block.rows, exp, rows, negative)

    def _add_products(
        self,
        rows: slice,
        exp: torch.Tensor,
        inputs: torch.Tensor,
        scales: torch.Tensor,
        *,
        index: torch.Tensor | None = None,
    ) -> None:
        """The last two matrix products, of all rows of a block or of those that ``index`` picks."""
        count = len(scales)
        if self._dhidden is not None:
            found = self._dhidden[rows]
            part = mm(exp, self._weight)[:count].mul_(scales[:, None]).to(found.dtype)
            _ = found.copy_(part) if index is None else found.zero_().index_copy_(0, index, part)
        if self._wanted[1] and count:
            scaled = self._padded(self._operand(inputs) * scales[:, None])
            self._dweight = add_outer(self._dweight, exp[: len(scaled)], scaled)
        if self._wanted[2] and count:
            scaled = self._padded(scales[:, None])
            self._dbias = add_outer(self._dbias, exp[: len(scaled)], scaled)

    def _operand(self, values: torch.Tensor) -> torch.Tensor:
        """Hidden rows or weight as they are multiplied, in the type of the work."""
        return values.to(self._operand_dtype or self._work).to(self._work)

    def _height(self, count: int) -> int:
        """Rows that are multiplied for so many."""
        return block_rows(count, max_rows=self.max_rows, device=self._hidden.device)

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of a block, or a value for each, with zeros below."""
        return pad_rows(rows, self._height(len(rows)))

    def _add_entropy(self, exp: torch.Tensor, block: Block, statistics: RowStatistics, gradient: RowGradient) -> None:
        assert gradient.entropy is not None
        assert statistics.entropy is not None
        head = self._head
        shift = statistics.entropy - statistics.log_total
        tiny = torch.finfo(exp.dtype).tiny
        for part in self._cache_blocks(len(block.others)):
            values = exp[part]
            log = torch.clamp(values, min=tiny, out=self._scratch[0][: len(values)]).log_()
            if head.bound is not None:
                gate = torch.add(log, block.reference[part, None], out=self._scratch[1][: len(values)])
                gate.div_(head.bound).square_().neg_().add_(1.0)
                values.mul_(gate)
            log.add_(shift[part, None]).mul_(gradient.entropy[part, None]).add_(gradient.logprobs[part, None])
            values.mul_(log)

    def gradients(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """See :class:`~grpo_fast.ops.head_pass.HeadPass`."""
        weight, bias = self._dweight, self._dbias
        if self._wanted[1] and weight is None:
            weight = torch.zeros_like(self._weight)
        if self._wanted[2] and bias is None:
            bias = self._weight.new_zeros(self._weight.shape[0], 1)
        return self._dhidden, weight, None if bias is None else bias[:, 0]

    def _cache_blocks(self, num_rows: int) -> Iterator[slice]:
        for start in range(0, num_rows, self._cache_rows):
            yield slice(start, min(start + self._cache_rows, num_rows))
