"""Two hundred steps, with the fused loss and with its reference."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_fast import Config, GRPOTrainer
from grpo_fast.ops import FusedLoss, LMHead, fused_grpo
from grpo_fast.ops.fused_grpo import fused_grpo_reference
from grpo_fast.train import head_part


def curve(loss: Callable[..., FusedLoss], config: Config, *, num_steps: int = 200) -> list[dict[str, float]]:
    """Metrics of the first steps of a run with some loss."""
    with pytest.MonkeyPatch.context() as patch, GRPOTrainer(config) as trainer:
        patch.setattr(head_part, "fused_grpo", loss)
        return [dict(step.metrics) for step in islice(trainer.steps(), num_steps)]


def in_bfloat16(hidden: torch.Tensor, head: LMHead, **options: Any) -> FusedLoss:
    """The reference on logits that were rounded."""
    return fused_grpo_reference(hidden, replace(head, logits_dtype=torch.bfloat16), **options)


def largest_gap(one: list[dict[str, float]], two: list[dict[str, float]], name: str) -> float:
    """Between the means of twenty steps of two curves; a step whose groups all agree trains on nothing and has no entropy."""
    known = [
        [[step[name] for step in run[start : start + 20] if name in step] for start in range(0, len(one), 20)]
        for run in (one, two)
    ]
    means = [
        (statistics.mean(first), statistics.mean(second)) for first, second in zip(*known, strict=True) if first and second
    ]
    assert len(means) >= 5
    return max(abs(first - second) for first, second in means)


def follow_each_other(one: list[dict[str, float]], two: list[dict[str, float]]) -> bool:
    """Whether the same completions were sampled, and loss and gradient norm agree to rounding."""
    return all(
        first["reward"] == second["reward"]
        and first["loss"] == pytest.approx(second["loss"], rel=1e-5, abs=1e-7)
        and first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-5)
        for first, second in zip(one, two, strict=True)
    )


@pytest.mark.slow
def test_two_hundred_steps_learn_what_the_reference_learns(tmp_path: Path, embedded_config: Callable[..., Config]) -> None:
    """Errors too small to be seen in one step can drift; a run of another seed says how far apart equal runs may be."""

    def config(name: str, seed: int = 0) -> Config:
        return embedded_config(output_dir=tmp_path / name, seed=seed, prompts_per_step=8, max_steps=200, eval_steps=1000)

    found = curve(fused_grpo, config("fused"))
    expected = curve(fused_grpo_reference, config("reference"))
    other = curve(fused_grpo_reference, config("other", seed=1), num_steps=100)  # more would only widen its gap
    assert follow_each_other(found[:20], expected[:20])
    for name in ("reward", "entropy"):
        assert largest_gap(found, expected, name) <= largest_gap(other, expected[:100], name)
    assert statistics.mean(step["reward"] for step in expected[-20:]) > 0.9
    # the guard: rounded logits, an error of the size that public kernels have, would have been told
    rounded = curve(in_bfloat16, config("rounded"), num_steps=3)
    assert not follow_each_other(rounded, expected[:3])
