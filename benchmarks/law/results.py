"""What is published of an evaluation: pooled figures with bootstrap intervals over repositories, and never a reward."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from benchmarks.law.curves import SHAPES, Array, Curve, repositories
from benchmarks.law.evaluate import LEVEL, TARGETS, Record, pooled, tail_of
from benchmarks.law.stopping import Stop

NUM_RESAMPLES = 2000
FORECAST_MEASURES = ("error", "crps", "inside50", "inside90", "width90", "log_score")
STOP_MEASURES = ("saved", "lost", "change", "lost_at_best", "false", "bad", "surely_false", "missed", "utility", "oracle_saved")
PER_RUN = ("saved", "lost", "false", "bad", "surely_false")
_SIZES = ("up to 1B", "1B to 4B", "above 4B", "unknown")

Groups: TypeAlias = dict[str, Callable[[Curve], bool]]
Figure: TypeAlias = list[float | None]


def groups() -> Groups:
    """Whom a table can be about: all curves, those that rise, each class, each size of model, and held-out curves."""
    chosen: Groups = {"all": lambda _: True, "learning": lambda curve: curve.learning}
    chosen |= {f"class: {shape}": lambda curve, shape=shape: curve.shape == shape for shape in SHAPES}
    chosen |= {f"size: {size}": lambda curve, size=size: curve.size_class == size for size in _SIZES}
    return chosen | {"held-out": lambda curve: curve.validation, "training reward": lambda curve: not curve.validation}


def about(curves: Sequence[Curve]) -> dict[str, Any]:
    """Counts that say what the figures rest on."""
    return {
        "curves": len(curves),
        "repositories": len(repositories(curves)),
        "points": sum(curve.rewards.size for curve in curves),
        "without_range": sum(curve.smoothed_range == 0 for curve in curves),
        "classes": dict(sorted(Counter(curve.shape for curve in curves).items())),
        "sizes": dict(sorted(Counter(curve.size_class for curve in curves).items())),
        "held_out": sum(curve.validation for curve in curves),
    }


class Bootstrap:
    """Resamples repositories, the same ones for every figure, so that ratios of figures have intervals too."""

    def __init__(self, names: Sequence[str], *, seed: int = 0) -> None:
        self._column = {name: index for index, name in enumerate(names)}
        self._draws = np.random.default_rng(seed).integers(len(names), size=(NUM_RESAMPLES, len(names)))

    def resampled(self, records: Iterable[Any], measure: str) -> Array:
        """(NUM_RESAMPLES,) pooled measure; NaN where a resample holds no repository with a value."""
        values: dict[str, list[float]] = defaultdict(list)
        for record in records:
            if math.isfinite(value := float(getattr(record, measure))):
                values[record.curve.repository].append(value)
        means = np.full(len(self._column), np.nan)
        for name, found in values.items():
            means[self._column[name]] = np.mean(found)
        drawn = means[self._draws]
        known = np.isfinite(drawn)
        total, count = np.where(known, drawn, 0.0).sum(axis=1), known.sum(axis=1)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def figure(self, records: Sequence[Any], measure: str) -> Figure:
        """Value and 90 % interval, rounded to four digits; None for what cannot be had."""
        value, resamples = pooled(records, measure), self.resampled(records, measure)
        return [rounded(value), *interval(resamples)]


def interval(resamples: Array) -> Figure:
    """5 % and 95 % quantile."""
    known = resamples[np.isfinite(resamples)]
    return [rounded(float(q)) for q in np.quantile(known, [0.05, 0.95])] if known.size else [None, None]


def rounded(value: float) -> float | None:
    """Four digits behind the point; None for NaN, which JSON lacks."""
    return round(value, 4) if math.isfinite(value) else None


def forecast_tables(records: Sequence[Record]) -> dict[str, Any]:
    """Group -> target -> measure -> forecaster -> one figure for each share seen."""
    bootstrap = Bootstrap(repositories([record.curve for record in records]))
    cells: dict[tuple[str, str, str, float], list[Record]] = defaultdict(list)
    chosen = groups()
    for record in records:
        for group, holds in chosen.items():
            if holds(record.curve):
                cells[group, record.target, record.forecaster, record.share].append(record)
    names = list(dict.fromkeys(record.forecaster for record in records))
    shares = sorted({record.share for record in records})
    tables: dict[str, Any] = {}
    for group in chosen:
        if not any(key[0] == group for key in cells):
            continue
        tables[group] = {
            "curves": len({record.curve.name for record in cells[group, LEVEL, names[0], shares[0]]}),
            **{
                target: {
                    measure: {
                        name: [bootstrap.figure(cells[group, target, name, share], measure) for share in shares]
                        for name in names
                    }
                    for measure in FORECAST_MEASURES
                }
                for target in TARGETS
            },
        }
    return tables


def against_best(records: Sequence[Record], name: str, measure: str = "error") -> dict[str, Any]:
    """Ratio of one forecaster's error to the best other one's at each share, with a paired bootstrap interval.

    The rival is the best at that share on these curves: a bar that no single forecaster clears, and that hindsight chooses.
    ``chosen`` is the ratio to what could be had without hindsight: on each repository the rival that is best on all others.
    """
    out: dict[str, Any] = {}
    for group in ("all", "learning"):
        subset = [record for record in records if record.target == LEVEL and groups()[group](record.curve)]
        if not subset:
            continue
        bootstrap = Bootstrap(repositories([record.curve for record in subset]))
        rows = []
        for share in sorted({record.share for record in subset}):
            at = defaultdict(list)
            for record in subset:
                if record.share == share:
                    at[record.forecaster].append(record)
            ours = at.pop(name)
            best = min(at, key=lambda rival: pooled(at[rival], measure))
            ratios = bootstrap.resampled(ours, measure) / bootstrap.resampled(at[best], measure)
            value = pooled(ours, measure) / pooled(at[best], measure)
            row = {"seen": share, "best": best, "ratio": [rounded(value), *interval(ratios)]}
            chosen = _chosen_elsewhere(at, measure)
            if chosen:
                ratios = bootstrap.resampled(ours, measure) / bootstrap.resampled(chosen, measure)
                row["chosen"] = [rounded(pooled(ours, measure) / pooled(chosen, measure)), *interval(ratios)]
            rows.append(row)
        out[group] = rows
    return out


def _chosen_elsewhere(rivals: Mapping[str, Sequence[Record]], measure: str) -> list[Record]:
    """Each repository's records of the rival that is best on all others; none where there is one repository."""
    chosen: list[Record] = []
    sources = sorted({record.curve.repository for records in rivals.values() for record in records})
    for source in sources if len(sources) > 1 else ():
        apart = {name: [one for one in records if one.curve.repository != source] for name, records in rivals.items()}
        best = min(apart, key=lambda rival: pooled(apart[rival], measure))
        chosen += [one for one in rivals[best] if one.curve.repository == source]
    return chosen


def targets(found: dict[str, Any], name: str, confidence: float) -> list[dict[str, Any]]:
    """What was asked of the law before it was judged, what came, and whether that meets it.

    Args:
        found: an evaluation with ``forecasts``, ``against_best`` and ``stopping``.
        name: the law's.
        confidence: of the rule that is meant.
    """
    rows: list[tuple[str, float | None, float, float]] = []
    for group, ratios in found["against_best"]["error"].items():
        early = [row for row in ratios if row["seen"] <= 0.6]
        rows += [(f"error over the best rival's, {group}, {row['seen']:.0%} seen", row["ratio"][0], 0.0, 0.9) for row in early]
    for target in TARGETS:
        for share, figure in zip(found["shares"], found["forecasts"]["all"][target]["inside90"][name], strict=True):
            rows.append((f"coverage of 90 % intervals of the {target}, {share:.0%} seen", figure[0], 0.87, 0.93))
    stops = found["stopping"]["all"][f"{name}, {confidence:g}"]
    rows += [
        ("false stops (over 0.02 lost)", stops["false"][0], 0.0, 0.05),
        ("share of the oracle's saving", stops["share_of_oracle"][0], 0.6, math.inf),
        ("mean reward lost", stops["lost"][0], 0.0, 0.008),
    ]
    return [
        {"target": what, "value": value, "bounds": [low, high if math.isfinite(high) else None], "met": low <= value <= high}
        for what, value, low, high in rows
        if value is not None
    ]


def floor(curves: Sequence[Curve]) -> dict[str, Any]:
    """Level error of one who knows the mean curve: the noise of the observed level itself, in smoothed ranges.

    Where the mean is unknown the scatter of a point comes from second differences and is taken to be white, which is somewhat
    too much: prompts that are drawn without replacement make the means of an epoch steadier.
    """
    out = {}
    for group in ("all", "learning"):
        parts: dict[str, list[float]] = defaultdict(list)
        for curve in curves:
            if groups()[group](curve) and curve.smoothed_range > 0:
                tail = tail_of(curve.rewards.size, LEVEL)
                if curve.mean is None:
                    off = math.sqrt(float(np.mean(np.diff(curve.rewards, 2) ** 2)) / 6 / tail * 2 / math.pi)
                else:
                    off = abs(float((curve.rewards - curve.mean)[-tail:].mean()))
                parts[curve.repository].append(off / curve.smoothed_range)
        out[group] = rounded(float(np.mean([np.mean(values) for values in parts.values()]))) if parts else None
    return out


def by_rise_seen(records: Sequence[Record]) -> dict[str, Any]:
    """Level error on curves that rise, by the share of the whole rise that lay behind when the forecast was made.

    That is what identifies a plateau, and not the share of the budget: with a time constant's worth seen (63 %) noise still
    decides, with two (86 %) the data do.
    """
    edges = (-math.inf, 0.1, 0.39, 0.63, 0.86, math.inf)
    names = list(dict.fromkeys(record.forecaster for record in records))
    rows = []
    for low, high in pairwise(edges):
        inside = [r for r in records if r.target == LEVEL and r.curve.learning and low <= rise_seen(r.curve, r.share) < high]
        row = {"from": rounded(low), "to": rounded(high), "forecasts": sum(r.forecaster == names[0] for r in inside)}
        rows.append(row | {name: rounded(pooled([r for r in inside if r.forecaster == name])) for name in names})
    return {"rows": rows}


def rise_seen(curve: Curve, share: float) -> float:
    """Share of the way from the first level to the last that was behind; the levels are those of hindsight."""
    level = curve.hindsight.level
    there = level[max(0, round(share * level.size) - 1)]
    return float((there - level[0]) / max(curve.hindsight.end - level[0], 1e-9))


def by_repository(records: Sequence[Record], names: Sequence[str]) -> dict[str, Any]:
    """Level error of chosen forecasters in each repository, at each share seen."""
    shares = sorted({record.share for record in records})
    table: dict[str, Any] = {}
    for repository in repositories([record.curve for record in records]):
        inside = [record for record in records if record.curve.repository == repository and record.target == LEVEL]
        table[repository] = {"curves": len({record.curve.name for record in inside})} | {
            name: [rounded(pooled([r for r in inside if r.forecaster == name and r.share == share])) for share in shares]
            for name in names
        }
    return table


def stopping_tables(stops: Sequence[Stop]) -> dict[str, Any]:
    """Group -> rule -> measure -> figure.

    "share_of_oracle" is what is saved over what the oracle saves on the same runs; "per_run" holds plain means, every run once,
    which the large sweeps decide.
    """
    bootstrap = Bootstrap(repositories([stop.curve for stop in stops]))
    names = list(dict.fromkeys(stop.rule for stop in stops))
    tables: dict[str, Any] = {}
    for group, holds in groups().items():
        subset = [stop for stop in stops if holds(stop.curve)]
        if not subset:
            continue
        tables[group] = {"curves": len({(stop.curve.repository, stop.curve.name) for stop in subset})}
        for name in names:
            rule = [stop for stop in subset if stop.rule == name]
            figures = {measure: bootstrap.figure(rule, measure) for measure in STOP_MEASURES}
            possible = pooled(rule, "oracle_saved")
            with np.errstate(invalid="ignore", divide="ignore"):
                ratios = bootstrap.resampled(rule, "saved") / bootstrap.resampled(rule, "oracle_saved")
            share = pooled(rule, "saved") / possible if possible > 0 else math.nan
            plain = {part: rounded(float(np.mean([getattr(stop, part) for stop in rule]))) for part in PER_RUN}
            tables[group][name] = figures | {"share_of_oracle": [rounded(share), *interval(ratios)], "per_run": plain}
    return tables
