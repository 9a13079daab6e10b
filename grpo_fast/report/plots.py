"""The pictures of a run, drawn with matplotlib's object interface: no global state, no display."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from grpo_fast.report.belief_plots import ahead_of, draw_sureness, has_alarm, has_beliefs, plot_alarm, plot_beliefs
from grpo_fast.report.costs import plot_compute
from grpo_fast.report.run import Run, as_number, smoothed
from grpo_fast.report.theme import (
    KEY_STYLE,
    LIGHT,
    PHASE_NAMES,
    Theme,
    grid,
    key,
    note,
    title,
    value_limits,
    x_label,
)
from grpo_fast.sinks.quantities import percent

CUTS = (0.2, 0.4, 0.6, 0.8)
"""Shares of the run at which beliefs are shown."""

HEALTH: tuple[tuple[str, str, bool], ...] = (
    ("entropy", "Entropy, nats", False),
    ("kl", "KL to reference, nats", False),
    ("grad_norm", "Gradient norm", True),
    ("completions/mean_length", "Length, tokens", False),
    ("frac_reward_zero_std", "Zero-variance groups", False),
    ("completions/clipped_ratio", "Cut completions", False),
    ("clip_ratio/region_mean", "Clipped tokens", False),
    ("sampling/sampling_logp_difference/mean", "Sampler gap, nats", False),
)
"""Metric, its words, and whether it may need a logarithmic axis."""

_SHARES = {"frac_reward_zero_std", "completions/clipped_ratio", "clip_ratio/region_mean"}


def belief_steps(run: Run) -> list[int]:
    """Steps at 20, 40, 60 and 80 % of the steps done, as far as they differ; empty where no forecast was made."""
    if not run.forecasts:
        return []
    targets = [math.ceil(share * run.last_step) for share in CUTS]
    places = np.minimum(np.searchsorted(run.steps, targets), run.steps.size - 1)
    return sorted({int(step) for step in run.steps[places]})


def view_end(run: Run) -> int:
    """The last step that pictures show: the end of the budget, or twice the steps done where nothing is foretold beyond."""
    return run.max_steps if run.forecasts else min(run.max_steps, max(10, 2 * run.last_step))


def phase_spans(run: Run) -> list[tuple[str, int, int]]:
    """Where the forecasts saw slow start, rapid improvement and plateau: ``(name, first step, last step)``.

    The forecasts' own words may flicker from step to step. The two borders are those, in this order of phases, that agree with
    most of them.
    """
    if not run.forecasts:
        return []
    labels = np.array([[row.get("phase") == name for name in PHASE_NAMES] for row in run.forecasts], dtype=np.int64)
    counts = np.concatenate([np.zeros((1, 3), dtype=np.int64), labels.cumsum(axis=0)])
    early = counts[:, 0] - counts[:, 1]
    late = counts[:, 1] - counts[:, 2]
    second = int(np.argmax(np.maximum.accumulate(early) + late))
    first = int(np.argmax(early[: second + 1]))
    steps = [int(row["step"]) for row in run.forecasts]
    edges = [0, *(steps[index] if index < len(steps) else run.last_step for index in (first, second)), run.last_step]
    edges[1] = 0 if first == 0 else edges[1]
    edges[2] = 0 if second == 0 else edges[2]
    spans = zip(PHASE_NAMES, edges[:3], edges[1:], strict=True)
    return [(name, start, end) for name, start, end in spans if end > start]


def plot_forecasts(run: Run, theme: Theme = LIGHT) -> Figure:
    """The forecast as it was believed at 20, 40, 60 and 80 % of the run, beside what came; one panel where there is none."""
    cuts = belief_steps(run) or [run.last_step]
    columns = theme.columns(min(2, len(cuts)))
    rows = math.ceil(len(cuts) / columns)
    figure, axes = grid(theme, rows, columns, height=0.5 + 2.5 * rows, sharex=True, sharey=True)
    believed = [run.forecast_at(cut) for cut in cuts]
    bounds = [value for row in believed if row for name in ("low", "high") for value in row["band"][name] if value is not None]
    axes[0].set_ylim(*value_limits(run.metric("reward"), run.metric("eval_reward"), beliefs=bounds))
    axes[0].set_xlim(0, view_end(run) * 1.01)
    for axis, cut, forecast in zip(axes, cuts, believed, strict=False):
        _draw_rewards(axis, run, theme, until=cut)
        if forecast is None:
            words = "no forecast yet" if run.forecasts else "no forecast was made"
            note(axis, (0.98, 0.04), words, color=theme.muted, ha="right", va="bottom")
        else:
            _draw_belief(axis, run, forecast, theme=theme)
        title(axis, f"After step {cut}, {percent(cut / run.last_step)} of the run", theme)
    for axis in axes[len(cuts) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(cuts) - columns) : len(cuts)]:
        x_label(axis, "step", theme)
    handles: list[Line2D | Patch] = [Line2D([], [], color=theme.data, lw=1.8, label="reward until then")]
    if cuts[0] < run.last_step:
        handles.append(Line2D([], [], color=theme.faint, marker="o", ms=4, lw=0, label="what came later"))
    if run.has("eval_reward"):
        handles.append(Line2D([], [], color=theme.held_out, marker="D", ms=4.5, lw=0, label="held-out"))
    if any(believed):
        handles.append(Patch(color=theme.forecast, alpha=0.3, lw=0, label="forecast, 90 % band"))
        handles.append(
            Line2D([], [], color=theme.ink, lw=1.0, ls=(0, (1, 2)), label="where it ended" if run.stopped_by else "level now")
        )
    figure.legend(
        handles=handles, loc="outside upper left", ncols=theme.columns(len(handles), 2), **KEY_STYLE, labelcolor=theme.ink
    )
    return figure


def _draw_rewards(axis: Axes, run: Run, theme: Theme, *, until: int) -> None:
    """Rewards and evaluations up to a step, and what came later without colour."""
    rewards, seen = run.metric("reward"), run.steps <= until
    size = 5.0 if run.steps.size < 30 else 2.6
    axis.plot(run.steps[~seen], rewards[~seen], "o", ms=size - 0.4, color=theme.faint, mew=0, zorder=1)
    axis.plot(run.steps[seen], rewards[seen], "o", ms=size, color=theme.data, alpha=0.35, mew=0, zorder=2)
    axis.plot(run.steps[seen], smoothed(rewards[seen]), color=theme.data, lw=1.8, label="reward", zorder=4)
    evaluations = run.metric("eval_reward")
    tested = seen & np.isfinite(evaluations)
    if tested.any():
        style: dict[str, Any] = {"ms": 5.0, "color": theme.held_out, "mec": theme.paper, "mew": 0.8}
        axis.plot(run.steps[tested], evaluations[tested], "D", label="held-out", zorder=6, **style)


def _draw_belief(axis: Axes, run: Run, forecast: Mapping[str, object], *, theme: Theme) -> None:
    """Band and median, the level that was reached, and whether the interval held it."""
    step, low, median, high = ahead_of(forecast)
    made_at = int(forecast["step"])  # type: ignore[call-overload]
    axis.fill_between(step, low, high, color=theme.forecast, alpha=0.2, lw=0, label="forecast, 90 % band", zorder=3)
    axis.plot(step, median, color=theme.forecast, lw=1.6, zorder=5)
    axis.axvline(made_at, color=theme.muted, lw=0.9, zorder=2)
    values = {name: as_number(forecast.get(name)) for name in ("median", "low", "high")}
    words = "for the end {median:.3f} ({low:.3f} to {high:.3f})".format(**values)
    final = run.final_reward
    if math.isfinite(final):
        axis.axhline(final, color=theme.ink, lw=1.0, ls=(0, (1, 2)), zorder=3)
        if run.stopped_by is not None:
            words += f"\nended at {final:.3f}: {'inside' if values['low'] <= final <= values['high'] else 'outside'}"
    if not forecast.get("identifiable", True):
        words = f"not identifiable yet\n{words}"
    settings = {"facecolor": theme.paper, "alpha": 0.75, "lw": 0, "pad": 1.5}
    note(axis, (0.98, 0.05), words, color=theme.forecast, ha="right", va="bottom", bbox=settings, zorder=8, linespacing=1.35)


def plot_phases(run: Run, theme: Theme = LIGHT) -> Figure:
    """Reward over the whole budget, phases shaded, the end marked and what was left of the budget hatched."""
    figure, (axis,) = grid(theme, 1, 1, height=3.9)
    forecast = run.forecasts[-1] if run.forecasts else None
    beliefs = [] if forecast is None else [as_number(forecast.get("low")), as_number(forecast.get("high"))]
    axis.set_ylim(*value_limits(run.metric("reward"), run.metric("eval_reward"), beliefs=beliefs))
    axis.set_xlim(0, view_end(run) * 1.005)
    for name, start, end in phase_spans(run):
        axis.axvspan(start, end, color=theme.phases[PHASE_NAMES.index(name)], lw=0, zorder=0)
        if end - start > len(name) * (0.018 if theme.narrow else 0.0082) * run.max_steps:
            middle = (start + end) / 2
            axis.text(
                middle,
                0.985,
                name,
                transform=axis.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=8.5,
                color=theme.muted,
            )
    _draw_rewards(axis, run, theme, until=run.last_step)
    if forecast is not None and run.last_step < run.max_steps:
        band = forecast["band"]
        step, low, median, high = (np.array(band[name], dtype=np.float64) for name in ("step", "low", "median", "high"))
        ahead = np.concatenate([[run.last_step], step[step > run.last_step]])
        bounds = [np.interp(ahead, step, values) for values in (low, high)]
        axis.fill_between(ahead, *bounds, color=theme.forecast, alpha=0.22, lw=0, label="forecast, 90 % band", zorder=3)
        axis.plot(ahead, np.interp(ahead, step, median), color=theme.forecast, lw=1.6, zorder=5)
    _draw_end(axis, run, theme)
    for resumed in run.resumed_at:
        axis.axvline(resumed, color=theme.muted, lw=0.9, ls=":", zorder=2)
        note(axis, (resumed, 0.02), " resumed", color=theme.muted, va="bottom", transform=axis.get_xaxis_transform())
    axis.set_ylabel("mean reward", fontsize=9, color=theme.muted)
    x_label(axis, "step", theme)
    key(axis, theme)
    return figure


def end_words(run: Run) -> str:
    """The end of the run, in a few words."""
    words = {
        None: "last step so far",
        "forecast": "stopped by its forecast",
        "collapse": "stopped by a collapse",
        "max_steps": "all steps done",
        "interrupt": "interrupted",
        "user": "stopped by the caller",
    }
    return words.get(run.stopped_by, f"budget reached: {run.stopped_by}")


def _draw_end(axis: Axes, run: Run, theme: Theme) -> None:
    last, allowed, shown = run.last_step, run.max_steps, view_end(run)
    unused = 1 - last / allowed
    _draw_unused(axis, run, theme)
    if 1 - last / shown > (0.4 if theme.narrow else 0.22):
        words = f"{allowed - last} steps {'not run' if run.is_over else 'to come'}, {percent(unused)} of the budget"
        words = words.replace(", ", ",\n") if theme.narrow else words
        box = {"facecolor": theme.paper, "alpha": 0.9, "lw": 0, "pad": 3.0}
        place = ((last + shown) / 2, 0.1)
        note(axis, place, words, color=theme.ink, ha="center", va="center", transform=axis.get_xaxis_transform(), bbox=box)
    axis.axvline(last, color=theme.ink, lw=1.4, zorder=7)
    _tell_end(axis, run, theme, at=0.36, words=f"{end_words(run)}\nstep {last}")


def _draw_unused(axis: Axes, run: Run, theme: Theme) -> None:
    """Hatches the steps that the run left out; those that an unfinished run has before it stay blank."""
    if run.last_step < run.max_steps and run.is_over:
        style: dict[str, Any] = {"facecolor": "none", "edgecolor": theme.faint, "hatch": "///", "alpha": 0.55}
        axis.axvspan(run.last_step, view_end(run), lw=0, zorder=0.5, **style)


def _tell_end(axis: Axes, run: Run, theme: Theme, *, at: float, words: str) -> None:
    """Words beside the line of the last step, on the side that has room; ``at`` is a share of the panel's height."""
    words = words.replace("stopped by ", "stopped by\n").replace(": ", ":\n") if theme.narrow else words
    right = run.last_step < 0.6 * view_end(run)
    style: dict[str, Any] = {
        "fontsize": 8.5,
        "fontweight": "bold",
        "linespacing": 1.4,
        "color": theme.ink,
        "va": "center",
        "zorder": 8,
    }
    axis.annotate(
        words,
        (run.last_step, at),
        xycoords=axis.get_xaxis_transform(),
        xytext=(7 if right else -7, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        bbox={"facecolor": theme.paper, "alpha": 0.85, "lw": 0, "pad": 2.0},
        **style,
    )


def plot_stop(run: Run, theme: Theme = LIGHT) -> Figure:
    """The forecast for the end at each step, and the probability that little is left to gain."""
    figure, (upper, lower) = grid(theme, 2, 1, height=4.8, ratios=[1.25, 1], sharex=True)
    upper.set_xlim(0, view_end(run) * 1.005)
    steps = run.forecast_series("step")
    median, low, high = (run.forecast_series(name) for name in ("median", "low", "high"))
    upper.set_ylim(*value_limits(run.metric("reward"), median, beliefs=np.concatenate([low, high])))
    upper.plot(run.steps, smoothed(run.metric("reward")), color=theme.data, lw=1.5, label="reward", zorder=3)
    if steps.size:
        upper.fill_between(steps, low, high, color=theme.forecast, alpha=0.2, lw=0, zorder=2)
        if all("interval50" in row for row in run.forecasts):
            inner = np.array([row["interval50"] for row in run.forecasts], dtype=np.float64).T
            upper.fill_between(steps, *inner, color=theme.forecast, alpha=0.25, lw=0, zorder=3)
        upper.plot(steps, median, color=theme.forecast, lw=1.8, label="reward forecast for the end, 50 and 90 %", zorder=4)
    upper.set_ylabel("reward", fontsize=9, color=theme.muted)
    key(upper, theme)
    _draw_gain(lower, run, theme)
    x_label(lower, "step", theme)
    for axis in (upper, lower):
        _draw_unused(axis, run, theme)
        axis.axvline(run.last_step, color=theme.ink, lw=1.4, zorder=7)
    return figure


def _draw_gain(axis: Axes, run: Run, theme: Theme) -> None:
    drawn = draw_sureness(axis, run.forecasts, theme, epsilon=run.epsilon, confidence=run.confidence)
    axis.set_ylabel(f"P(gain left < {run.epsilon:g})", fontsize=9, color=theme.muted)
    right = run.last_step < (0.45 if theme.narrow else 0.7) * view_end(run)
    place, words = (0.995 if right else 0.005, run.confidence), f"enough to stop: {percent(run.confidence)}"
    side = {"va": "bottom", "ha": "right" if right else "left", "transform": axis.get_yaxis_transform()}
    note(axis, place, words, color=theme.ink, **side)
    if not run.forecasts:
        note(axis, (0.5, 0.5), "no forecast was made", color=theme.muted, ha="center", va="center")
        return
    if drawn:
        key(axis, theme)
    sure = float(run.forecast_series("p_gain_below_eps")[-1])
    _tell_end(axis, run, theme, at=0.42, words=f"{end_words(run)}\n{percent(sure)} sure at step {run.last_step}")


def plot_health(run: Run, theme: Theme = LIGHT) -> Figure:
    """Small multiples of what goes wrong first: entropy, KL, gradient norm, lengths, groups without variance, clipping."""
    shown = [item for item in HEALTH if run.has(item[0])][:6]
    columns = theme.columns(3, 2)
    rows = max(1, math.ceil(len(shown) / columns))
    figure, axes = grid(theme, rows, columns, height=0.35 + 1.75 * rows, sharex=True)
    axes[0].set_xlim(0, max(run.last_step, 5) * 1.02)
    size = 4.0 if run.steps.size < 30 else 1.8
    for axis, (name, words, may_be_log) in zip(axes, shown, strict=False):
        values = run.metric(name)
        axis.plot(run.steps, values, "o", ms=size, color=theme.data, alpha=0.3, mew=0)
        axis.plot(run.steps, smoothed(values), color=theme.data, lw=1.6)
        title(axis, words, theme)
        axis.title.set_fontsize(8.5)
        if name in _SHARES:
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
        positive = values[values > 0]
        if may_be_log and positive.size == np.isfinite(values).sum() and positive.max() > 50 * positive.min():
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0 if np.nanmin(values) >= 0 else None)
    if not shown:
        note(axes[0], (0.5, 0.5), "none of these metrics was logged", color=theme.muted, ha="center", va="center")
    for axis in axes[max(1, len(shown)) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(shown) - columns) : len(shown)]:
        axis.tick_params(labelbottom=True)
        x_label(axis, "step", theme)
    return figure


PICTURES: Mapping[str, Callable[[Run, Theme], Figure]] = MappingProxyType(
    {
        "phases": plot_phases,
        "forecasts": plot_forecasts,
        "beliefs": plot_beliefs,
        "stop": plot_stop,
        "alarm": plot_alarm,
        "compute": plot_compute,
        "health": plot_health,
    }
)
"""Every picture of a report, in its order."""


def pictures_of(run: Run) -> dict[str, Callable[[Run, Theme], Figure]]:
    """The plots for which a run has logged something."""
    needed = {"beliefs": has_beliefs, "alarm": has_alarm}
    return {name: draw for name, draw in PICTURES.items() if name not in needed or needed[name](run)}
