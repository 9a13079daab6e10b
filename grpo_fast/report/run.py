"""A run's directory as arrays and records, whatever state the run was left in."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grpo_fast.run_dir import CONFIG_FILE, SUMMARY_FILE
from grpo_fast.sinks.jsonl import COMPLETIONS, EVENTS, FORECASTS, METRICS

Array = npt.NDArray[np.float64]


class RunError(ValueError):
    """A directory that is not a run, or a run without a single whole step; the message says what is missing."""


@dataclass(frozen=True)
class Run:
    """A run, as far as it got.

    What could not be read is left out and named in ``problems``. Only a half-written last line, which any killed run has, goes
    unmentioned.
    """

    path: Path
    """Directory of the run."""
    steps: npt.NDArray[np.int64]
    """(n,): step numbers, ascending, each once."""
    metrics: Mapping[str, Array]
    """Each metric as (n,) float64, NaN where a step has none."""
    forecasts: Sequence[Mapping[str, Any]]
    """Rows of ``forecasts.jsonl`` in the order of their steps."""
    events: Sequence[Mapping[str, Any]]
    """Rows of ``events.jsonl`` as written."""
    completions: Sequence[Mapping[str, Any]]
    """Rows of ``completions.jsonl`` as written."""
    config: Mapping[str, Any]
    """The resolved configuration; empty where the run has none."""
    config_text: str
    """The same as TOML."""
    summary: Mapping[str, Any] | None
    """``summary.json``; None while the run goes on or where it was killed."""
    problems: Sequence[str] = field(default=())
    """Sentences about what could not be read."""

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Reads a run directory; the run may be finished, going on or killed.

        Raises:
            RunError: the directory does not exist, holds no metrics, or not one whole step.
        """
        path = Path(path)
        if not path.is_dir():
            raise RunError(f"{path} is not a directory; give the output_dir of a run")
        if not (path / METRICS).is_file():
            inner = sorted(str(found.parent) for found in path.glob(f"*/{METRICS}"))
            hint = f"did you mean {inner[0]}?" if inner else "give the output_dir of a run that has done a step"
            raise RunError(f"{path} is not a run: it has no {METRICS}; {hint}")
        problems: list[str] = []
        rows = _latest(_rows(path / METRICS, problems))
        if not rows or rows[-1]["step"] == 0:  # that one is the evaluation before the first step
            raise RunError(f"{path / METRICS} holds no whole step yet; try again once the run has done one")
        config, config_text = _config(path / CONFIG_FILE, problems)
        return cls(
            path=path,
            steps=np.array([row["step"] for row in rows], dtype=np.int64),
            metrics=_columns(rows),
            forecasts=_latest(_rows(path / FORECASTS, problems)),
            events=_rows(path / EVENTS, problems),
            completions=_rows(path / COMPLETIONS, problems),
            config=config,
            config_text=config_text,
            summary=_summary(path / SUMMARY_FILE, problems, last_step=rows[-1]["step"]),
            problems=tuple(problems),
        )

    def metric(self, name: str) -> Array:
        """(n,) values of a metric, all NaN where the run has none of that name."""
        return self.metrics.get(name, np.full(self.steps.size, np.nan))

    def has(self, name: str) -> bool:
        """Whether the run has at least one number of that name."""
        return bool(np.isfinite(self.metric(name)).any())

    def last(self, name: str) -> float:
        """The last finite value of a metric, NaN without one."""
        values = self.metric(name)
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if finite.size else float("nan")

    @property
    def last_step(self) -> int:
        """The newest step."""
        return int(self.steps[-1])

    @property
    def max_steps(self) -> int:
        """Steps that were allowed, never fewer than were done."""
        allowed = (self.summary or {}).get("max_steps") or self.config.get("max_steps") or 0
        return max(int(allowed), self.last_step)

    @property
    def stopped_by(self) -> str | None:
        """The reason for the end: ``forecast``, ``max_steps``, ``interrupt``, ...; None while it runs, or if it was killed."""
        return None if self.summary is None else str(self.summary.get("stopped_by", "unknown"))

    @property
    def is_over(self) -> bool:
        """Whether the steps left will not be run: not so while a run goes on, or where it was only interrupted."""
        return self.stopped_by not in {None, "interrupt", "user"}

    @property
    def epsilon(self) -> float:
        """Remaining gain of the reward under which going on was not worth it."""
        return float(self.config.get("forecast_epsilon", 0.01))

    @property
    def confidence(self) -> float:
        """Probability of so small a gain that a stop demanded."""
        return float(self.config.get("forecast_confidence", 0.78))

    @property
    def resumed_at(self) -> list[int]:
        """Steps from which the run was resumed."""
        return [int(row["step"]) for row in self.events if row.get("event") == "resume"]

    @property
    def final_reward(self) -> float:
        """Mean reward at the end: the summary's, else the mean of the last twentieth of the steps (five at least)."""
        told = (self.summary or {}).get("final_reward")
        if told is not None:
            return float(told)
        rewards = self.metric("reward")[-max(5, self.steps.size // 20) :]
        finite = rewards[np.isfinite(rewards)]
        return float(finite.mean()) if finite.size else float("nan")

    @property
    def eval_reward(self) -> float:
        """The last mean reward on held-out prompts; NaN without one."""
        return first_number((self.summary or {}).get("eval_reward"), self.last("eval_reward"))

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run; NaN where none was measured."""
        measured = sum(self.seconds_by_phase().values()) or float("nan")
        return 3600 * first_number(self._costs.get("wall_hours"), measured / 3600)

    @property
    def flops(self) -> float:
        """Model FLOPs of the run."""
        return first_number(self._costs.get("flops"), self.last("flops"))

    @property
    def gpu_hours(self) -> float:
        """Hours of all devices together."""
        return first_number(self._costs.get("gpu_hours"), self.last("gpu_seconds") / 3600)

    @property
    def _costs(self) -> Mapping[str, Any]:
        return (self.summary or {}).get("compute") or {}

    def forecast_at(self, step: int) -> Mapping[str, Any] | None:
        """The newest forecast made at ``step`` or before; None where there was none yet."""
        return next((row for row in reversed(self.forecasts) if row["step"] <= step), None)

    def forecast_series(self, name: str) -> Array:
        """(m,) one value a forecast, NaN where it is unknown."""
        return series(self.forecasts, name)

    def seconds_by_phase(self) -> dict[str, float]:
        """Seconds of wall-clock time of each phase that took any."""
        told = ((self.summary or {}).get("compute") or {}).get("seconds")
        if told is None:
            told = {name: np.nansum(self.metric(name)) for name in self.metrics if name.startswith("time/")}
        return _positive(told, "time/")

    def flops_by_phase(self) -> dict[str, float]:
        """FLOPs of each phase that did any."""
        told = ((self.summary or {}).get("compute") or {}).get("flops_by_phase")
        if told is None:
            told = {name: self.last(name) for name in self.metrics if name.startswith("flops/")}
        return _positive(told, "flops/")


def smoothed(values: Array, *, width: float | None = None) -> Array:
    """Gaussian kernel mean over steps; NaN counts for nothing and stays NaN only where no number is near.

    Args:
        values: (n,).
        width: standard deviation of the kernel in steps; a fortieth of the run without one, between 1 and 25.
    """
    width = min(25.0, max(1.0, values.size / 40)) if width is None else width
    reach = min(int(np.ceil(3 * width)), max(values.size - 1, 0))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    known = np.isfinite(values)
    weight = np.convolve(known.astype(np.float64), kernel)[reach : reach + values.size]
    total = np.convolve(np.where(known, values, 0.0), kernel)[reach : reach + values.size]
    result: Array = np.divide(total, weight, out=np.full(values.size, np.nan), where=weight > 1e-3)
    return result


def _positive(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    numbers = {name.removeprefix(prefix): as_number(value) for name, value in values.items()}
    return {name: value for name, value in numbers.items() if value > 0}


def series(rows: Sequence[Mapping[str, object]], name: str) -> Array:
    """(m,) one value a row, NaN where it is unknown."""
    return np.array([as_number(row.get(name)) for row in rows], dtype=np.float64)


def as_number(value: object) -> float:
    """A JSON value as a number; NaN where it is none."""
    return float(value) if isinstance(value, (int, float)) else float("nan")


def first_number(*values: object) -> float:
    """The first finite number; NaN without one."""
    return next((number for number in map(as_number, values) if np.isfinite(number)), float("nan"))


def _rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """JSON objects with a step; a missing file is an empty one."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
            if row is not None:
                rows.append(row | {"step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                problems.append(f"{path.name}, line {number} is not a row with a step and was left out")
    return rows


def _latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a step, the one written last, ascending."""
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def _columns(rows: list[dict[str, Any]]) -> dict[str, Array]:
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    return {name: np.array([as_number(row.get(name)) for row in rows], dtype=np.float64) for name in names}


def _config(path: Path, problems: list[str]) -> tuple[dict[str, Any], str]:
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except FileNotFoundError:
        problems.append(f"{path.name} is missing; limits and thresholds are the defaults")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path.name} cannot be read ({error}); limits and thresholds are the defaults")
    return {}, ""


def _summary(path: Path, problems: list[str], *, last_step: int) -> dict[str, Any] | None:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        problems.append(f"{path.name} cannot be read ({error}); the run is shown as unfinished")
        return None
    if not isinstance(summary, dict):
        problems.append(f"{path.name} is not a record; the run is shown as unfinished")
        return None
    resumed_since = int(summary.get("step") or 0) < last_step
    return None if resumed_since else summary
