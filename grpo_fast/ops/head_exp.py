"""Exponentials of a head's logits and their row sums out of one matrix product; the logits themselves are never written.

For C rows of ``hidden``, with z the logits of :mod:`grpo_fast.ops.lm_head`, y the targets and ref one number a row,

    E_v = e^{z_v - ref} for v != y, 0 for v = y,    S_o = Σ_v E_v,    Q_o = Σ_v E_v (z_v - ref)

are made in the epilogue of ``h W^T``: 2 C·H·V FLOP, and beside the operands as many bytes of device memory as E has (none
where E is not wanted) and 4 (8 with Q_o) a row and tile for partial sums. What follows from them is in
:mod:`grpo_fast.ops.head_pass`; E is read by the products of the gradients.

One pass is possible because the reference is known before it: z_y takes one row of the weight a token. With it the target's
own term is exactly 1, and confident tokens keep the tail of the others, down to 87 nats under the target.

**Overflow.** E and S_o are right as long as no logit stands more than ``LIMIT`` nats over the reference, and a row where one
does has S_o > e^LIMIT, whatever else it holds. :func:`head_exp` leaves such a row to its caller: its S_o says so, and E, S_o
and Q_o of every other row are right. :func:`head_exp_block` makes it again, from its largest logit, which no row can overflow:
one more launch, in which every program looks at its row's S_o and leaves; nothing waits for the device. A sampled token is
never there (its chance would be e^-48); a token of somebody else's policy may be. Such a row costs two passes of one
multiprocessor over the weight.

A row with NaN or infinite logits has S_o NaN, by itself. Every sum has an order that V and the tile fix, so that numbers do
not depend on the rows beside them; repeated calls, and calls with and without E or Q_o, give the same bits.

Source: the one-pass idea is QuACK's scaled-exponential linear cross-entropy, which takes its reference per tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from grpo_fast.ops.head_exp_triton import LIMIT, head_exp_again, head_exp_fwd, head_target_logits
from grpo_fast.ops.head_shapes import Tile
from grpo_fast.ops.lm_head import LMHead

__all__ = [
    "LIMIT",
    "HeadExp",
    "HeadExpBlock",
    "head_exp",
    "head_exp_block",
    "head_exp_obstacle",
    "head_exp_reference",
    "target_logits",
]


class HeadExp(NamedTuple):
    """Row sums that one product makes of C rows, float32 [C]."""

    others: torch.Tensor
    """S_o."""
    weighted: torch.Tensor | None
    """Q_o; ``None`` where no entropy is wanted."""


class HeadExpBlock(NamedTuple):
    """Numbers of C rows, float32 [C]."""

    reference: torch.Tensor
    """z_y, but for rows where that overflows: their largest logit."""
    target_logits: torch.Tensor
    """z_y."""
    others: torch.Tensor
    weighted: torch.Tensor | None


def head_exp_reference(
    rows: torch.Tensor, head: LMHead, *, targets: torch.Tensor, ref: torch.Tensor, gated: bool = False
) -> tuple[torch.Tensor, HeadExp]:
    """The specification: E [C, V] as it is stored, and the sums, in the type of ``ref``."""
    z, gate = _logits_reference(rows, head, ref.dtype)
    distance = z - ref[:, None]
    exp = distance.exp().scatter(1, targets[:, None], 0.0)
    return exp * gate if gated else exp, HeadExp(exp.sum(1), (exp * distance).sum(1))


def _logits_reference(rows: torch.Tensor, head: LMHead, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Z [C, V] and its derivative's factor from a softcap."""
    u = rows.to(dtype) @ head.weight.to(dtype).T
    bias = head.finite_bias(dtype)
    if bias is not None:
        u = u + bias
    if head.rounds_logits:
        u = u.to(head.logits_dtype).to(dtype)
    if head.softcap is None or head.bound is None:
        return u * head.slope, torch.ones_like(u)
    share = torch.tanh(u * head.logit_scale / head.softcap)
    return head.bound * share, 1 - share.square()


def head_exp_obstacle(rows: torch.Tensor, head: LMHead) -> str | None:
    """Why tier 2 cannot run on such rows where a Triton kernel can, in words for people; ``None`` where it can."""
    if rows.dtype != head.weight.dtype:
        return f"hidden rows are {rows.dtype} and the weight is {head.weight.dtype}; tier 2 multiplies equal types only"
    if rows.dtype not in (torch.bfloat16, torch.float16):
        return f"hidden rows are {rows.dtype}; tier 2 needs tensor cores of 16-bit types"
    if rows.stride(-1) != 1 or head.weight.stride(-1) != 1:
        return "hidden rows or weight are not contiguous along H"
    return None


def _refuse(
    rows: torch.Tensor, head: LMHead, exp: torch.Tensor | None, targets: torch.Tensor, ref: torch.Tensor | None
) -> None:
    obstacle = head_exp_obstacle(rows, head)
    if obstacle is not None:
        raise ValueError(f"{obstacle}; use tier 1")
    for name, values in (("targets", targets), ("ref", ref), ("bias", head.bias)):
        if values is not None and not values.is_contiguous():
            raise ValueError(f"{name} has strides {values.stride()}; kernels read it as it lies, call .contiguous()")
    if exp is not None and (exp.shape[0] < rows.shape[0] or exp.shape[1] < head.weight.shape[0] or exp.stride(1) != 1):
        raise ValueError(
            f"exp has shape {tuple(exp.shape)} and strides {exp.stride()}; it must be contiguous along V and have at least "
            f"{rows.shape[0]} rows and {head.weight.shape[0]} columns"
        )


def target_logits(rows: torch.Tensor, head: LMHead, *, targets: torch.Tensor) -> torch.Tensor:
    """Logit z_y of each row's target, by itself: C·H products, in an order that H fixes.

    Args:
        rows: [C, H], bfloat16 or float16, of the weight's type.
        head: how they become logits.
        targets: int64 [C]; one that is no token gets NaN.

    Returns:
        float32 [C].

    Raises:
        ValueError: types or layouts that tier 2 does not take.
    """
    _refuse(rows, head, None, targets, None)
    result: torch.Tensor = head_target_logits(rows, head.weight, head.bias, targets, *head.numbers)
    return result


def head_exp(  # noqa: PLR0913
    rows: torch.Tensor,
    head: LMHead,
    *,
    targets: torch.Tensor,
    ref: torch.Tensor,
    exp: torch.Tensor | None = None,
    gated: bool = False,
    want_entropy: bool = False,
    tile: Tile | None = None,
) -> HeadExp:
    """One product of C rows with the head, as exponentials and their sums; see the module for overflow.

    Args:
        rows: [C, H], bfloat16 or float16, of the weight's type.
        head: how they become logits.
        targets: int64 [C].
        ref: float32 [C], nats: what exponentials are taken from, z_y as :func:`target_logits` gives it or another number at
            most ``LIMIT`` under the row's largest logit and at most 80 over it.
        exp: [C or more, V or more], any float type, where E goes; columns from V on get 0, rows from C on are left alone.
            ``None`` where it is not wanted. float16 holds no more than e^11: give float32 for float16 rows.
        gated: multiply a softcap's derivative into E; never into the sums.
        want_entropy: also make Q_o.
        tile: how programs work, as :func:`~grpo_fast.ops.head_shapes.choose` says; ``None`` takes the default. Where
            rows of a tensor begin at no multiple of 16 bytes, the default in any case.

    Returns:
        S_o and Q_o; a row with S_o over e^LIMIT, or NaN, holds nothing else that is right.

    Raises:
        ValueError: types or layouts that tier 2 does not take.
    """
    _refuse(rows, head, exp, targets, ref)
    flags = (gated, want_entropy, None if tile is None else [int(number) for number in tile])
    sums = head_exp_fwd(rows, head.weight, head.bias, targets, ref, exp, *head.numbers, *flags)
    return HeadExp(sums[0], sums[1] if want_entropy else None)


def head_exp_block(  # noqa: PLR0913
    rows: torch.Tensor,
    head: LMHead,
    *,
    targets: torch.Tensor,
    exp: torch.Tensor | None = None,
    gated: bool = False,
    want_entropy: bool = False,
    tile: Tile | None = None,
) -> HeadExpBlock:
    """Everything that a block of rows needs, whatever its logits: the reference, one product, and rows that overflow again.

    Args:
        rows: as for :func:`head_exp`, and so are the others.
        head: how they become logits.
        targets: int64 [C].
        exp: where E goes.
        gated: multiply a softcap's derivative into E.
        want_entropy: also make Q_o.
        tile: how programs work.

    Returns:
        References, target logits and sums; all are finite where the row's logits are.

    Raises:
        ValueError: types or layouts that tier 2 does not take.
    """
    of_targets = target_logits(rows, head, targets=targets)
    found = head_exp(rows, head, targets=targets, ref=of_targets, exp=exp, gated=gated, want_entropy=want_entropy, tile=tile)
    sums = torch.stack([found.others] if found.weighted is None else [found.others, found.weighted])
    reference = of_targets.clone()
    head_exp_again(rows, head.weight, head.bias, targets, reference, sums, exp, *head.numbers, gated)
    return HeadExpBlock(reference, of_targets, sums[0], sums[1] if want_entropy else None)
