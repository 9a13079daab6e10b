"""TRL 1.16: tiles of logits by matrix product, folded by a Triton kernel (in torch where there is no GPU)."""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import ModuleType
from typing import Any

import torch

from benchmarks.ops.contenders.contender import Call, Contender, bare_import, from_logprobs
from benchmarks.ops.inputs import HeadProblem


def _function() -> Any:
    try:
        module = importlib.import_module("trl.kernels.chunked_logprob")
    except ImportError:  # something of the training stack above it is missing
        module = bare_import("trl.kernels.chunked_logprob")
    try:
        importlib.import_module("trl.trainer.utils")
    except ImportError:  # backward asks it for a context that only ZeRO-3 fills
        stand_in = ModuleType("trl.trainer.utils")
        stand_in.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()
        sys.modules.setdefault("trl.trainer", ModuleType("trl.trainer"))
        sys.modules["trl.trainer.utils"] = stand_in
    return module.ChunkedLogProbFunction


def _prepare(problem: HeadProblem, option: int) -> Call:
    function = _function()

    def score(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, want_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        outputs = ("entropy",) if want_entropy else ()
        return function.apply(hidden, weight, None, targets, 1.0, option, None, 1.0, outputs)[:2]

    return from_logprobs(problem, score)


CONTENDERS = (
    Contender(
        "trl chunked_logprob",
        "head",
        _prepare,
        "tiles of 4096 tokens by the fastest of three vocabulary widths (32,768 is its default); entropy only where asked",
        package="trl",
        options=(32_768, 65_536, 16_384),
    ),
)
