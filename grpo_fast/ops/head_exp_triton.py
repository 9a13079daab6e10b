"""Launches of the head's one-pass product, and the operators that torch knows; see :mod:`grpo_fast.ops.head_exp`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from grpo_fast.ops.head_exp_kernels import (
    _head_exp_again_kernel,
    _head_exp_fwd_kernel,
    _head_exp_sum_kernel,
    _head_target_kernel,
)
from grpo_fast.ops.head_shapes import Tile, copies_tiles, default_tile
from grpo_fast.ops.jit import Target, TensorDescriptor, target
from grpo_fast.ops.lm_head import LMHead

LIMIT = 48.0
"""Nats: so much over a reference, V exponentials times a weight stay far inside float32 and bfloat16."""
_GROUP = 8
_SUM_BLOCK = (64, 32)
_TARGET_BLOCK = 1024
_AGAIN_BLOCK = (32, 128)
_ALIGNMENT = 16
"""Bytes that a tensor descriptor wants rows to begin at."""


class LaunchShape(NamedTuple):
    """How a product is cut into programs."""

    tile: Tile
    descriptors: bool
    """Whether operands and E go through tensor descriptors, rather than pointers."""
    num_programs: int
    num_parts: int
    """Partial sums of a row."""


def _launch_shape(where: Target, tile: Tile, num_rows: int, vocab: int, *, descriptors: bool) -> LaunchShape:
    """One program a tile, or where tiles are walked one a multiprocessor."""
    num_parts = -(-vocab // tile.columns)
    tiles = -(-num_rows // tile.rows) * num_parts
    return LaunchShape(tile, descriptors, min(tiles, where.num_sms) if tile.persistent else tiles, num_parts)


def _aligned(matrix: torch.Tensor | None) -> bool:
    """Whether a tensor descriptor can point to a matrix."""
    if matrix is None:
        return True
    return (matrix.data_ptr() | matrix.stride(0) * matrix.itemsize) % _ALIGNMENT == 0


def _launch_target_logits(  # noqa: PLR0913, PLR0917
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    inner: float,
    outer: float,
    softcap: bool,
    rounds: bool,
) -> torch.Tensor:
    result = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    if rows.shape[0]:
        _head_target_kernel[(rows.shape[0],)](
            rows,
            weight,
            bias,
            targets,
            result,
            weight.shape[0],
            rows.shape[1],
            rows.stride(0),
            weight.stride(0),
            inner,
            outer,
            SOFTCAP=softcap,
            ROUNDED=rounds,
            BLOCK=_TARGET_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return result


def _launch_head_exp(  # noqa: PLR0913, PLR0917
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ref: torch.Tensor,
    exp: torch.Tensor | None,
    inner: float,
    outer: float,
    softcap: bool,
    rounds: bool,
    gated: bool,
    want_entropy: bool,
    tile: list[int] | None,
) -> torch.Tensor:
    """Fills ``exp``; returns S_o, and Q_o where it is wanted, [1 or 2, C]."""
    num_rows, vocab = rows.shape[0], weight.shape[0]
    sums = torch.empty(1 + want_entropy, num_rows, dtype=torch.float32, device=rows.device)
    if not num_rows:
        return sums
    shape = _cut(rows, weight, exp, tile, plain=not softcap and bias is None)
    cut = shape.tile
    parts = torch.empty(len(sums), shape.num_parts, num_rows, dtype=torch.float32, device=rows.device)
    _head_exp_fwd_kernel[(shape.num_programs,)](
        *(_described(rows, weight, exp, cut) if shape.descriptors else (rows, weight, exp)),
        bias,
        targets,
        ref,
        parts[0],
        parts[1] if want_entropy else None,
        num_rows,
        vocab,
        rows.shape[1],
        vocab if exp is None else exp.shape[1],
        rows.stride(0),
        weight.stride(0),
        0 if exp is None else exp.stride(0),
        inner,
        outer,
        SOFTCAP=softcap,
        GATED=gated and softcap,
        ROUNDED=rounds,
        DESCRIPTORS=shape.descriptors,
        GROUP=_GROUP,
        SPLITS=cut.splits,
        BLOCK_ROWS=cut.rows,
        BLOCK_COLUMNS=cut.columns,
        BLOCK_HIDDEN=cut.hidden,
        num_stages=cut.num_stages,
        num_warps=cut.num_warps,
        enable_fp_fusion=True,
    )
    covered = shape.num_parts * cut.columns
    if exp is not None and exp.shape[1] > covered:
        exp[:num_rows, covered:].zero_()
    _add_up(parts, sums)
    return sums


def _cut(
    rows: torch.Tensor, weight: torch.Tensor, exp: torch.Tensor | None, tile: list[int] | None, *, plain: bool
) -> LaunchShape:
    """Cuts a product by ``tile``; by the default without one, and where rows begin at no multiple of 16 bytes."""
    where = target(rows.device)
    aligned = all(_aligned(matrix) for matrix in (rows, weight, exp))
    cut = default_tile(where.arch, wide=plain and rows.dtype == torch.bfloat16, aligned=aligned)
    if tile is not None and aligned:
        cut = Tile._make(tile)._replace(persistent=bool(tile[-1]))
    return _launch_shape(where, cut, rows.shape[0], weight.shape[0], descriptors=copies_tiles(where.arch) and aligned)


def _described(rows: torch.Tensor, weight: torch.Tensor, exp: torch.Tensor | None, cut: Tile) -> list[object]:
    """Operands and E as tensor descriptors, of the blocks that a program copies."""
    stored = None if exp is None else exp[: rows.shape[0]]
    blocks = ([cut.rows, cut.hidden], [cut.columns, cut.hidden], [cut.rows, cut.columns >> cut.splits])
    return [
        None if matrix is None else TensorDescriptor.from_tensor(matrix, block)
        for matrix, block in zip((rows, weight, stored), blocks, strict=True)
    ]


def _add_up(parts: torch.Tensor, sums: torch.Tensor) -> None:
    """Fills sums [kinds, C] from parts [kinds, parts, C]."""
    (_, num_parts, num_rows), (block_parts, block_rows) = parts.shape, _SUM_BLOCK
    _head_exp_sum_kernel[(-(-num_rows // block_rows), len(sums))](
        parts,
        sums,
        num_rows,
        num_parts,
        BLOCK_PARTS=block_parts,
        BLOCK_ROWS=block_rows,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _launch_head_exp_again(  # noqa: PLR0913, PLR0917
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ref: torch.Tensor,
    sums: torch.Tensor,
    exp: torch.Tensor | None,
    inner: float,
    outer: float,
    softcap: bool,
    rounds: bool,
    gated: bool,
) -> None:
    """Makes rows with S_o over e^LIMIT once more: their ``ref``, ``sums`` and ``exp``."""
    if not rows.shape[0]:
        return
    columns, depth = _AGAIN_BLOCK
    _head_exp_again_kernel[(rows.shape[0],)](
        rows,
        weight,
        exp,
        bias,
        targets,
        ref,
        sums,
        rows.shape[0],
        weight.shape[0],
        rows.shape[1],
        weight.shape[0] if exp is None else exp.shape[1],
        rows.stride(0),
        weight.stride(0),
        0 if exp is None else exp.stride(0),
        inner,
        outer,
        math.exp(LIMIT),
        SOFTCAP=softcap,
        GATED=gated and softcap,
        ROUNDED=rounds,
        ENTROPY=len(sums) > 1,
        BLOCK_COLUMNS=columns,
        BLOCK_HIDDEN=depth,
        num_warps=8,
        enable_fp_fusion=True,
    )


head_target_logits = torch.library.custom_op("grpo_fast::head_target_logits", _launch_target_logits, mutates_args=())
head_exp_fwd = torch.library.custom_op("grpo_fast::head_exp_fwd", _launch_head_exp, mutates_args=("exp",))
head_exp_again = torch.library.custom_op(
    "grpo_fast::head_exp_again", _launch_head_exp_again, mutates_args=("ref", "sums", "exp")
)


@head_target_logits.register_fake
def _(rows: torch.Tensor, *_: object) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], dtype=torch.float32)


@head_exp_fwd.register_fake
def _(rows: torch.Tensor, *values: object) -> torch.Tensor:
    return rows.new_empty(1 + bool(values[-2]), rows.shape[0], dtype=torch.float32)


def aot_calls() -> dict[str, Callable[[], object]]:
    """Launches that cover every branch of the kernels, on tensors that hold nothing; for ahead-of-time compilation.

    Sizes are those of one head: kernels know no more of them than that they are multiples of 16, as of every common head.
    """

    def call(dtype: torch.dtype, hidden: int, options: Mapping[str, Any], entropy: bool, stored: bool) -> object:
        rows, weight = (torch.empty(n, hidden, dtype=dtype, device="meta") for n in (8192, 151936))
        bias = torch.empty(151936, dtype=dtype, device="meta") if "softcap" in options else None
        head = LMHead(weight, bias, **options)
        targets, ref = torch.empty(8192, dtype=torch.int64, device="meta"), torch.empty(8192, device="meta")
        store = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        exp = torch.empty(8192, 151936, dtype=store, device="meta") if stored else None
        numbers = head.numbers
        sums = _launch_head_exp(rows, weight, bias, targets, ref, exp, *numbers, True, entropy, None)
        _launch_target_logits(rows, weight, bias, targets, *numbers)
        _launch_head_exp_again(rows, weight, bias, targets, ref, sums, exp, *numbers, True)
        return sums

    bf16, fp16 = torch.bfloat16, torch.float16
    capped = {"softcap": 30.0, "logits_dtype": bf16}
    # By kind of head: what is wanted of it, as pairs of entropy and E.
    every = [(False, False), (False, True), (True, False), (True, True)]
    kinds: dict[str, tuple[torch.dtype, int, Mapping[str, Any], list[tuple[bool, bool]]]] = {
        "bf16": (bf16, 1536, {}, every),
        "fp16": (fp16, 1536, {}, every),
        "bf16-rounded": (bf16, 1536, {"logits_dtype": bf16}, every[2:]),
        "bf16-bias-softcap-rounded": (bf16, 1536, capped, every[1:]),
        "bf16-unaligned": (bf16, 1537, {}, every[2:]),
    }
    return {
        f"{name}{'-entropy' if entropy else ''}{'' if stored else '-forward'}": functools.partial(
            call, dtype, hidden, options, entropy, stored
        )
        for name, (dtype, hidden, options, wanted) in kinds.items()
        for entropy, stored in wanted
    }
