"""The plot of a forecast from a log: rewards, the forecast now and on the way, and why the rule would stop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grpo_fast.report.belief_plots import (
    Row,
    ahead_of,
    band_of,
    draw_end,
    draw_gain,
    draw_phase_probabilities,
    draw_prior,
    draw_shapes,
)
from grpo_fast.report.run import Array, smoothed
from grpo_fast.report.theme import LIGHT, Theme, drawing, dress, key, png, title, value_limits, x_label
from grpo_fast.run_dir import naming
from grpo_fast.sinks.quantities import percent

CUTS = (0.2, 0.4, 0.6, 0.8)
_LEAST_ROWS = 8
_HEIGHTS = (3.6, 1.9, 1.9, 2.2)


@dataclass(frozen=True)
class LogBeliefs:
    """A log and what the law made of it.

    Attributes:
        steps: (n,) steps, ascending.
        rewards: (n,) rewards, NaN among them.
        name: the reward's name, for the axis.
        horizon: last step of the budget.
        rows: forecasts in the order of their steps, as rows of ``forecasts.jsonl`` with ``phase_probabilities``.
        prior: the forecast before the first reward, likewise.
        stop_step: where the rule would have stopped; None where it would not.
        epsilon: gain that is not worth having.
        confidence: probability that a stop demands.
        shapes: probabilities of the classes of shapes before the first reward and after the last; None where they are unknown.
    """

    steps: npt.NDArray[np.int64]
    rewards: Array
    name: str
    horizon: int
    rows: Sequence[Row]
    prior: Row
    stop_step: int | None
    epsilon: float
    confidence: float
    shapes: tuple[Mapping[str, float], Mapping[str, float]] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the log reaches the end of the budget, but for a fiftieth."""
        return bool(self.steps[-1] >= 0.98 * self.horizon)

    @property
    def came(self) -> float:
        """Mean of the last twentieth of a whole log (five rewards at least); NaN where the end has not come."""
        if not self.is_whole or self.steps.size < _LEAST_ROWS:
            return math.nan
        last = self.rewards[-max(5, self.steps.size // 20) :]
        return float(np.nanmean(last)) if np.isfinite(last).any() else math.nan

    def row_at(self, step: float) -> Row | None:
        """The newest forecast made at a step or before."""
        return next((row for row in reversed(self.rows) if row["step"] <= step), None)


def plot_log(beliefs: LogBeliefs, theme: Theme = LIGHT) -> Figure:
    """Draws a log and its forecast; with the beliefs on the way below, where there were enough rewards to have any."""
    many = len(beliefs.rows) >= _LEAST_ROWS
    heights = _HEIGHTS if many else _HEIGHTS[:1]
    figure = Figure(figsize=(theme.width, sum(heights) + 0.4), dpi=100, layout="constrained", facecolor=theme.paper)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.07, wspace=0.03, hspace=0.05)  # type: ignore[union-attr, call-arg]
    spec = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    _draw_log(_panel(figure, spec[0, :], theme), beliefs, theme)
    if not many:
        return figure
    first: Axes | None = None
    small = spec[1, :].subgridspec(1, len(CUTS))
    for place, share in enumerate(CUTS):
        axis = _panel(figure, small[0, place], theme, sharey=first)
        _draw_belief(axis, beliefs, share, theme=theme)
        axis.tick_params(labelleft=first is None)
        first = first or axis
    gain, phases, end, prior = (_panel(figure, spec[row, place], theme) for row in (2, 3) for place in (0, 1))
    draw_gain(gain, beliefs.rows, theme, epsilon=beliefs.epsilon, confidence=beliefs.confidence)
    draw_phase_probabilities(phases, beliefs.rows, theme)
    draw_end(end, [beliefs.prior, *beliefs.rows], theme, came=beliefs.came)
    for axis in (gain, phases, end):
        axis.set_xlim(0, beliefs.steps[-1])
        if beliefs.stop_step is not None:
            axis.axvline(beliefs.stop_step, color=theme.ink, lw=1.0, zorder=7)
    x_label(end, "step", theme)
    if beliefs.shapes is not None:
        draw_shapes(prior, beliefs.shapes, theme, step=int(beliefs.rows[-1]["step"]))
        return figure
    draw_prior(prior, beliefs.prior, beliefs.rows[-1], theme)
    prior.set_xlim(0, beliefs.horizon)
    x_label(prior, "step", theme)
    return figure


def _panel(figure: Figure, place: Any, theme: Theme, *, sharey: Axes | None = None) -> Axes:
    axis = figure.add_subplot(place, sharey=sharey)
    dress(axis, theme)
    return axis


def headline(beliefs: LogBeliefs) -> str:
    """The title of the plot, in one sentence."""
    last = beliefs.rows[-1] if beliefs.rows else beliefs.prior
    if beliefs.stop_step is not None:
        saved = percent(1 - beliefs.stop_step / beliefs.horizon)
        found = next(row for row in beliefs.rows if row["step"] == beliefs.stop_step)
        words = f"Would have stopped at step {beliefs.stop_step:,}, {saved} saved, expecting {found['median']:.3g}"
        return words + (f"; {beliefs.came:.3g} came" if math.isfinite(beliefs.came) else "")
    if not last.get("identifiable", True):
        return f"Too early to tell: {last['low']:.3g} to {last['high']:.3g} at step {beliefs.horizon:,}"
    return f"{last['median']:.3g} ({last['low']:.3g} to {last['high']:.3g}) is expected at step {beliefs.horizon:,}; no stop"


def _draw_log(axis: Axes, beliefs: LogBeliefs, theme: Theme) -> None:
    """The rewards, and the band of what was believed where the rule would have stopped, or else after the last step."""
    last = beliefs.rows[-1] if beliefs.rows else beliefs.prior
    belief = last if beliefs.stop_step is None else beliefs.row_at(beliefs.stop_step) or last
    made_at = int(belief["step"])
    _draw_rewards(axis, beliefs, theme, until=int(beliefs.steps[-1]))
    _draw_ahead(axis, belief, theme, label="mean reward, 90 % band")
    step, _, median, _ = band_of(belief)
    axis.plot(step[step <= made_at], median[step <= made_at], color=theme.forecast, lw=1.2, ls=(0, (3, 2)), zorder=5)
    axis.axvline(made_at, color=theme.ink, lw=1.4, zorder=7)
    axis.set_xlim(0, beliefs.horizon)
    axis.set_ylim(*value_limits(beliefs.rewards, [belief["low"], belief["high"]]))
    if beliefs.stop_step is not None and beliefs.horizon > made_at:
        style: dict[str, Any] = {"facecolor": "none", "edgecolor": theme.faint, "hatch": "///", "alpha": 0.35}
        axis.axvspan(made_at, beliefs.horizon, lw=0, zorder=0.5, label="would not have been run", **style)
    _tell(axis, belief, beliefs, theme=theme)
    axis.set_ylabel(beliefs.name, fontsize=9, color=theme.muted)
    axis.set_title(headline(beliefs), loc="left", fontsize=10.5, color=theme.ink, fontweight="bold", pad=24)
    key(axis, theme)


def _draw_ahead(axis: Axes, belief: Row, theme: Theme, *, label: str | None = None) -> None:
    """The band of the mean reward from the step of a forecast on; a bar at the end of the budget, where nothing is ahead."""
    step, low, median, high = ahead_of(belief)
    if step.size == 1:
        axis.errorbar(
            step,
            [belief["median"]],
            [[belief["median"] - belief["low"]], [belief["high"] - belief["median"]]],
            fmt="o",
            ms=4,
            color=theme.forecast,
            capsize=3,
            label=label,
            zorder=6,
            clip_on=False,
        )
        return
    axis.fill_between(step, low, high, color=theme.forecast, alpha=0.22, lw=0, label=label, zorder=3)
    axis.plot(step, median, color=theme.forecast, lw=1.8, zorder=5)


def _tell(axis: Axes, belief: Mapping[str, Any], beliefs: LogBeliefs, *, theme: Theme) -> None:
    """The forecast in words beside the vertical line, on the side that has room and no rewards."""
    words = f"step {belief['step']:,}: for the end\n{belief['median']:.3g} ({belief['low']:.3g} to {belief['high']:.3g})"
    words += "" if belief.get("identifiable", True) else "\nnot identifiable yet"
    right = belief["step"] < 0.6 * beliefs.horizon
    bottom, top = axis.get_ylim()
    high = np.nanmedian(beliefs.rewards[-max(3, beliefs.steps.size // 4) :]) < (bottom + top) / 2
    axis.annotate(
        words,
        (belief["step"], 0.96 if high else 0.05),
        xycoords=axis.get_xaxis_transform(),
        xytext=(7 if right else -7, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="top" if high else "bottom",
        fontsize=8.5,
        color=theme.ink,
        linespacing=1.4,
        zorder=8,
        bbox={"facecolor": theme.paper, "alpha": 0.85, "lw": 0, "pad": 2.0},
    )


def _draw_rewards(axis: Axes, beliefs: LogBeliefs, theme: Theme, *, until: int, small: bool = False) -> None:
    steps, rewards = beliefs.steps, np.asarray(beliefs.rewards, dtype=np.float64)
    seen = steps <= until
    count = steps.size * (3 if small else 1)
    size = 5.0 if count < 30 else 2.6 if count < 1500 else 1.4
    style: dict[str, Any] = {"mew": 0, "rasterized": True}
    axis.plot(steps[~seen], rewards[~seen], "o", ms=size, color=theme.faint, zorder=1, **style)
    axis.plot(
        steps[seen], rewards[seen], "o", ms=size, color=theme.data, alpha=0.35 if count < 1500 else 0.15, zorder=2, **style
    )
    axis.plot(steps[seen], smoothed(rewards[seen]), color=theme.data, lw=1.8, label=beliefs.name, zorder=4)


def _draw_belief(axis: Axes, beliefs: LogBeliefs, share: float, *, theme: Theme) -> None:
    """The forecast from a share of the log, and the rewards that followed."""
    cut = int(beliefs.steps[min(math.ceil(share * beliefs.steps.size), beliefs.steps.size) - 1])
    belief = beliefs.row_at(cut) or beliefs.prior
    _draw_rewards(axis, beliefs, theme, until=cut, small=True)
    _draw_ahead(axis, belief, theme)
    axis.axvline(cut, color=theme.muted, lw=0.9, zorder=2)
    axis.set_xlim(0, beliefs.horizon)
    bounds = [value for row in beliefs.rows[len(beliefs.rows) // 5 :] for value in (row["low"], row["high"])]
    axis.set_ylim(*value_limits(beliefs.rewards, bounds))
    came, words = beliefs.came, f"Step {cut:,}"
    if math.isfinite(came):
        held = belief["low"] <= came <= belief["high"]
        words += ": held" if held else ": missed"
        axis.axhline(came, color=theme.ink, lw=1.0, ls=(0, (1, 2)), zorder=3)
    axis.xaxis.get_major_locator().set_params(nbins=3)  # type: ignore[call-arg]
    title(axis, words, theme)


def write_log_plot(path: Path, beliefs: LogBeliefs) -> None:
    """Writes the picture as a PNG file."""
    with drawing(), naming(path):
        path.write_bytes(png(plot_log(beliefs)))
