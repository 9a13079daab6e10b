"""The plot of a run's costs, and of what is left of its budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grpo_fast.report.run import Run, as_number
from grpo_fast.report.theme import LIGHT, Theme, bare, dress, grid, note, title
from grpo_fast.sinks.quantities import duration, percent, si, significant


def plot_compute(run: Run, theme: Theme = LIGHT) -> Figure:
    """Seconds and FLOPs by phase, and what was spent of the whole budget and what was saved."""
    saved = _saved(run)
    columns = theme.columns(2)
    bars = 2 // columns
    rows = bars + bool(saved)
    ratios = [1.5] * bars + [0.35 + 0.26 * len(saved)] * bool(saved)
    figure, axes = grid(theme, rows, columns, height=0.5 + 1.45 * sum(ratios), ratios=ratios)
    _draw_bars(axes[0], run.seconds_by_phase(), theme, words="Wall-clock time by phase", unit=duration)
    _draw_bars(axes[1], run.flops_by_phase(), theme, words="Model FLOPs by phase", unit=lambda value: si(value, "FLOP"))
    if saved:
        for axis in axes[2:]:
            axis.remove()
        _draw_saved(figure.add_subplot(figure.axes[0].get_gridspec()[rows - 1, :]), saved, theme)  # type: ignore[index]
    return figure


def _draw_bars(axis: Axes, parts: Mapping[str, float], theme: Theme, *, words: str, unit: Callable[[float], str]) -> None:
    title(axis, words, theme)
    bare(axis)
    names = sorted(parts, key=parts.__getitem__)
    total = sum(parts.values())
    if not total:
        note(axis, (0.5, 0.5), "not measured", color=theme.muted, ha="center", va="center")
        axis.set_yticks([])
        return
    values = [parts[name] for name in names]
    axis.barh(range(len(names)), values, color=theme.data, height=0.58)
    axis.set_yticks(range(len(names)), names, color=theme.ink)
    axis.set_ylim(-0.6, max(len(names), 4) - 0.4)
    for row, value in enumerate(values):
        axis.text(
            value + 0.015 * max(values),
            row,
            f"{unit(value)}, {percent(value / total)}",
            va="center",
            fontsize=8.5,
            color=theme.muted,
        )
    axis.set_xlim(0, max(values) * (1.85 if theme.narrow else 1.62))


def _saved(run: Run) -> dict[str, tuple[float, str, str]]:
    """By kind of cost: spent share, spent amount and saved amount in words; empty where nothing was saved."""
    saved = (run.summary or {}).get("saved") or {}
    compute = (run.summary or {}).get("compute") or {}
    kinds: dict[str, tuple[str, Callable[[float], str]]] = {
        "flops": ("FLOPs", lambda value: si(value, "FLOP")),
        "gpu_hours": ("device time", lambda value: duration(3600 * value)),
        "money": ("money", significant),
    }
    rows = {}
    share, unused = as_number(saved.get("steps")), run.max_steps - run.last_step
    if 0 < share < 1 and unused > 0:
        rows["steps"] = (1 - share, f"{run.last_step} done", f"{unused} {'not run' if run.is_over else 'to come'}")
    for name, (words, unit) in kinds.items():
        spent, kept = as_number(compute.get(name)), as_number(saved.get(name))
        if spent > 0 and kept > 0:
            rows[words] = (
                spent / (spent + kept),
                f"{unit(spent)} spent",
                f"about {unit(kept)} {'saved' if run.is_over else 'to come'}",
            )
    return rows


def _draw_saved(axis: Axes, rows: Mapping[str, tuple[float, str, str]], theme: Theme) -> None:
    dress(axis, theme)
    title(axis, "Spent and left" if theme.narrow else "Spent and left, of what all steps would have taken", theme)
    bare(axis)
    names = list(rows)[::-1]
    places, spent = range(len(names)), [rows[name][0] for name in names]
    axis.barh(places, spent, color=theme.data, height=0.56)
    rest = [1 - share for share in spent]
    axis.barh(places, rest, left=spent, facecolor=theme.phases[0], edgecolor=theme.faint, hatch="///", height=0.56, lw=0)
    axis.set_yticks(places, names, color=theme.ink)
    box = {"facecolor": theme.paper, "alpha": 0.9, "lw": 0, "pad": 1.5}
    for row, name in enumerate(names):
        share, done, kept = rows[name]
        if share > (0.3 if theme.narrow else 0.2):
            done = done.removesuffix(" spent") if theme.narrow else done
            axis.text(0.012, row, done, va="center", fontsize=8.5, color=theme.paper, fontweight="bold")
        kept = kept.removeprefix("about ").removesuffix(" saved").removesuffix(" to come") if theme.narrow else kept
        axis.text(0.99, row, f"{kept}, {percent(1 - share)}", va="center", ha="right", fontsize=8.5, color=theme.ink, bbox=box)
    axis.set_xlim(0, 1)
