"""cut-cross-entropy: one Triton kernel a direction, small gradients filtered."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from benchmarks.ops.cases import HeadCase
from benchmarks.ops.contenders.contender import Call, Contender, from_logprobs, needs_gpu
from benchmarks.ops.inputs import HeadProblem


def _cut(problem: HeadProblem, option: Any) -> Call:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def score(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, want_entropy: bool
    ) -> tuple[torch.Tensor, None]:
        return -function(hidden, weight, targets, reduction="none", filter_eps=option, impl="cce").float(), None

    return from_logprobs(problem, score)


def _cut_refuses(case: HeadCase, device: torch.device) -> str | None:
    return needs_gpu(case, device) or ("it makes no entropy" if case.entropy else None)


CONTENDERS = (
    Contender(
        "cut-cross-entropy",
        "head",
        _cut,
        "the faster of its gradient filter and none",
        package="cut-cross-entropy",
        options=("auto", None),
        refuses=_cut_refuses,
        core=False,
    ),
)
