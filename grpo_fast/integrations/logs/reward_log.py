"""Reads a log as one reward curve, and notes everything that was wrong with it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from grpo_fast.integrations.logs.log_columns import DEVICE_SECONDS, OWN, TOKEN_SUMS, Columns, choose_columns, plain
from grpo_fast.integrations.logs.log_rows import OWN_RUN, read_rows
from grpo_fast.integrations.logs.raw_log import LogError, Names, RawLog, RunSettings, counted
from grpo_fast.integrations.logs.row_order import Floats, Rows, one_run

_FEW = 10
_WIDE_SPAN = 5.0
_FAR = 100.0
_LONG_BEFORE = 0.5
_UNCLEAR = TOKEN_SUMS[-2:]
_LEAST_GROWTH = 0.1
_SMOOTH, _MANY = {1: -0.2, 2: -0.6}, 60
_HELD_OUT = re.compile(r"(?:eval(?:uation)?|val(?:id(?:ation)?)?|test|dev|held[-_ ]?out)(?:$|[\W_\d])", re.IGNORECASE)


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
        tokens: (n,) tokens since the first step, NaN where missing; None without a column that surely holds them.
        device_seconds: (n,) seconds of all devices since the first step, likewise.
        money: (n,) likewise; logged by runs of grpo_fast that know a price.
        all_wrong: (n,) share of the step's groups without a right answer, likewise.
        still: (n,) steps in a row, the row's included, in which no group held two different rewards, likewise.
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
    tokens: Floats | None = None
    device_seconds: Floats | None = None
    money: Floats | None = None
    all_wrong: Floats | None = None
    still: Floats | None = None

    @property
    def last_reward(self) -> float:
        """The newest reward that is a number."""
        return float(self.rewards[np.isfinite(self.rewards)][-1])


def read_log(path: str | Path, *, reward_column: str | None = None, run: str | None = None) -> RewardLog:
    """Reads the reward curve of a log.

    Known are transformers' ``trainer_state.json``, run directories and ``metrics.jsonl`` of grpo_fast, JSON lines (verl's,
    W&B's and flat ones), console logs of verl, OpenRLHF and TRL, CSV exports of W&B and TensorBoard, TensorBoard's event
    directories, and plain tables; each of them gzipped or not.

    Args:
        path: the file, or the directory of a run.
        reward_column: column of the reward; guessed from known names without one, and told in ``reward_column``.
        run: which run, where a column tells several apart; the last one without it.

    Raises:
        LogError: no such file, no known format, no column that is surely the reward, or not one reward in it.
    """
    names = Names(reward_column)
    found = read_rows(Path(path), names)
    present = {name for row in found.rows for name in row}
    listed = [name for name in names.all() if name in present or not names.keeps(name)]
    wanted = reward_column
    if wanted is None and found.reward_column in listed:
        wanted = found.reward_column
    try:
        columns = choose_columns(listed, reward_column=wanted)
    except ValueError as error:
        raise LogError(f"{path} ({found.source}): {error}") from error
    if not any(columns.step in row for row in found.rows if columns.reward in row):  # other rows' steps place no reward
        beside = {name for row in found.rows if columns.reward in row for name in row}
        near = choose_columns([name for name in listed if name in beside], reward_column=columns.reward)
        columns = replace(near, others=columns.others)
    notes = list(found.notes)
    if columns.others:
        notes.append(f"other columns that could be meant: {', '.join(columns.others[:6])}")
    rows = _placed(_rows_of(found, run, notes), columns, notes)
    if not np.isfinite(rows.rewards).any():
        raise LogError(f"{path} ({found.source}): column {columns.reward!r} has no number at a known step")
    log = _log(one_run(rows, notes), columns, found, notes=notes)
    notes.extend(_oddities(log))
    return log


def _rows_of(found: RawLog, run: str | None, notes: list[str]) -> list[dict[str, float]]:
    """The rows of one run, where a column names the run of each, without those of evaluations, where one tells them."""
    names = list(dict.fromkeys(found.runs or ()))
    if run is not None and run not in names:
        known = f"it contains {', '.join(names[:8])}" if names else "no column separates runs"
        raise LogError(f"the log has no run {run!r}; {known}")
    rows, splits = found.rows, found.splits
    if found.runs is not None and len(names) > 1:
        chosen = found.runs[-1] if run is None else run
        if run is None:
            listed = ", ".join(names[:6]) + (", ..." if names[6:] else "")
            notes.append(f"the file contains {len(names)} runs ({listed}); {chosen}, the last one, is used. Choose with --run")
        mine = [name == chosen for name in found.runs]
        rows, splits = list(compress(rows, mine)), None if splits is None else list(compress(splits, mine))
    return rows if splits is None else _of_training(rows, splits, notes)


def _of_training(rows: list[dict[str, float]], splits: list[str], notes: list[str]) -> list[dict[str, float]]:
    """Rows without those of evaluations; all of them where there are no others."""
    trained = [_HELD_OUT.match(split) is None for split in splits]
    left_out = len(rows) - sum(trained)
    if left_out in {0, len(rows)}:
        return rows
    notes.append(counted(left_out, "row", "of an evaluation was|were left out"))
    return list(compress(rows, trained))


def _placed(rows: list[dict[str, float]], columns: Columns, notes: list[str]) -> Rows:
    """Rows with a reward and a step. Rewards that are infinite, or far beyond all others, become NaN."""
    rows = [row for row in rows if columns.reward in row]
    nothing = math.nan
    read = {name: np.array([row.get(name, nothing) for row in rows]) for name in _beside(columns)}
    rewards = _within_reason(np.array([row[columns.reward] for row in rows], dtype=np.float64), notes)
    if columns.step is None:
        notes.append("the log has no column of steps; its rows are counted, from 1")
        return Rows(np.arange(1, len(rows) + 1), rewards, read)
    steps = np.array([row.get(columns.step, nothing) for row in rows], dtype=np.float64)
    known = np.isfinite(steps)
    if not known.all():
        notes.append(counted(int((~known).sum()), "reward", "has|have no step and was|were left out"))
    whole = known & (steps >= 0) & (steps == np.floor(steps)) & (steps < 2**62)
    if (known & ~whole).any():
        count = int((known & ~whole).sum())
        notes.append(counted(count, "row", "has|have a step that is negative or not a whole number and was|were left out"))
    return Rows(np.where(whole, steps, 0).astype(np.int64), rewards, read).at(whole)


def _beside(columns: Columns) -> list[str]:
    named = (columns.reward_std, columns.learning_rate, columns.tokens, columns.seconds)
    return [name for name in (*named, *OWN) if name is not None]


def _within_reason(rewards: Floats, notes: list[str]) -> Floats:
    infinite = np.isinf(rewards)
    if infinite.any():
        notes.append(counted(int(infinite.sum()), "reward", "is|are infinite and counts|count as missing"))
    sizes = np.where(np.isfinite(rewards), np.abs(rewards), 0.0)
    usual = float(np.quantile(sizes, 0.95)) if sizes.size > 2 * _FEW else math.inf
    far = ~infinite & (sizes > _FAR * max(usual, 0.01))
    if far.any():
        worst = rewards[far][np.argmax(sizes[far])]
        words = "is|are a hundred times beyond all others and counts|count as missing"
        notes.append(f"{counted(int(far.sum()), 'reward', words)}: {worst:g}")
    return np.where(infinite | far, np.nan, rewards)


def _log(rows: Rows, columns: Columns, found: RawLog, *, notes: list[str]) -> RewardLog:
    def column(name: str | None) -> Floats | None:
        values = None if name is None else rows.others[name]
        return values if values is not None and np.isfinite(values).any() else None

    def sums(name: str | None) -> Floats | None:
        values = column(name)
        return values if name is None or values is None or _are_sums(name, values, rows.steps, notes=notes) else None

    own = found.source == OWN_RUN
    planned, last = found.max_steps, int(rows.steps[-1])
    if planned is not None and planned < last:
        notes.append(f"the log continues to step {last}, past its {planned} planned steps")
        planned = None
    log = RewardLog(
        steps=rows.steps,
        rewards=rows.rewards,
        reward_std=column(columns.reward_std),
        learning_rate=column(columns.learning_rate),
        max_steps=planned,
        source=found.source,
        reward_column=columns.reward,
        step_column=columns.step,
        notes=notes,
        progress=column("progress") if own else None,
        settings=found.settings,
        tokens=sums(columns.tokens),
        device_seconds=sums(columns.seconds),
        money=column("money") if own and np.nanmax(rows.others["money"], initial=0.0) > 0 else None,
        all_wrong=column("frac_reward_all_wrong") if own else None,
        still=column("steps_without_variance") if own else None,
    )
    if log.device_seconds is not None and columns.seconds is not None and plain(columns.seconds) != DEVICE_SECONDS:
        notes.append(f"hours are wall-clock hours, from {columns.seconds!r}: they are device hours if the run used one device")
    rate = log.learning_rate
    return replace(log, learning_rate=None) if rate is not None and not np.nanmax(rate) > 0 else log


def _are_sums(name: str, values: Floats, steps: npt.NDArray[np.int64], *, notes: list[str]) -> bool:
    """Whether a column holds sums since the first step; adds a note if it does not."""
    known = np.isfinite(values)
    values, steps = values[known], steps[known]
    grown = values[-1] * float(steps[0]) >= _LEAST_GROWTH * values[0] * float(steps[-1])
    sure = plain(name) not in _UNCLEAR or (values.size >= _FEW and grown)
    if values[0] >= 0 and (np.diff(values) > 0).all() and sure:
        return True
    notes.append(f"{name!r} is not a running total since the first step; it is not used for costs")
    return False


def _oddities(log: RewardLog) -> list[str]:
    """Notes on the curve for the reader of a forecast."""
    finite = log.rewards[np.isfinite(log.rewards)]
    first, last = int(log.steps[0]), int(log.steps[-1])
    notes = []
    if finite.size < log.rewards.size:
        of = counted(log.rewards.size, "reward", "is|are")
        notes.append(f"{log.rewards.size - finite.size} of {of} NaN and count as missing")
    strides = np.diff(log.steps)
    stride = int(np.median(strides)) if strides.size else 1
    missing = int(np.maximum(0, np.round(strides / max(stride, 1)) - 1).sum())
    if missing:
        notes.append(counted(missing, "step", f"is|are missing between step {first} and step {last}"))
    if first > stride and first > _LONG_BEFORE * (last - first):
        notes.append(f"the log begins at step {first}; earlier steps are unknown")
    if finite.size < _FEW:
        notes.append(f"only {counted(finite.size, 'reward', '')}: too few to say much".replace(" :", ":"))
    if _look_smoothed(finite):
        notes.append("the rewards look smoothed; raw rewards tell more of the end")
    if finite.size > 1 and np.ptp(finite) == 0:
        notes.append(f"the reward is {finite[0]:g} throughout")
    if np.ptp(finite) > _WIDE_SPAN:
        notes.append(f"rewards run from {finite.min():g} to {finite.max():g}: no range is assumed")
    return notes


def _look_smoothed(rewards: Floats) -> bool:
    """Whether a difference of neighbours predicts the next one, as in a smoothed log.

    Where rewards scatter on their own, first differences correlate by -1/2, second ones, which see no trend, by -2/3.
    """
    if rewards.size < _MANY or np.ptp(rewards) == 0:
        return False
    jumps = {order: np.diff(rewards, order) for order in _SMOOTH}
    return all(float(each[1:] @ each[:-1]) > _SMOOTH[order] * float(each @ each) for order, each in jumps.items())
