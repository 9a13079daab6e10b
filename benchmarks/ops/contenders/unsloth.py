"""unsloth_zoo: tiles in the inputs' type with float32 results; with a frozen head the gradient is made in the forward pass."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.ops.contenders.contender import Call, Contender, bare_import, from_logprobs
from benchmarks.ops.inputs import HeadProblem


def _unsloth(problem: HeadProblem, option: Any) -> Call:
    function = bare_import("unsloth_zoo.fused_losses.fused_linear").fused_linear_logprobs

    def score(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, want_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        found = function(hidden, weight, targets, return_entropy=want_entropy)
        return found if want_entropy else (found, None)

    return from_logprobs(problem, score)


CONTENDERS = (
    Contender(
        "unsloth fused_linear_logprobs",
        "head",
        _unsloth,
        "its own chunk sizes; entropy only where asked",
        package="unsloth_zoo",
    ),
)
