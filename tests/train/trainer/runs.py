"""What the tests of whole runs share: a reward, a task, and eyes for what a run left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from grpo_fast.config import Config
from grpo_fast.tasks.task import Task
from grpo_fast.train import GRPOTrainer

Make = Callable[..., GRPOTrainer]


def vowels(completions: list[str], **columns: Any) -> list[float]:
    return [sum(letter in "aei" for letter in text) / max(1, len(text)) for text in completions]


def rows(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def beliefs(run: Path) -> list[dict[str, Any]]:
    """What was forecast, without what it costs: that is measured."""
    return [
        {key: value for key, value in row.items() if not key.endswith(("spending", "spent"))} for row in rows(run, "forecasts")
    ]


def events(run: Path) -> list[str]:
    return [row["event"] for row in rows(run, "events")]


def weights(trainer: GRPOTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer._parts.policy.model.parameters()])


@dataclass
class Straight:
    """The undisturbed run."""

    config: Config
    trace: list[dict[str, Any]] = field(default_factory=list)
    forecasts: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    weights: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


ROWS = [{"prompt": f"{a}{b}=", "answer": a} for a in "abcdefgh" for b in "abcd"]
LETTERS = Task("letters", ROWS[:24], ROWS[24:], ("exact_match",), "exact_match")


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0
