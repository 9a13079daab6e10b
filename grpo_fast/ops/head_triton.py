"""The head by cuBLAS and Triton: a product, one kernel over its rows, and two products more for the gradients.

Logits of a part of a chunk are made in float32 (bfloat16 where they are rounded to that anyway) in a scratch of an eighth of
the chunk's rows; a kernel reads them once and writes E for the whole chunk, bfloat16 for bfloat16 inputs and otherwise
float32. Then, with s the row scales of :mod:`grpo_fast.ops.head_pass`,

    d hidden = t ⊙ W_y - s ⊙ (E W),   d weight -= E^T (s ⊙ hidden),   d bias -= E^T s

where E lacks the target's column in the first product, whose part is added in float32, and holds it in the others. ``E W``,
``d weight`` and ``d bias`` are float32; cuBLAS adds a chunk's part to ``d weight`` while it stores it.

Bytes of device memory a logit, for bfloat16 inputs: 4 written and read once as logits, 2 written as E and read by each product.

Where the table of :mod:`grpo_fast.ops.head_shapes` says so, E and the numbers of its rows come out of the first product itself
(:mod:`grpo_fast.ops.head_exp`, tier 2), without logits; everything after that is the same.

Sizes of products are the host's to know, so rows that turn out dead cannot leave them without waiting for the device; here
they keep their place with scale 0, and nothing waits. Rows known to be dead beforehand belong to
:mod:`grpo_fast.ops.row_plan`.

float32 products never use TensorFloat-32, whatever is set for the process. Of float16 inputs, E and ``s ⊙ hidden`` have more
range than their type: those products take float32 operands, TensorFloat-32 allowed, which keeps every bit of a float16.

Kernels fix the order of their sums by V and H. cuBLAS may choose another for another number of rows; a chunk's rows are padded
to a multiple of 8, and the same sizes give the same bits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from grpo_fast.ops.head_exp import head_exp_block
from grpo_fast.ops.head_pass import Block, RowGradient, RowScales, RowStatistics, row_scales, row_statistics
from grpo_fast.ops.head_shapes import Choice, Key, choose
from grpo_fast.ops.head_triton_kernels import (
    MOST_OVER_TARGET,
    _head_bias_bwd_kernel,
    _head_entropy_bwd_kernel,
    _head_rows_bwd_kernel,
    _head_rows_fwd_kernel,
)
from grpo_fast.ops.jit import target
from grpo_fast.ops.lm_head import ROW_MULTIPLE, TILE_ROWS, LMHead, pad_rows, padded, row_chunks, rows_per_chunk
from grpo_fast.ops.products import mm_into

_PITCH = 16
"""Rows of E and of logits begin at multiples of so many entries: whole vectors, for kernels and for cuBLAS."""
_PARTS = 8
"""Parts of a chunk whose logits live at once."""
_BLOCK = 1024
"""Columns of a step along a row: with 2,048, ptxas 12.8 spills one register to fit more programs."""
_BIAS_TILE = (16, 256)
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


class ChunkShape(NamedTuple):
    """How rows are cut."""

    max_rows: int
    """Rows of E that live at once."""
    logit_rows: int
    """Rows of logits that live at once."""


def _chunk_shape(head: LMHead, device: torch.device, *, bytes_per_exp: int) -> ChunkShape:
    """Divides the head's ``chunk_bytes`` between E and an eighth as many rows of float32 logits."""
    rows = rows_per_chunk(head, device, bytes_per_logit=bytes_per_exp + 4 / _PARTS)
    multiple = TILE_ROWS if rows >= _PARTS * TILE_ROWS else ROW_MULTIPLE
    return ChunkShape(rows, max(1, rows // (_PARTS * multiple)) * multiple)


class TritonHeadPass:
    """See :class:`~grpo_fast.ops.head_pass.HeadPass`.

    Args:
        hidden: float [T, H], not float64.
        head: the head. Hidden rows and weight of different types are multiplied in the wider one, or in its ``operand_dtype``.
        targets: int64 [T].
        wanted: which of hidden, weight and bias need a gradient.
        gated: whether a softcap's derivative goes into E: when the entropy sends no gradient.
        choice: which tier makes E, in which tiles; ``None`` asks the table of :mod:`grpo_fast.ops.head_shapes`.

    Raises:
        ValueError: tier 2 is asked for with types that it does not take.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        head: LMHead,
        *,
        targets: torch.Tensor,
        wanted: tuple[bool, bool, bool] = (False, False, False),
        gated: bool = True,
        choice: Choice | None = None,
    ) -> None:
        common = head.operand_dtype or torch.promote_types(hidden.dtype, head.weight.dtype)
        # Of float16 and bfloat16 the promoted type is float32; a float64 weight comes down to it.
        common = torch.float32 if common == torch.float64 else common
        self._exp_dtype = torch.bfloat16 if common == torch.bfloat16 else torch.float32
        self._gradient_precision = "tf32" if common == torch.float16 else "ieee"
        shape = _chunk_shape(head, hidden.device, bytes_per_exp=self._exp_dtype.itemsize)
        self.max_rows, self._logit_rows = shape
        self._head, self._wanted, self._gated = head, wanted, gated and head.softcap is not None
        self._hidden, self._weight = hidden.detach().to(common).contiguous(), head.weight.detach().to(common).contiguous()
        self._bias = None if head.bias is None else head.bias.detach().contiguous()
        self._targets = targets.contiguous()
        self._common = replace(head, weight=self._weight, bias=self._bias)
        self._choice = _choice(self._common, self.max_rows) if choice is None else choice
        rounded_by_product = head.logits_dtype == common == torch.bfloat16 and head.bias is None
        self._logits_dtype = common if rounded_by_product else torch.float32
        self._rounds = head.rounds_logits and not rounded_by_product
        self._logits: torch.Tensor | None = None
        self._exp: torch.Tensor | None = None
        self._dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if wanted[0] else None
        self._dweight: torch.Tensor | None = None
        self._dbias = _zeros(hidden, head.weight.shape[0]) if wanted[2] else None

    def block(self, rows: slice, *, want_entropy: bool, want_exp: bool) -> Block:
        """See :class:`~grpo_fast.ops.head_pass.HeadPass`."""
        exp, count = None, rows.stop - rows.start
        if want_exp:
            self._exp = self._buffer(self._exp, padded(count), self._exp_dtype)
            exp = self._exp[: padded(count)]
        if self._choice.tier == 2:
            return self._in_one_product(rows, exp, want_entropy=want_entropy)
        statistics = torch.empty(5, padded(count), dtype=torch.float32, device=self._hidden.device)[:, :count]
        with _products_in("ieee"):
            for part in row_chunks(0, count, max_rows=self._logit_rows):
                self._one_part(rows.start, part, statistics, exp)
        reference, target_logits, others, weighted, peak = statistics
        return Block(rows, exp, reference, target_logits, others, weighted if want_entropy else None, peak)

    def _in_one_product(self, rows: slice, exp: torch.Tensor | None, *, want_entropy: bool) -> Block:
        """A block by tier 2, which writes no logits."""
        found = head_exp_block(
            self._hidden[rows],
            self._common,
            targets=self._targets[rows],
            exp=exp,
            gated=self._gated,
            want_entropy=want_entropy,
            tile=self._choice.tile,
        )
        return Block(rows, exp, found.reference, found.target_logits, found.others, found.weighted)

    def _one_part(self, first: int, part: slice, statistics: torch.Tensor, exp: torch.Tensor | None) -> None:
        """Logits of some rows of a chunk, and what the kernel makes of them."""
        inputs = pad_rows(self._hidden[first + part.start : first + part.stop])
        self._logits = self._buffer(self._logits, inputs.shape[0], self._logits_dtype)
        logits = self._logits[: inputs.shape[0]]
        mm_into(inputs, self._weight.T, out=logits)
        _launch_rows_fwd(
            logits,
            self._head,
            targets=self._targets[first + part.start : first + part.stop],
            exp=None if exp is None else exp[part],
            statistics=statistics[:, part],
            rounds=self._rounds,
            gated=self._gated,
            bias=self._bias,
        )

    def _buffer(self, known: torch.Tensor | None, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
        """[num_rows or more, V], with rows that begin where vectors do."""
        if known is not None and known.shape[0] >= num_rows:
            return known
        size = self._weight.shape[0]
        pitch = -(-size // _PITCH) * _PITCH
        return torch.empty(num_rows, pitch, dtype=dtype, device=self._hidden.device)[:, :size]

    def add(self, block: Block, statistics: RowStatistics, gradient: RowGradient) -> None:
        """See :class:`~grpo_fast.ops.head_pass.HeadPass`."""
        assert block.exp is not None
        head, count = self._head, len(block.others)
        scales = row_scales(block, statistics, gradient, slope=head.slope, bound=head.bound)
        if gradient.entropy is not None:
            _launch_entropy_bwd(block, statistics, gradient, bound=head.bound)
        product = scaled = None
        with _products_in(self._gradient_precision):
            if self._wanted[0]:
                product = torch.empty(block.exp.shape[0], self._hidden.shape[1], dtype=torch.float32, device=block.exp.device)
                mm_into(block.exp, self._weight.to(self._exp_dtype), out=product)
            if self._wanted[1]:
                scaled = torch.empty(count, self._hidden.shape[1], dtype=self._exp_dtype, device=block.exp.device)
            live = gradient.live()
            self._finish_rows(block, scales, (statistics.telling(), live), product, scaled)
            if scaled is not None and count:
                self._add_to_weight(block.exp[:count], scaled)
        if self._dbias is not None and count:
            _launch_bias_bwd(block.exp[:count], scales.others, live, self._dbias)

    def _finish_rows(
        self,
        block: Block,
        scales: RowScales,
        state: tuple[torch.Tensor, torch.Tensor],
        product: torch.Tensor | None,
        scaled: torch.Tensor | None,
    ) -> None:
        """The rows of both products; ``state``: a number that tells of a row that is not finite, and which are live."""
        assert block.exp is not None
        dhidden = None if self._dhidden is None else self._dhidden[block.rows]
        hidden, targets = self._hidden[block.rows], self._targets[block.rows]
        if len(targets):
            _head_rows_bwd_kernel[(len(targets),)](
                block.exp,
                hidden,
                self._weight,
                targets,
                *state,
                scales.others.contiguous(),
                scales.target.contiguous(),
                scales.patch.contiguous(),
                product,
                dhidden,
                scaled,
                block.exp.stride(0),
                hidden.stride(0),
                self._weight.stride(0),
                block.exp.shape[1],
                hidden.shape[1],
                BLOCK=1024,
                num_warps=4,
                enable_fp_fusion=True,
            )

    def _add_to_weight(self, exp: torch.Tensor, scaled: torch.Tensor) -> None:
        first = self._dweight is None
        if self._dweight is None:
            self._dweight = torch.empty(self._weight.shape, dtype=torch.float32, device=exp.device)
        mm_into(exp.T, scaled, out=self._dweight, add=not first)

    def gradients(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """See :class:`~grpo_fast.ops.head_pass.HeadPass`."""
        self._logits = self._exp = None
        weight = self._dweight
        if self._wanted[1] and weight is None:
            weight = _zeros(self._hidden, *self._weight.shape)
        return self._dhidden, weight, self._dbias


def _choice(head: LMHead, max_rows: int) -> Choice:
    """The table's choice for a head and the most rows of a chunk, never for the rows at hand: a row keeps its bits."""
    vocab, hidden = head.weight.shape
    arch, dtype = target(head.weight.device).arch, str(head.weight.dtype).removeprefix("torch.")
    return choose(Key(arch, dtype, hidden, vocab, max_rows, plain=head.softcap is None and head.bias is None))


def _zeros(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=like.device)


@contextlib.contextmanager
def _products_in(precision: str) -> Iterator[None]:
    """How cuBLAS multiplies float32 matrices meanwhile."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before


def _launch_rows_fwd(  # noqa: PLR0913
    logits: torch.Tensor,
    head: LMHead,
    *,
    targets: torch.Tensor,
    exp: torch.Tensor | None,
    statistics: torch.Tensor,
    rounds: bool,
    gated: bool,
    bias: torch.Tensor | None,
) -> None:
    """Fills E [C, V] and statistics [5, C] (ref, z_y, S_o, Q_o, peak) from ``h W^T`` [C or more, V]."""
    inner, outer, softcap, _ = head.numbers
    _head_rows_fwd_kernel[(len(targets),)](
        logits,
        bias,
        targets,
        exp,
        statistics,
        logits.stride(0),
        0 if exp is None else exp.stride(0),
        statistics.stride(0),
        logits.shape[1],
        logits.shape[1] // 16,
        head.slope,
        inner,
        outer,
        MOST_OVER_TARGET,
        ROUNDED=rounds,
        SOFTCAP=softcap,
        GATED=gated,
        BLOCK=_BLOCK,
        **_OPTIONS,
    )


def _launch_entropy_bwd(block: Block, statistics: RowStatistics, gradient: RowGradient, *, bound: float | None) -> None:
    assert block.exp is not None
    assert statistics.entropy is not None
    assert gradient.entropy is not None
    if len(block.others):
        _head_entropy_bwd_kernel[(len(block.others),)](
            block.exp,
            block.reference,
            statistics.entropy - statistics.log_total,
            gradient.logprobs.contiguous(),
            gradient.entropy.contiguous(),
            block.exp.stride(0),
            block.exp.shape[1],
            block.exp.shape[1] // 16,
            1.0 if bound is None else 1 / bound,
            SOFTCAP=bound is not None,
            BLOCK=_BLOCK,
            **_OPTIONS,
        )


def _launch_bias_bwd(exp: torch.Tensor, scales: torch.Tensor, live: torch.Tensor, dbias: torch.Tensor) -> None:
    rows, columns = _BIAS_TILE
    _head_bias_bwd_kernel[(-(-exp.shape[1] // columns),)](
        exp,
        scales.contiguous(),
        live,
        dbias,
        exp.stride(0),
        exp.shape[0],
        exp.shape[1],
        ROWS=rows,
        BLOCK=columns,
        **_OPTIONS,
    )


def aot_calls() -> dict[str, Callable[[], object]]:
    """Passes that cover every branch of the kernels, on tensors that hold nothing; for ahead-of-time compilation."""

    def call(dtype: torch.dtype, size: int, with_entropy: bool, bias: bool, options: dict[str, Any]) -> object:
        hidden, weight = (torch.empty(rows, 2048, dtype=dtype, device="meta") for rows in (1024, size))
        shift = torch.empty(size, dtype=dtype, device="meta") if bias else None
        logits_dtype = torch.bfloat16 if bias and with_entropy else None
        head = LMHead(weight, shift, logits_dtype=logits_dtype, chunk_bytes=2**31, **options)
        targets, slopes = (torch.empty(1024, dtype=kind, device="meta") for kind in (torch.int64, torch.float32))
        work = TritonHeadPass(hidden, head, targets=targets, wanted=(True, True, bias), gated=not with_entropy)
        for want_exp in (False, True):
            block = work.block(slice(0, 1024), want_entropy=True, want_exp=want_exp)
        work.add(block, row_statistics(block), RowGradient(slopes, slopes if with_entropy else None))
        return work.gradients()

    softcap = {"softcap": 30.0, "temperature": 0.8}
    rows: dict[str, tuple[torch.dtype, int, bool, bool, dict[str, Any]]] = {
        "bfloat16": (torch.bfloat16, 151936, False, False, {}),
        "bfloat16-odd-entropy": (torch.bfloat16, 151939, True, False, {}),
        "bfloat16-softcap": (torch.bfloat16, 256000, False, True, softcap),
        "bfloat16-softcap-rounded-entropy": (torch.bfloat16, 256000, True, True, softcap),
        "float16": (torch.float16, 128256, False, True, {}),
        "bfloat16-of-float32": (torch.float32, 151936, False, False, {"operand_dtype": torch.bfloat16}),
        "float32-entropy": (torch.float32, 49152, True, False, {}),
    }
    return {name: functools.partial(call, *row) for name, row in rows.items()}
