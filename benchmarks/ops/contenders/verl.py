"""verl: its Triton linear cross-entropy with entropy, and its group statistics."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.ops.contenders.contender import Call, Contender, bare_import, from_logprobs, needs_gpu
from benchmarks.ops.inputs import AdvantageProblem, HeadProblem


def _verl(problem: HeadProblem, option: Any) -> Call:
    function = bare_import("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def score(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, want_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return function(hidden, weight, targets, 1.0, "none")

    return from_logprobs(problem, score)


def _verl_advantages(problem: AdvantageProblem, option: Any) -> Call:
    function = bare_import("verl.utils.groupwise").group_mean_std
    rewards, scaled = problem.rewards, problem.case.scale_rewards == "group"
    prompts, completions = rewards.shape
    group = torch.arange(prompts, device=rewards.device).repeat_interleave(completions)

    def run() -> torch.Tensor:
        flat = rewards.flatten()
        mean, std, _ = function(flat, group, device=flat.device)
        centred = flat - mean[group]
        return centred / (std[group] + 1e-4) if scaled else centred

    return run


CONTENDERS = (
    Contender("verl linear_cross_entropy", "head", _verl, "its defaults", package="verl", refuses=needs_gpu, core=False),
    Contender("verl group_mean_std", "advantage", _verl_advantages, "its defaults, group index known", package="verl"),
)
