"""Panels of the forecasts while rewards came in: phases, the prior against the posterior, the end, the reason to stop.

All of them read forecasts as rows of ``forecasts.jsonl``, so that a run's report and a foreign log share them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from grpo_fast.report.run import Array, Run, series, smoothed
from grpo_fast.report.theme import (
    KEY_STYLE,
    LIGHT,
    PHASE_NAMES,
    Theme,
    bare,
    grid,
    key,
    note,
    title,
    value_limits,
    x_label,
)
from grpo_fast.sinks.quantities import percent

Row = Mapping[str, Any]
_LOW = 0.3


def band_of(row: Row) -> tuple[Array, Array, Array, Array]:
    """Steps, low, median and high of the mean curve as a forecast had it."""
    band = row["band"]
    return tuple(np.array(band[name], dtype=np.float64) for name in ("step", "low", "median", "high"))  # type: ignore[return-value]


def ahead_of(row: Row) -> tuple[Array, Array, Array, Array]:
    """The result of :func:`band_of` from the step of the forecast on; a single step at the end of the budget."""
    step, *bounds = band_of(row)
    at = np.concatenate([[float(row["step"])], step[step > row["step"]]])
    low, median, high = (np.interp(at, step, values) for values in bounds)
    return at, low, median, high


def counts_for_stop(rows: Sequence[Row], *, epsilon: float, confidence: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """(m,) whether a forecast spoke for a stop: sure enough, less than epsilon expected, and nothing vetoed it."""
    gain, sure = series(rows, "expected_gain"), series(rows, "p_gain_below_eps")
    vetoed = np.array([bool(row.get("veto")) or not row.get("identifiable", True) for row in rows])
    return np.asarray((sure >= confidence) & ~(gain >= epsilon) & ~vetoed)


def draw_phase_probabilities(axis: Axes, rows: Sequence[Row], theme: Theme) -> None:
    """Probabilities of the three phases over the steps, stacked to 1; words where there is room, the likeliest in the title."""
    steps = series(rows, "step")
    shares = np.array([row["phase_probabilities"] for row in rows], dtype=np.float64).T
    axis.stackplot(steps, shares, colors=theme.stacked, lw=0, zorder=1)
    edges = shares.cumsum(axis=0)
    for edge in edges[:2]:
        axis.plot(steps, edge, color=theme.paper, lw=1.2, zorder=2)
    axis.set_ylim(0, 1)
    axis.grid(visible=False)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    _name_areas(axis, steps, shares, theme=theme)
    last = shares[:, -1]
    likeliest = int(last.argmax())
    title(axis, f"Phase: {PHASE_NAMES[likeliest]}, {percent(float(last[likeliest]))} at step {steps[-1]:.0f}", theme)


def _name_areas(axis: Axes, steps: Array, shares: Array, *, theme: Theme) -> None:
    """Each area's name where it stays thick enough over the width of the words."""
    span = max(float(steps[-1]) - min(0.0, float(steps[0])), 1.0)
    below = np.vstack([np.zeros(steps.size), shares.cumsum(axis=0)])
    shown: set[int] = set()
    for number, words, least in [
        *((number, name, 0.14) for number, name in enumerate(PHASE_NAMES)),
        *((number, name.replace(" ", "\n"), 0.26) for number, name in enumerate(PHASE_NAMES) if " " in name),
    ]:
        if number in shown:
            continue
        reach = max(map(len, words.split("\n"))) * 0.022 * span
        best, place = 0.0, (0.0, 0.0)
        for middle in np.linspace(steps[0] + reach / 2, max(steps[-1] - reach / 2, steps[0]), 60):
            inside = (steps >= middle - reach / 2) & (steps <= middle + reach / 2)
            if not inside.any():
                continue
            bottom, top = float(below[number][inside].max()), float(below[number + 1][inside].min())
            if top - bottom > best:
                best, place = top - bottom, (float(middle), (bottom + top) / 2)
        if best > least:
            shown.add(number)
            box = {"facecolor": theme.stacked[number], "lw": 0, "pad": 1.5}
            axis.text(*place, words, ha="center", va="center", fontsize=8.5, color=theme.ink, zorder=8, bbox=box)


def draw_sureness(axis: Axes, rows: Sequence[Row], theme: Theme, *, epsilon: float, confidence: float) -> list[str]:
    """Probability that so little is left to gain, against what a stop demands; grey while the rewards decide nothing.

    A bar along the top marks the forecasts that count for a stop: it takes a row of them without a gap.

    Returns:
        Which of the marks with a meaning of their own were drawn: "grey", "crosses", "green".
    """
    axis.set_ylim(-0.03, 1.09)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    axis.axhline(confidence, color=theme.ink, lw=1.0, ls=(0, (4, 3)), zorder=3)
    if not rows:
        return []
    steps, sure = series(rows, "step"), series(rows, "p_gain_below_eps")
    known = np.array([bool(row.get("identifiable", True)) for row in rows])
    vetoed = np.array([bool(row.get("veto")) for row in rows]) & (sure >= confidence)
    counted = counts_for_stop(rows, epsilon=epsilon, confidence=confidence)
    grey: dict[str, Any] = {} if known.all() else {"label": "while not identifiable"}
    axis.plot(steps, sure, color=theme.muted, alpha=0.7, lw=1.4, zorder=4, **grey)
    if known.any():
        axis.plot(steps, np.where(known, sure, np.nan), color=theme.forecast, lw=1.8, label="identifiable", zorder=5)
    if vetoed.any():
        axis.plot(steps[vetoed], sure[vetoed], "x", ms=4, mew=1.0, color=theme.ink, alpha=0.6, label="vetoed", zorder=6)
    if counted.any():
        bar = np.where(counted, 1.045, np.nan)
        axis.plot(steps, bar, color=theme.held_out, lw=4.0, solid_capstyle="butt", label="counts for a stop", zorder=6)
    axis.plot(steps[-1:], sure[-1:], "o", ms=6, color=theme.forecast, mec=theme.paper, mew=1.2, zorder=8)
    drawn = {"grey": not known.all(), "crosses": vetoed.any(), "green": counted.any()}
    return [mark for mark, there in drawn.items() if there]


def draw_gain(axis: Axes, rows: Sequence[Row], theme: Theme, *, epsilon: float, confidence: float) -> None:
    """:func:`draw_sureness`, with its marks and its newest value in words."""
    drawn = draw_sureness(axis, rows, theme, epsilon=epsilon, confidence=confidence)
    meaning = {"grey": "not identifiable", "crosses": "vetoed", "green": "counts for a stop"}
    told = [f"{mark}: {meaning[mark]}" for mark in drawn]
    sure = series(rows, "p_gain_below_eps")
    box = {"facecolor": theme.paper, "alpha": 0.85, "lw": 0, "pad": 1.5}
    hides = bool((sure[-max(1, sure.size // 2) :] < _LOW).any())  # the line, were it told at the foot
    height, side = (0.68, "top") if hides else (0.04, "bottom")
    note(axis, (0.99, height), "\n".join(told), color=theme.muted, ha="right", va=side, bbox=box, zorder=9)
    words = f"P(gain left < {epsilon:g}) is {percent(float(sure[-1]))}; {percent(confidence)} stops"
    title(axis, words, theme)


def draw_end(axis: Axes, rows: Sequence[Row], theme: Theme, *, came: float) -> None:
    """The reward forecast for the end of the budget, step by step, with its 90 and 50 % intervals, and what came."""
    steps, median = series(rows, "step"), series(rows, "median")
    low, high = series(rows, "low"), series(rows, "high")
    axis.fill_between(steps, low, high, color=theme.forecast, alpha=0.2, lw=0, zorder=2)
    if all("interval50" in row for row in rows):
        inner = np.array([row["interval50"] for row in rows], dtype=np.float64).T
        axis.fill_between(steps, *inner, color=theme.forecast, alpha=0.25, lw=0, zorder=3)
    axis.plot(steps, median, color=theme.forecast, lw=1.8, zorder=4)
    if math.isfinite(came):
        axis.axhline(came, color=theme.ink, lw=1.0, ls=(0, (1, 2)), zorder=5)
    axis.set_ylim(*value_limits(low[low.size // 5 :], high[high.size // 5 :], median, [came]))
    held = float(np.mean((low <= came) & (came <= high))) if math.isfinite(came) else math.nan
    words = (
        f"Forecast for the end, 90 %: held {percent(held)} of the time" if math.isfinite(held) else "Forecast for the end, 90 %"
    )
    title(axis, words, theme)


def draw_prior(axis: Axes, prior: Row, posterior: Row, theme: Theme) -> None:
    """The mean curve as the first forecast had it, before any reward or soon after, and as it is believed now."""
    bounds = []
    for row, color, alpha, words in (
        (prior, theme.muted, 0.22, "before" if prior["step"] == 0 else f"at step {prior['step']}"),
        (posterior, theme.forecast, 0.28, f"at step {posterior['step']}"),
    ):
        step, low, median, high = band_of(row)
        axis.fill_between(step, low, high, color=color, alpha=alpha, lw=0, zorder=2)
        axis.plot(step, median, color=color, lw=1.8, zorder=4)
        bounds += [low, high]
        side: dict[str, Any] = {
            "textcoords": "offset points",
            "fontsize": 8.5,
            "ha": "right",
            "color": color,
            "zorder": 6,
            "fontweight": "bold",
        }
        axis.annotate(words, (step[-1], median[-1]), (-4, 5), va="bottom", **side)
    axis.set_ylim(*value_limits(*bounds))
    narrowed = 1 - (float(posterior["high"]) - float(posterior["low"])) / (float(prior["high"]) - float(prior["low"]))
    words = (
        f"The rewards took {percent(narrowed)} off the interval" if narrowed > 0 else "The rewards did not narrow the interval"
    )
    title(axis, words, theme)


def draw_shapes(axis: Axes, shapes: tuple[Mapping[str, float], Mapping[str, float]], theme: Theme, *, step: int) -> None:
    """Probabilities of the classes of shapes: before the first reward, and now."""
    draw_shares(axis, shapes, theme, now=f"at step {step:,}")
    best = max(shapes[1], key=shapes[1].__getitem__)
    title(axis, f"Shape: {'no rise' if best == 'none' else best}, {percent(shapes[1][best])}", theme)


def draw_shares(axis: Axes, shares: tuple[Mapping[str, float], Mapping[str, float]], theme: Theme, *, now: str) -> None:
    """Probabilities by name, before and after, a pair of bars each; ``now`` names the second of a pair."""
    before, after = shares
    names = list(after)[::-1]
    places = np.arange(len(names), dtype=np.float64)
    bare(axis)
    axis.barh(places + 0.2, [before[name] for name in names], height=0.36, color=theme.muted, alpha=0.55, label="before")
    axis.barh(places - 0.2, [after[name] for name in names], height=0.36, color=theme.forecast, label=now)
    axis.set_yticks(places, names, color=theme.ink, fontsize=8)
    axis.set_ylim(-0.6, len(names) - 0.4)
    most = max(*after.values(), *before.values())
    for place, name in zip(places, names, strict=True):
        if after[name] >= 0.05:
            axis.text(
                after[name] + 0.012 * most, place - 0.2, percent(after[name]), va="center", fontsize=8, color=theme.forecast
            )
    axis.set_xlim(0, 1.2 * most)
    axis.legend(loc="best", labelcolor=theme.ink, **KEY_STYLE)


ALARM = "alarm/"
_DETECTORS = 4


def has_beliefs(run: Run) -> bool:
    """Whether a run's forecasts say enough for :func:`plot_beliefs`."""
    return len(run.forecasts) > 1 and all("phase_probabilities" in row for row in run.forecasts)


def plot_beliefs(run: Run, theme: Theme = LIGHT) -> Figure:
    """Probability of each phase, step by step, and the first forecast beside the newest."""
    columns = theme.columns(2)
    figure, (phases, prior) = grid(theme, 2 // columns, columns, height=2.6 * (2 // columns))
    draw_phase_probabilities(phases, run.forecasts, theme)
    draw_prior(prior, run.forecasts[0], run.forecasts[-1], theme)
    phases.set_xlim(0, run.last_step)
    prior.set_xlim(0, run.max_steps)
    for axis in (phases, prior):
        x_label(axis, "step", theme)
    return figure


def has_alarm(run: Run) -> bool:
    """Whether a run had a collapse alarm."""
    return run.has(f"{ALARM}reward")


def plot_alarm(run: Run, theme: Theme = LIGHT) -> Figure:
    """The reward, and how near the alarm's detectors came to their thresholds."""
    figure, (upper, lower) = grid(theme, 2, 1, height=3.9, ratios=[1, 1], sharex=True)
    upper.plot(run.steps, run.metric("reward"), "o", ms=2.6, color=theme.data, alpha=0.35, mew=0)
    upper.plot(run.steps, smoothed(run.metric("reward")), color=theme.data, lw=1.8)
    upper.set_ylabel("reward", fontsize=9, color=theme.muted)
    title(upper, alarm_words(run), theme)
    others = [name for name in run.metrics if name.startswith(ALARM) and name != f"{ALARM}reward" and run.has(name)]
    others = sorted(others, key=lambda name: -float(np.nanmax(run.metric(name))))[: _DETECTORS - 1]
    styles = ((theme.forecast, "-"), (theme.held_out, (0, (5, 1.5))), (theme.data, (0, (2, 1.5))), (theme.muted, (0, (1, 1))))
    for name, (color, dash) in zip([f"{ALARM}reward", *others], styles, strict=False):
        words = name.removeprefix(ALARM).replace("_", " ")
        lower.plot(run.steps, run.metric(name), color=color, ls=dash, lw=1.6, label=words)
    lower.axhline(1.0, color=theme.ink, lw=1.0, ls=(0, (4, 3)))
    lower.set_ylim(-0.03, max(1.25, 1.05 * _highest(run, [f"{ALARM}reward", *others])))
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    lower.set_ylabel("of the threshold", fontsize=9, color=theme.muted)
    lower.set_xlim(0, max(run.last_step, 5))
    key(lower, theme)
    x_label(lower, "step", theme)
    return figure


def alarm_words(run: Run) -> str:
    """The alarm's outcome, in one line."""
    if run.stopped_by == "collapse":
        return f"Collapse confirmed at step {run.last_step}"
    told = [row for row in run.events if row.get("event") == "alarm"]
    if told:
        return f"Alarm at step {told[0]['step']}; training went on"
    return f"No collapse: the reward's detector came to {percent(_highest(run, [f'{ALARM}reward']))} of its threshold"


def _highest(run: Run, names: Sequence[str]) -> float:
    return max(float(np.nanmax(run.metric(name))) for name in names)
