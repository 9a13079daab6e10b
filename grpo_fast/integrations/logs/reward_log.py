"""A log as one reward curve, with everything told that was wrong with it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from grpo_fast.integrations.logs.log_columns import Columns, choose_columns
from grpo_fast.integrations.logs.log_rows import OWN_RUN, LogError, LogRows, RunSettings, read_rows

Floats = npt.NDArray[np.float64]

_FEW = 10
_WIDE_SPAN = 5.0


@dataclass(frozen=True)
class RewardLog:
    """One run's rewards, ascending in steps, each step once.

    Attributes:
        steps: (n,) training steps; the first is 1 or later.
        rewards: (n,) mean reward of each, NaN where the log says so, in the log's units.
        reward_std: (n,) spread of rewards as logged, NaN where missing; None without such a column. Tools differ in what they
            call so: grpo_fast means inside groups, TRL over the whole batch.
        learning_rate: (n,) likewise.
        max_steps: planned steps, where the log tells them.
        source: what kind of log it was.
        reward_column: column that was read.
        step_column: column of the steps; None where rows were counted.
        notes: what was wrong or had to be guessed, in sentences.
        progress: (n,) share of the budget's summed learning rate behind each step, which runs of grpo_fast log; else None.
        settings: what the run's own configuration says, or the defaults.
    """

    steps: npt.NDArray[np.int64]
    rewards: Floats
    reward_std: Floats | None
    learning_rate: Floats | None
    max_steps: int | None
    source: str
    reward_column: str
    step_column: str | None
    notes: list[str] = field(default_factory=list)
    progress: Floats | None = None
    settings: RunSettings = field(default_factory=RunSettings)

    @property
    def last_reward(self) -> float:
        """The newest reward that is a number."""
        return float(self.rewards[np.isfinite(self.rewards)][-1])


def read_log(path: str | Path, *, reward_column: str | None = None) -> RewardLog:
    """Reads the reward curve of a log.

    Known are transformers' ``trainer_state.json``, run directories and ``metrics.jsonl`` of grpo_fast, JSON lines (verl's and
    flat ones), console logs of verl, OpenRLHF and TRL, W&B's CSV exports, TensorBoard's event directories, and plain CSV.

    Args:
        path: the file, or the directory of a run.
        reward_column: column of the reward; guessed from known names without one, and told in ``reward_column``.

    Raises:
        LogError: no such file, no known format, no column that is surely the reward, or not one reward in it.
    """
    found = read_rows(Path(path))
    names = list(dict.fromkeys(name for row in found.rows for name in row))
    wanted = reward_column
    if wanted is None and found.reward_column in names:
        wanted = found.reward_column
    try:
        columns = choose_columns(names, reward_column=wanted)
    except ValueError as error:
        raise LogError(f"{path} ({found.source}): {error}") from error
    notes = list(found.notes)
    if columns.others:
        notes.append(f"other columns that could be meant: {', '.join(columns.others[:6])}")
    rows = _placed(found, columns, notes)
    if not any(math.isfinite(row[columns.reward]) for _, row in rows):
        raise LogError(f"{path} ({found.source}): column {columns.reward!r} holds no number at a known step")
    log = _log(_one_run(rows, notes), columns, found, notes)
    notes.extend(_oddities(log))
    return log


def _placed(found: LogRows, columns: Columns, notes: list[str]) -> list[tuple[int, dict[str, float]]]:
    """Rows with a reward and their steps, as written. Infinite rewards become NaN."""
    rows = [row for row in found.rows if columns.reward in row]
    infinite = sum(math.isinf(row[columns.reward]) for row in rows)
    if infinite:
        notes.append(f"{infinite} rewards are infinite and count as missing")
        rows = [row | {columns.reward: math.nan} if math.isinf(row[columns.reward]) else row for row in rows]
    if columns.step is None:
        notes.append("the log has no column of steps; its rows are counted, from 1")
        return list(enumerate(rows, 1))
    placed = [(row[columns.step], row) for row in rows if columns.step in row and math.isfinite(row[columns.step])]
    if len(placed) < len(rows):
        notes.append(f"{len(rows) - len(placed)} rewards have no step and were left out")
    if any(step < 0 or step != math.floor(step) for step, _ in placed):
        kept = [(step, row) for step, row in placed if step >= 0 and step == math.floor(step)]
        notes.append(f"{len(placed) - len(kept)} rows have a step that is negative or no whole number and were left out")
        placed = kept
    return [(int(step), row) for step, row in placed]


def _one_run(rows: list[tuple[int, dict[str, float]]], notes: list[str]) -> list[tuple[int, dict[str, float]]]:
    """The last run of a file, each step once, ascending; what was done to get there is told."""
    steps = [step for step, _ in rows]
    if len(set(steps)) == len(steps):
        if steps != sorted(steps):
            notes.append("the rows were not in the order of their steps and were sorted")
        rows = sorted(rows, key=lambda row: row[0])
    else:
        rows = _unrepeated(rows, notes)
    if rows and rows[0][0] == 0:
        notes.append("steps count from 0 in this log; 1 is added to each")
        rows = [(step + 1, row) for step, row in rows]
    return rows


def _unrepeated(rows: list[tuple[int, dict[str, float]]], notes: list[str]) -> list[tuple[int, dict[str, float]]]:
    """Later rows win: over a repeated step, over what a resumed run did again, and over a whole earlier run."""
    kept: list[tuple[int, dict[str, float]]] = []
    repeated = runs = 0
    resumed: list[int] = []
    for step, row in rows:
        if kept and step == kept[-1][0]:
            repeated += 1
            kept.pop()
        elif kept and step <= kept[0][0]:
            runs += 1
            kept = []
        elif kept and step < kept[-1][0]:
            resumed.append(step)
            kept = [item for item in kept if item[0] < step]
        kept.append((step, row))
    if repeated:
        notes.append(f"{repeated} steps were written again; the later row was used")
    if resumed:
        shown = ", ".join(map(str, resumed[:5])) + (", ..." if resumed[5:] else "")
        notes.append(f"the run was resumed {_times(len(resumed))}, at step {shown}; what it did again was used")
    if runs:
        notes.append(f"the file holds {runs + 1} runs one after the other; the last one is used")
    return kept


def _log(rows: list[tuple[int, dict[str, float]]], columns: Columns, found: LogRows, notes: list[str]) -> RewardLog:
    def column(name: str | None) -> Floats | None:
        if name is None:
            return None
        values = np.array([row.get(name, math.nan) for _, row in rows])
        return values if np.isfinite(values).any() else None

    steps = np.array([step for step, _ in rows], dtype=np.int64)
    planned = found.max_steps
    if planned is not None and planned < steps[-1]:
        notes.append(f"the log goes on to step {steps[-1]}, past the {planned} steps that it says were planned")
        planned = None
    log = RewardLog(
        steps=steps,
        rewards=np.array([row[columns.reward] for _, row in rows], dtype=np.float64),
        reward_std=column(columns.reward_std),
        learning_rate=column(columns.learning_rate),
        max_steps=planned,
        source=found.source,
        reward_column=columns.reward,
        step_column=columns.step,
        notes=notes,
        progress=column("progress") if found.source == OWN_RUN else None,
        settings=found.settings,
    )
    rate = log.learning_rate
    return replace(log, learning_rate=None) if rate is not None and not np.nanmax(rate) > 0 else log


def _oddities(log: RewardLog) -> list[str]:
    """What a reader of a forecast should know about the curve."""
    finite = log.rewards[np.isfinite(log.rewards)]
    notes = []
    if finite.size < log.rewards.size:
        notes.append(f"{log.rewards.size - finite.size} of {log.rewards.size} rewards are NaN and count as missing")
    strides = np.diff(log.steps)
    if strides.size and strides.max() > np.median(strides):
        stride = int(np.median(strides))
        missing = int(sum(max(0, round(gap / stride) - 1) for gap in strides))
        if missing:
            notes.append(f"{missing} steps are missing between step {log.steps[0]} and step {log.steps[-1]}")
    if finite.size < _FEW:
        notes.append(f"only {finite.size} rewards: too few to say much")
    if finite.size > 1 and np.ptp(finite) == 0:
        notes.append(f"the reward is {finite[0]:g} throughout")
    if np.ptp(finite) > _WIDE_SPAN:
        notes.append(f"rewards run from {finite.min():g} to {finite.max():g}: no range is taken for granted")
    return notes


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
