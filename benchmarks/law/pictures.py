"""Pictures of an evaluation: errors, coverage, what stops save and lose, and forecasts of simulated runs against what came."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.law.curves import Curve
from benchmarks.law.evaluate import FINAL, LEVEL, Forecaster, num_seen, seen_of

mpl.use("Agg")

_OURS, _MEAN, _TRUTH = "#c1272d", "#555555", "#111111"
_MARKS = "ovs^D<P>Xph"
_PAIRS = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
_COLOURS = (*_PAIRS[::2], *_PAIRS[1::2])  # the pale ones last
_DPI = 120
_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def errors(tables: dict[str, Any], shares: Sequence[float], ours: str, path: Path) -> None:
    """Level error by share seen, every forecaster, on all curves and on those that rise."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.6), sharey=True)
    rivals = [name for name in tables["all"][LEVEL]["error"] if name != ours]
    for axis, group in zip(axes, ("all", "learning"), strict=True):
        if group not in tables:
            axis.set_title(f"{group}: no curve")
            continue
        rows = tables[group][LEVEL]["error"]
        for index, name in enumerate(rivals):
            values = [value[0] for value in rows[name]]
            mark, colour = _MARKS[index % len(_MARKS)], _COLOURS[index % len(_COLOURS)]
            axis.plot(shares, values, mark, ls="-", ms=4, lw=1, color=colour, label=name)
        middle, low, high = np.array(rows[ours], dtype=float).T
        axis.fill_between(shares, low, high, color=_OURS, alpha=0.12, lw=0)
        axis.plot(shares, middle, marker="o", lw=2.6, color=_OURS, label=f"{ours}, 90 % interval\nover repositories")
        axis.set(title=f"{group} ({tables[group]['curves']} curves)", xlabel="share of the run seen", ylim=(0, None))
        _shares(axis, shares)
        axis.grid(alpha=0.2)
    axes[0].set(ylabel="|level error| / smoothed range")
    axes[1].legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _saved(figure, path)


def coverage(tables: dict[str, Any], shares: Sequence[float], ours: str, path: Path) -> None:
    """How often the 50 % and 90 % intervals held what came, and how wide the latter are beside those of the rivals."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for target, style, aside in ((LEVEL, "-", -0.004), (FINAL, "--", 0.004)):
        for measure, nominal, colour in (("inside50", 0.5, "#1f77b4"), ("inside90", 0.9, _OURS)):
            middle, low, high = np.array(tables["all"][target][measure][ours], dtype=float).T
            label = f"{nominal:.0%} interval of the {target}"
            where = np.asarray(shares) + aside
            left.errorbar(where, middle, yerr=[middle - low, high - middle], ls=style, color=colour, capsize=3, label=label)
            left.axhline(nominal, color=colour, lw=0.8, ls=":")
    label = "rivals, with the errors they made elsewhere"
    for name, figures in tables["all"][LEVEL]["width90"].items():
        widths = [value[0] for value in figures]
        if name != ours and None not in widths:
            right.plot(shares, widths, marker=".", color="#aaaaaa", lw=0.8, label=label)
            label = "_"
    right.plot(
        shares, [value[0] for value in tables["all"][LEVEL]["width90"][ours]], marker="o", color=_OURS, lw=2.6, label=ours
    )
    left.set(ylim=(0, 1.02), xlabel="share of the run seen", ylabel="share of truths inside")
    right.set(ylim=(0, None), xlabel="share of the run seen", ylabel="width of the 90 % interval / smoothed range")
    for axis in (left, right):
        _shares(axis, shares)
        axis.grid(alpha=0.2)
        axis.legend(fontsize=8, frameon=False)
    _saved(figure, path)


def stops(tables: dict[str, Any], ours: str, path: Path, *, group: str = "all") -> None:
    """Compute saved against reward lost and against false stops; the law's confidences are joined by a line."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5))
    rows = {name: row for name, row in tables[group].items() if isinstance(row, dict)}
    for axis, measure in zip(axes, ("lost", "false"), strict=True):
        at = {name: (row["saved"][0], row[measure][0]) for name, row in rows.items()}
        line = [place for name, place in at.items() if name.startswith(f"{ours}, ")]
        axis.plot(*zip(*line, strict=True), color=_OURS, lw=2, zorder=1, label=f"{ours}, by the confidence it demands")
        for index, (name, place) in enumerate(at.items()):
            mine = name.startswith(f"{ours}, ")
            axis.scatter(*place, color=_OURS if mine else _TRUTH if "oracle" in name else _MEAN, s=28, zorder=2)
            left = place[0] > 0.6 and not mine
            axis.annotate(
                name.removeprefix(f"{ours}, "),
                place,
                xytext=(-6 if left else 6, -10 if mine or index % 2 else 3),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=8,
                color=_OURS if mine else _TRUTH,
            )
        axis.set(xlabel="share of the compute saved", xlim=(0, 1), ylim=(0, 1.12 * max(0.01, *(y for _, y in at.values()))))
        axis.grid(alpha=0.2)
        axis.legend(fontsize=8, frameon=False, loc="upper left")
    axes[0].set(ylabel="mean reward lost")
    axes[1].set(ylabel="share of runs that lose over 0.02")
    axes[1].axhline(0.05, color=_TRUTH, lw=0.8, ls=":")
    _saved(figure, path)


def examples(curves: Sequence[Curve], forecaster: Forecaster, path: Path) -> None:
    """Forecasts at 20, 40 and 60 % of runs against what came: one row a run, its true mean where that is known."""
    figure, axes = plt.subplots(len(curves), 3, figsize=(11, 2.5 * len(curves)), sharex="row", squeeze=False)
    for row, curve in zip(axes, curves, strict=True):
        size = curve.rewards.size
        for axis, share in zip(row, (0.2, 0.4, 0.6), strict=True):
            kept = num_seen(size, share)
            ahead = np.linspace(kept, size - 1, 12).round().astype(int)
            predictions = forecaster.forecast(seen_of(curve, kept), [curve.steps[i : i + 1] for i in ahead])
            bands = np.array([_quantiles(prediction.samples, prediction.weights) for prediction in predictions]).T
            steps = curve.steps[ahead]
            axis.plot(curve.steps[:kept], curve.rewards[:kept], ".", ms=2, color=_MEAN)
            axis.plot(curve.steps[kept:], curve.rewards[kept:], ".", ms=2, color="#cccccc")
            axis.fill_between(steps, bands[0], bands[4], color=_OURS, alpha=0.15, lw=0)
            axis.fill_between(steps, bands[1], bands[3], color=_OURS, alpha=0.25, lw=0)
            axis.plot(steps, bands[2], color=_OURS, lw=1.6)
            if curve.mean is not None:
                axis.plot(curve.steps, curve.mean, color=_TRUTH, lw=1)
            axis.axvline(curve.steps[kept - 1], color=_TRUTH, lw=0.6, ls=":")
            axis.set_ylim(-0.02, 1.02) if curve.unit_interval else None
        row[0].set_ylabel(f"{curve.task or curve.name}\n({curve.shape})", fontsize=8)
    for axis, share in zip(axes[0], (0.2, 0.4, 0.6), strict=True):
        axis.set_title(f"{share:.0%} seen", fontsize=9)
    _saved(figure, path)


def _shares(axis: Any, shares: Sequence[float]) -> None:
    axis.set_xticks(shares)
    axis.set_xticklabels([f"{share:.0%}" for share in shares])


def _quantiles(samples: Any, weights: Any) -> list[float]:
    if samples is None:
        raise ValueError("a bare guess has no band to draw; give a forecaster with samples")
    order = np.argsort(samples)
    mass = np.full(samples.size, 1.0 / samples.size) if weights is None else np.asarray(weights)
    centre = np.cumsum(mass[order]) - 0.5 * mass[order]
    return [float(value) for value in np.interp(_LEVELS, centre, samples[order])]


def _saved(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    plt.close(figure)
