"""The picture of a plan: the rewards that are expected, what may come of the run, and what it will cost.

It reads the plan as the JSON object that ``grpo-fast plan --json`` prints.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grpo_fast.report.theme import LIGHT, Theme, bare, drawing, dress, key, note, png, title, x_label
from grpo_fast.run_dir import naming
from grpo_fast.sinks.quantities import COST_WORDS, percent

_RISING = ("rises to a plateau", "peaks and falls back", "still rises at the end")


def plot_plan(plan: Mapping[str, Any], theme: Theme = LIGHT) -> Figure:
    """Draws a plan."""
    figure = Figure(figsize=(theme.width, 6.6), dpi=100, layout="constrained", facecolor=theme.paper)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.07, wspace=0.03, hspace=0.05)  # type: ignore[union-attr, call-arg]
    spec = figure.add_gridspec(3, 2, height_ratios=(3, 0.75, 1.8), width_ratios=(1, 1.6))
    rewards = figure.add_subplot(spec[0, :])
    when = figure.add_subplot(spec[1, :], sharex=rewards)
    ways, costs = (figure.add_subplot(spec[2, place]) for place in (0, 1))
    for axis in (rewards, when, ways, costs):
        dress(axis, theme)
    _draw_rewards(rewards, plan, theme)
    _draw_when(when, plan, theme)
    _draw_ways(ways, plan, theme)
    _draw_costs(costs, plan, theme)
    return figure


def headline(plan: Mapping[str, Any]) -> str:
    """The title of the plot, in one sentence."""
    last, known = plan["trajectory"][-1], plan["known"]
    began = "an unknown start" if known["start_reward"] is None else f"{known['start_reward']:.3g}"
    return (
        f"From {began} to {last['median']:.2g} ({last['low']:.2g} to {last['high']:.2g}) at step {last['step']:,}; plateau "
        f"within the budget: {percent(plan['plateau']['probability_within_budget'])}"
    )


def _draw_rewards(axis: Axes, plan: Mapping[str, Any], theme: Theme) -> None:
    path = {name: np.array(values, dtype=np.float64) for name, values in plan["path"].items()}
    step = path["step"]
    axis.fill_between(step, path["low"], path["high"], color=theme.forecast, alpha=0.15, lw=0, label="90 % interval")
    axis.fill_between(step, path["low50"], path["high50"], color=theme.forecast, alpha=0.28, lw=0, label="50 % interval")
    axis.plot(step, path["median"], color=theme.forecast, lw=2.0, label="mean reward, median", zorder=4)
    start = plan["known"]["start_reward"]
    if start is not None:
        error = plan["known"]["start_reward_error"] or 0.0
        axis.errorbar(
            [0],
            [start],
            yerr=[1.645 * error],
            fmt="o",
            ms=6,
            color=theme.data,
            capsize=3,
            label="start",
            zorder=6,
            clip_on=False,
        )
    axis.set_xlim(0, step[-1])
    axis.set_ylabel("mean reward", fontsize=9, color=theme.muted)
    axis.tick_params(labelbottom=False)
    axis.set_title(headline(plan), loc="left", fontsize=10.5, color=theme.ink, fontweight="bold", pad=24)
    key(axis, theme)


def _draw_when(axis: Axes, plan: Mapping[str, Any], theme: Theme) -> None:
    """Steps at which shares of the rise are done, over the runs that rise: half of them in the bar, nine in ten in the line."""
    axis.grid(visible=False)
    end = axis.get_xlim()[1]
    for row, share in enumerate(("x95", "x80")):
        steps = plan["plateau"][share]["step"]
        if steps["low"] is None or steps["low"] > end:
            axis.text(end, row, "beyond the budget", ha="right", va="center", fontsize=8.5, color=theme.muted)
            continue
        places = {name: end if value is None else min(value, end) for name, value in steps.items()}
        _whisker(axis, places, row, theme=theme)
        if steps["high"] is None:
            axis.plot([end], [row], marker=">", ms=6, color=theme.data, clip_on=False, zorder=5)
        if steps["median"] is not None:
            words = f"step {steps['median']:,.0f}"
            axis.text(places["median"], row + 0.22, words, ha="center", va="bottom", fontsize=8.5, color=theme.ink)
    axis.set_yticks([0, 1], ["95 % of the rise", "80 % of the rise"], color=theme.ink)
    axis.set_ylim(-0.5, 1.75)
    x_label(axis, "step", theme)


def _whisker(axis: Axes, places: Mapping[str, float], row: float, *, theme: Theme) -> None:
    style: dict[str, Any] = {"color": theme.data, "solid_capstyle": "butt"}
    axis.plot([places["low"], places["high"]], [row, row], lw=1.2, zorder=2, **style)
    axis.plot([places["low50"], places["high50"]], [row, row], lw=4.5, alpha=0.55, zorder=3, **style)
    axis.plot([places["median"]], [row], "o", ms=6, mec=theme.paper, mew=1.2, zorder=4, **style)


def _draw_ways(axis: Axes, plan: Mapping[str, Any], theme: Theme) -> None:
    """Probabilities of what may come, one bar each."""
    title(axis, "How the run may go", theme)
    bare(axis)
    ways = plan["outcomes"]
    names = list(ways)[::-1]
    colors = [theme.data if name in _RISING else theme.muted for name in names]
    axis.barh(range(len(names)), [ways[name] for name in names], color=colors, height=0.58)
    axis.set_yticks(range(len(names)), names, color=theme.ink)
    for row, name in enumerate(names):
        axis.text(ways[name] + 0.012, row, percent(ways[name]), va="center", fontsize=8.5, color=theme.muted)
    axis.set_xlim(0, 1.3 * max(ways.values()))


def _draw_costs(axis: Axes, plan: Mapping[str, Any], theme: Theme) -> None:
    """The whole run's costs: each as its median, with the 90 % interval in multiples of it."""
    num_devices = plan["known"]["num_devices"]
    title(axis, f"What it costs, on {num_devices} x {_short(plan['device'])}", theme)
    bare(axis)
    shown = {name: plan["costs"][name]["run"] for name in COST_WORDS if plan["costs"][name] is not None}
    if num_devices == 1:
        shown.pop("wall_hours", None)
    names = list(shown)[::-1]
    shares = [{key: found / shown[name]["median"] for key, found in shown[name].items()} for name in names]
    reach = 1.15 * max([2.0, *(1 / share["low"] for share in shares), *(share["high"] for share in shares)])
    axis.set_xscale("log")
    for row, (name, share) in enumerate(zip(names, shares, strict=True)):
        _whisker(axis, share, row, theme=theme)
        unit = COST_WORDS[name][1]
        low, middle, high = (unit(shown[name][key]) for key in ("low", "median", "high"))
        axis.text(reach, row, middle, va="center", ha="left", fontsize=9, color=theme.ink, fontweight="bold")
        axis.text(reach**2.75, row, f"{low} to {high}", va="center", ha="left", fontsize=8.5, color=theme.muted)
    axis.set_yticks(range(len(names)), [COST_WORDS[name][0] for name in names], color=theme.ink)
    axis.set_ylim(-0.6, max(len(names), 4) - 0.4)
    axis.set_xlim(1 / reach, reach**5.2)
    axis.set_xticks([])
    axis.minorticks_off()
    if plan["costs"]["wall_hours"] is None:
        words = "time and money are unknown: measure a step with --probe, or give --seconds-per-step"
        note(axis, (0.5, -0.02), "\n".join(textwrap.wrap(words, 52)), color=theme.muted, ha="center", va="top")


def _short(device: str) -> str:
    return device if len(device) <= 28 else device[:27] + "..."


def write_plan_plot(path: Path, plan: Mapping[str, Any]) -> None:
    """Writes the picture as a PNG file."""
    with drawing(), naming(path):
        path.write_bytes(png(plot_plan(plan)))
