"""Every contender, in the order of result tables."""

from __future__ import annotations

import torch

from benchmarks.ops.cases import Case
from benchmarks.ops.contenders import cut_cross_entropy, grpo_fast, liger, pytorch, quack, trl, unsloth, verl
from benchmarks.ops.contenders.contender import Contender

CONTENDERS: tuple[Contender, ...] = tuple(
    contender
    for module in (grpo_fast, pytorch, trl, unsloth, liger, verl, cut_cross_entropy, quack)
    for contender in module.CONTENDERS
)


def contenders_of(case: Case) -> list[Contender]:
    """Those that a case is about."""
    return [x for x in CONTENDERS if x.kind == case.kind and (x.core or case.every_rival)]


def refusal(contender: Contender, case: Case, device: torch.device) -> str | None:
    """Why a contender cannot take a case; ``None`` where it can, as far as is known before trying."""
    return contender.refuses(case, device)
