"""Fits a prior of your own: finished runs of any tool, pooled on top of the prior in the package.

Every run given by name counts as one; runs that are found in a directory given by name count as one together, so that twenty
seeds of one experiment do not outvote everything else. A run counts only for the part that it has seen: one that its forecast
stopped half-way says nothing about the other half.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grpo_fast.integrations.forecast import facts_of, progress_of, reward_bounds
from grpo_fast.integrations.logs import LogError, RewardLog, read_log
from grpo_fast.integrations.logs.log_rows import LOGS
from grpo_fast.law import Prior, RewardCurve, RunFacts
from grpo_fast.law.beliefs import rise_shares, shape_shares, typical, witnessed_shape
from grpo_fast.law.fitting import Witness, fit_witnesses, level_errors, witness
from grpo_fast.law.prior import SHARES
from grpo_fast.run_dir import SUMMARY_FILE
from grpo_fast.sinks.jsonl import TRAINER_STATE

_FEWEST = 20
_WHOLE = 0.8
_FEWEST_SOURCES = 3
_CUT_SHORT = {"interrupt": "it was interrupted", "user": "it was stopped by hand", "collapse": "it collapsed"}


@dataclass(frozen=True)
class PooledRun:
    """A run that was given for the fit, used or left out.

    Attributes:
        path: where it is.
        source: what it counts with.
        left_out: why it does not count; empty where it does.
        curve: its rewards; None where it does not count.
        said: what it shows, in words.
        notes: remarks on its log.
    """

    path: str
    source: str
    left_out: str = ""
    curve: RewardCurve | None = None
    said: str = ""
    notes: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        curve = self.curve
        return {
            "path": self.path,
            "source": self.source,
            "used": curve is not None,
            "left_out": self.left_out,
            "said": self.said,
            "num_rewards": None if curve is None else int(curve.rewards.size),
            "horizon": None if curve is None else curve.horizon,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class FittedPrior:
    """A fitted prior and how it was fitted.

    Attributes:
        prior: the new one; its ``about`` holds the figures below.
        base: what it was fitted on top of.
        runs: every run, used or left out, in the order given.
        rises: probability of each of :data:`~grpo_fast.law.beliefs.RISES`, before and after, for a run like those.
        shapes: likewise for each of :data:`~grpo_fast.law.shapes.CLASSES`.
        errors: by share of a run, mean error of its last fifth's level in units of the range: with the base, and with a prior
            fitted on the other sources alone; empty below three sources.
        coverage: likewise, how often the 90 % interval held it.
    """

    prior: Prior
    base: Prior
    runs: Sequence[PooledRun]
    rises: Mapping[str, tuple[float, float]]
    shapes: Mapping[str, tuple[float, float]]
    errors: Mapping[float, tuple[float, float]] = field(default_factory=dict)
    coverage: Mapping[float, tuple[float, float]] = field(default_factory=dict)

    @property
    def num_used(self) -> int:
        """Runs that count."""
        return sum(run.curve is not None for run in self.runs)

    @property
    def num_sources(self) -> int:
        """Sources that count."""
        return len({run.source for run in self.runs if run.curve is not None})

    def to_dict(self) -> dict[str, Any]:
        """One JSON object."""

        def pairs(table: Mapping[Any, tuple[float, float]]) -> dict[str, dict[str, float]]:
            return {str(name): {"before": before, "after": after} for name, (before, after) in table.items()}

        return {
            "num_used": self.num_used,
            "num_sources": self.num_sources,
            "runs": [run.to_dict() for run in self.runs],
            "rises": pairs(self.rises),
            "shapes": pairs(self.shapes),
            "level_error": pairs(self.errors) or None,
            "coverage90": pairs(self.coverage) or None,
        }

    def run_words(self) -> list[tuple[str, str, str]]:
        """Rows of a table of runs: path, source, what it says or why it is left out."""
        return [(run.path, _counts_with(run), run.said or f"left out: {run.left_out}") for run in self.runs]

    def belief_words(self) -> list[tuple[str, str, str]]:
        """Rows of a table of what is believed of a run like those, before and after."""
        tables = (("", self.rises), ("shape: ", self.shapes))
        return [
            (f"{prefix}{name}", f"{before:.0%}", f"{after:.0%}")
            for prefix, table in tables
            for name, (before, after) in table.items()
        ]

    def error_words(self) -> list[tuple[str, ...]]:
        """Rows of a table of figures on sources held out: share of the run, errors, and how often intervals held."""
        return [
            (f"{share:.0%} of a run", *(f"{value:.3f}" for value in pair), *(f"{value:.0%}" for value in self.coverage[share]))
            for share, pair in self.errors.items()
        ]

    def verdict(self) -> str:
        """A summary of the figures, in one sentence."""
        if not self.errors:
            return (
                f"{self.num_sources} source{'' if self.num_sources == 1 else 's'}: at least {_FEWEST_SOURCES} are needed to "
                "check whether the new prior forecasts better"
            )
        before, after = (float(np.mean([pair[place] for pair in self.errors.values()])) for place in (0, 1))
        change = 1.0 - after / before if before > 0 else 0.0
        if abs(change) < 0.01:
            return "On held-out sources the new prior forecasts as well as the old one"
        return (
            f"On held-out sources the new prior's error is {abs(change):.0%} {'smaller' if change > 0 else 'larger'}: "
            f"{after:.3f} of the range instead of {before:.3f}" + ("" if change > 0 else "; the old one is the better choice")
        )


def fit_law(paths: Sequence[str | Path], *, base: Prior | None = None, facts: RunFacts | None = None) -> FittedPrior:
    """Pools finished runs into a prior.

    Args:
        paths: run directories, logs, and directories of them.
        base: the prior without them. Default: the prior in the package.
        facts: what holds of every run and its log does not tell.

    Raises:
        LogError: a path that does not exist, or not one run that can be used; all reasons are told.
    """
    base = base or Prior.default()
    runs = [_read(path, source=source, facts=facts or RunFacts()) for source, path in _expanded(paths)]
    used = [run for run in runs if run.curve is not None]
    if not used:
        raise LogError("no run can be used:\n" + "\n".join(f"  {run.path}: {run.left_out}" for run in runs))
    witnesses = [witness(run.curve) for run in used if run.curve is not None]
    fitted = fit_witnesses(witnesses, base=base)
    known = typical(witnesses)
    errors, coverage = _held_out(witnesses, base)
    said = iter(_said(run, one, base) for run, one in zip(used, witnesses, strict=True))
    runs = [run if run.curve is None else dataclasses.replace(run, said=next(said)) for run in runs]
    found = FittedPrior(
        prior=fitted,
        base=base,
        runs=runs,
        rises=_pairs(rise_shares(base, known), rise_shares(fitted, known)),
        shapes=_pairs(shape_shares(base, known), shape_shares(fitted, known)),
        errors=errors,
        coverage=coverage,
    )
    about = {"runs": found.num_used, "sources": found.num_sources, "fitted_on": found.to_dict(), "base": dict(base.about)}
    return dataclasses.replace(found, prior=dataclasses.replace(fitted, about=about))


def _counts_with(run: PooledRun) -> str:
    if run.curve is None:
        return "-"
    return "alone" if run.source == run.path else run.source


def _expanded(paths: Sequence[str | Path]) -> list[tuple[str, Path]]:
    """Each run with the path it was given by."""
    found: list[tuple[str, Path]] = []
    for given in map(Path, paths):
        if not given.exists():
            raise LogError(f"{given} does not exist; give runs, logs, or directories of them")
        whole = not given.is_dir() or any((given / name).is_file() for name in LOGS) or _has_files(given)
        inner = [] if whole else sorted({file.parent for name in LOGS for file in given.glob(f"**/{name}")})
        inner = [path for path in inner if not path.name.startswith("checkpoint-")]
        tables = [] if whole or inner else sorted(given.glob("*.csv"))
        found += [(str(given), path) for path in inner or tables or [given]]
    return found


def _has_files(directory: Path) -> bool:
    return any(directory.glob("*.tfevents.*")) or any(directory.glob(f"checkpoint-*/{TRAINER_STATE}"))


def _read(path: Path, *, source: str, facts: RunFacts) -> PooledRun:
    try:
        log = read_log(path)
    except LogError as error:
        return PooledRun(str(path), source, left_out=str(error))
    known = np.isfinite(log.rewards)
    planned, last = log.max_steps or int(log.steps[-1]), int(log.steps[-1])
    reason = _cut_short(path, last / planned, known=log.max_steps is not None)
    if (count := int(known.sum())) < _FEWEST:
        reason = f"it has {count} reward{'' if count == 1 else 's'}; at least {_FEWEST} are needed"
    if reason:
        return PooledRun(str(path), source, left_out=reason, notes=log.notes)
    return PooledRun(str(path), source, curve=_curve(log, known, planned, source=source, facts=facts), notes=log.notes)


def _cut_short(path: Path, share: float, *, known: bool) -> str:
    """Why a run is no finished one; empty where it is, or where nothing tells."""
    summary = path / SUMMARY_FILE
    if not summary.is_file():
        return f"it is unfinished: {share:.0%} of its steps are logged" if known and share < _WHOLE else ""
    try:
        ended = json.loads(summary.read_text(encoding="utf-8")).get("stopped_by")
    except (ValueError, AttributeError):
        return f"{SUMMARY_FILE} cannot be read"
    if ended == "collapse" or share < _WHOLE:
        return _CUT_SHORT.get(str(ended), "")
    return ""


def _curve(log: RewardLog, known: Any, planned: int, *, source: str, facts: RunFacts) -> RewardCurve:
    notes: list[str] = []
    own = log.settings
    facts = facts_of(facts, own)
    bounds = own.reward_range if own.reward_range is not None else reward_bounds(log, facts.start, notes)
    return RewardCurve(
        rewards=log.rewards[known],
        progress=progress_of(log, planned, notes)[known],
        horizon=planned,
        source=source,
        reward_range=bounds,
        facts=facts,
        num_prompts=own.num_prompts,
        num_generations=own.num_generations,
    )


def _said(run: PooledRun, one: Witness, base: Prior) -> str:
    """Start and end of a run, and the class of shapes that it supports."""
    assert run.curve is not None
    shape, sure = witnessed_shape(one, base)
    rewards = run.curve.rewards
    start, share = float(rewards[: max(3, rewards.size // 20)].mean()), float(run.curve.progress[-1])
    seen = "" if share > 0.99 else f", logged up to {share:.0%} of the budget"
    return f"from {start:.3g} to {one.level:.3g}{seen}; {shape} ({sure:.0%})"


def _pairs(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    return {name: (before[name], after[name]) for name in before}


def _held_out(
    witnesses: Sequence[Witness], base: Prior
) -> tuple[dict[float, tuple[float, float]], dict[float, tuple[float, float]]]:
    """Errors and coverage on each source by a prior that has not seen it; each source counts as one."""
    sources = sorted({one.source for one in witnesses})
    if len(sources) < _FEWEST_SOURCES:
        return {}, {}
    tables = []
    for source in sources:
        inside = [one for one in witnesses if one.source == source]
        other = fit_witnesses([one for one in witnesses if one.source != source], base=base)
        tables.append([[np.mean([level_errors(prior, one) for one in inside], axis=0)] for prior in (base, other)])
    found = np.mean(np.array(tables), axis=0)[:, 0]  # (prior, share, error or held)
    errors, held = (
        {share: (float(found[0, place, kind]), float(found[1, place, kind])) for place, share in enumerate(SHARES)}
        for kind in (0, 1)
    )
    return errors, held
