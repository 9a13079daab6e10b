"""One run from the rows of a file: ascending steps, each once; notes say what had to be done for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grpo_fast.integrations.logs.raw_log import counted

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

_SHARED = 1.5


@dataclass(frozen=True)
class Rows:
    """Rows of a log that have a step and a reward, NaN among the rewards.

    Attributes:
        steps: (n,) as written, whole numbers from 0 on.
        rewards: (n,).
        others: (n,) each: further columns, NaN where a row has none.
    """

    steps: Whole
    rewards: Floats
    others: Mapping[str, Floats]

    def at(self, places: Whole | npt.NDArray[np.bool_]) -> Rows:
        """Some of the rows."""
        return Rows(self.steps[places], self.rewards[places], {name: values[places] for name, values in self.others.items()})


def one_run(rows: Rows, notes: list[str]) -> Rows:
    """The last run of a file, each step once, ascending from 1 or later.

    Rows that share a step are averaged where that is the rule in the log (one row a micro-batch or a prompt); where it is the
    exception the later row wins, as it does over what a resumed run did again and over a whole earlier run.
    """
    if not rows.steps.size:
        return rows
    if not (np.diff(rows.steps) > 0).all():
        rows = _in_order(_without_blanks(rows), notes)
    if rows.steps[0] == 0:
        notes.append("steps count from 0 in this log; 1 is added to each")
        rows = Rows(rows.steps + 1, rows.rewards, rows.others)
    return rows


def _in_order(rows: Rows, notes: list[str]) -> Rows:
    changes = np.concatenate([[True], np.diff(rows.steps) != 0])
    if rows.steps.size >= _SHARED * changes.sum():
        rows = _averaged(rows, np.flatnonzero(changes), notes)
    if np.unique(rows.steps).size == rows.steps.size:
        order = np.argsort(rows.steps, kind="stable")
        if (np.diff(rows.steps) < 0).any():
            notes.append("the rows were not in the order of their steps and were sorted")
        return rows.at(order)
    return rows.at(_newest(rows.steps, notes))


def _without_blanks(rows: Rows) -> Rows:
    """Leaves out rows without a reward if another row of their step has one: evaluations leave such rows in exports."""
    begins = np.flatnonzero(np.concatenate([[True], np.diff(rows.steps) != 0]))
    known = np.isfinite(rows.rewards)
    sizes = np.diff(np.append(begins, rows.steps.size))
    return rows.at(known | ~np.repeat(np.logical_or.reduceat(known, begins), sizes))


def _averaged(rows: Rows, begins: Whole, notes: list[str]) -> Rows:
    """Means of neighbours of one step; NaN counts for nothing."""
    notes.append(f"{rows.steps.size} rows share {counted(begins.size, 'step', 'and|and')} were averaged")
    return Rows(
        rows.steps[begins],
        _means(rows.rewards, begins),
        {name: _means(values, begins) for name, values in rows.others.items()},
    )


def _means(values: Floats, begins: Whole) -> Floats:
    known = np.isfinite(values)
    total = np.add.reduceat(np.where(known, values, 0.0), begins)
    count = np.add.reduceat(known.astype(np.float64), begins)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _newest(steps: Whole, notes: list[str]) -> Whole:
    """Places of the rows that count: later rows win."""
    kept: list[int] = []
    repeated = runs = 0
    resumed: list[int] = []
    written = steps.tolist()
    for place, step in enumerate(written):
        if kept and step == written[kept[-1]]:
            repeated += 1
            kept.pop()
        elif kept and step <= written[kept[0]]:
            runs += 1
            kept = []
        elif kept and step < written[kept[-1]]:
            resumed.append(step)
            while written[kept[-1]] >= step:
                kept.pop()
        kept.append(place)
    if repeated:
        notes.append(counted(repeated, "step", "was|were written again; the later row was used"))
    if resumed:
        shown = ", ".join(map(str, resumed[:5])) + (", ..." if resumed[5:] else "")
        times = "once" if len(resumed) == 1 else f"{len(resumed)} times"
        notes.append(f"the run was resumed {times}, at step {shown}; of repeated steps the later row was used")
    if runs:
        notes.append(f"the file contains {runs + 1} runs one after the other; the last one is used")
    return np.array(kept, dtype=np.int64)
