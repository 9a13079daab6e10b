"""quack: linear cross-entropy in one pass on Hopper."""

from __future__ import annotations

import importlib

import torch

from benchmarks.ops.cases import HeadCase
from benchmarks.ops.contenders.contender import Call, Contender, HeadResult, needs_gpu, only_cross_entropy
from benchmarks.ops.inputs import HeadProblem


def _quack(problem: HeadProblem, option: int) -> Call:
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

    def run() -> HeadResult:
        loss = function(problem.hidden, problem.weight, problem.targets, chunk_size=option)
        return HeadResult(loss.detach(), gradients=torch.autograd.grad(loss, problem.inputs))

    return run


def _quack_refuses(case: HeadCase, device: torch.device) -> str | None:
    return only_cross_entropy(case, device) or needs_gpu(case, device)


CONTENDERS = (
    Contender(
        "quack linear cross-entropy",
        "head",
        _quack,
        "scaled-exp pipeline where it can (sm_90), the fastest of three chunk sizes",
        package="quack-kernels",
        options=(4096, 8192, 16_384),
        refuses=_quack_refuses,
        core=False,
    ),
)
