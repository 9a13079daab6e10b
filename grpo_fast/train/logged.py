"""What reward functions log among the run's own metrics: under its own name, as in TRL, unless the run has that name itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_NOT_IN_EVERY_STEP = ("clip_ratio", "cispo_clip_ratio", "entropy", "entropy_coef", "forecast", "kl", "mfu", "sampling", "vespo")
"""Families that a step may lack, as one without gradient does, and those that trackers are told beside metrics."""


def family(name: str) -> str:
    """What stands for all metrics of a kind: ``time`` for ``time/train``."""
    return "eval_" if name.startswith("eval_") else name.partition("/")[0]


def named_apart(logged: Mapping[str, float], own: Iterable[str]) -> dict[str, float]:
    """Metrics under names that no metric of the run has, in this step or another: ``loss`` becomes ``logged/loss``.

    Args:
        logged: by the name that a reward function gave.
        own: names of the run's metrics in this step.
    """
    taken = {*_NOT_IN_EVERY_STEP, "eval_", *map(family, own)}
    return {f"logged/{name}" if family(name) in taken else name: value for name, value in logged.items()}
