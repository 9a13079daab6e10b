"""Several runs side by side, as of a sweep: how their settings differ, what each reached and cost, and why it ended."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_fast.report.run import Run, RunError
from grpo_fast.run_dir import CONFIG_FILE
from grpo_fast.sinks.jsonl import METRICS
from grpo_fast.sinks.quantities import duration, si

_OWN = {"output_dir", "overwrite", "resume_if_exists", "report", "sinks"}
"""Settings that say nothing of what was trained."""
_HEADS = ("run", "steps", "reward", "held-out", "FLOPs", "time", "ended by", "settings that differ")


@dataclass(frozen=True)
class Compared:
    """One run of several.

    Attributes:
        path: its directory.
        run: what was read of it; ``None`` where that is not even one step.
        settings: those in which the runs differ; ``None`` where one is not set.
        problem: why nothing was read.
    """

    path: Path
    run: Run | None
    settings: Mapping[str, Any]
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is unknown is ``None``."""
        run = self.run
        if run is None:
            return {"run": str(self.path), "settings": dict(self.settings), "problem": self.problem}
        numbers = {
            "final_reward": run.final_reward,
            "eval_reward": run.eval_reward,
            "flops": run.flops,
            "wall_hours": run.seconds / 3600,
            "gpu_hours": run.gpu_hours,
        }
        return {
            "run": str(self.path),
            "settings": dict(self.settings),
            "step": run.last_step,
            "max_steps": run.max_steps,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            "stopped_by": run.stopped_by,
            "reason": (run.summary or {}).get("reason"),
        }

    def to_words(self) -> dict[str, str]:
        """A cell for each column; without those of what is unknown."""
        run = self.run
        settings = ", ".join(f"{name}={_value(value)}" for name, value in self.settings.items())
        if run is None:
            return {"run": str(self.path), "ended by": "not read"}
        numbers = {
            "reward": (run.final_reward, f"{run.final_reward:.3f}"),
            "held-out": (run.eval_reward, f"{run.eval_reward:.3f}"),
            "FLOPs": (run.flops, si(run.flops)),
            "time": (run.seconds, duration(run.seconds)),
        }
        return {
            "run": str(self.path),
            "steps": f"{run.last_step} of {run.max_steps}",
            **{name: words for name, (value, words) in numbers.items() if math.isfinite(value)},
            "ended by": run.stopped_by or "unfinished",
            **({"settings that differ": settings} if settings else {}),
        }

    @property
    def problems(self) -> Sequence[str]:
        """Sentences about what could not be read."""
        told = [self.problem] if self.run is None else [f"{self.path}: {problem}" for problem in self.run.problems]
        return [one for one in told if one is not None]


def table(compared: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of all columns that any run has; a dash stands for what is unknown."""
    rows = [one.to_words() for one in compared]
    heads = [head for head in _HEADS if any(head in row for row in rows)]
    return heads, [[row.get(head, "-") for head in heads] for row in rows]


def compare_runs(paths: Sequence[Path]) -> list[Compared]:
    """Reads runs, each finished or not, in the order given.

    Args:
        paths: runs, or directories of runs.

    Returns:
        One of each run. Of one that cannot be read, or has not done a step, it tells why.

    Raises:
        RunError: no run is among them.
    """
    read = {path: _read(path) for path in _expanded(paths)}
    runs = [run for run in read.values() if isinstance(run, Run)]
    if not runs:
        raise next(
            (error for error in read.values() if isinstance(error, RunError)), RunError("name at least one run to compare")
        )
    names = dict.fromkeys(name for run in runs for name in run.config if name not in _OWN)
    differing = [name for name in names if len({json.dumps(run.config.get(name)) for run in runs}) > 1]

    def compared(path: Path, found: Run | RunError) -> Compared:
        if isinstance(found, RunError):
            return Compared(path, None, {}, str(found))
        return Compared(path, found, {name: found.config.get(name) for name in differing})

    return [compared(path, found) for path, found in read.items()]


def _expanded(paths: Sequence[Path]) -> Iterator[Path]:
    """Each run once; a directory that is none is that of the runs in it."""
    for path in paths:
        if any((path / name).exists() for name in (CONFIG_FILE, METRICS)):
            yield path
        else:
            yield from sorted(found.parent for found in path.glob(f"*/{CONFIG_FILE}")) or [path]


def _read(path: Path) -> Run | RunError:
    try:
        return Run.load(path)
    except RunError as error:
        return error


def _value(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
