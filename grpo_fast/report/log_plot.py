"""The picture of a forecast from a log: what was seen, the band ahead, and where the rule would have stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from grpo_fast.law import Forecast
from grpo_fast.report.run import Array, smoothed
from grpo_fast.report.theme import LIGHT, Theme, drawing, grid, key, note, png, value_limits, x_label


def plot_log(
    steps: npt.NDArray[np.int64],
    rewards: Array,
    *,
    forecast: Forecast,
    stop: Forecast | None = None,
    name: str = "reward",
    theme: Theme = LIGHT,
) -> Figure:
    """Draws a log and its forecast.

    Args:
        steps: (n,) steps, ascending.
        rewards: (n,) rewards, NaN among them.
        forecast: what is believed after the last step.
        stop: what was believed at the step where the rule would have stopped; its band is drawn from there.
        name: the reward's name, for the axis.
        theme: colours.
    """
    figure, (axis,) = grid(theme, 1, 1, height=3.9)
    belief = forecast if stop is None else stop
    step, low, median, high = (
        np.array(values) for values in (belief.band.step, belief.band.low, belief.band.median, belief.band.high)
    )
    axis.set_xlim(0, forecast.horizon * 1.005)
    axis.set_ylim(*value_limits(rewards, beliefs=np.array([belief.low, belief.high])))
    size = 5.0 if steps.size < 30 else 2.6
    axis.plot(steps, rewards, "o", ms=size, color=theme.data, alpha=0.35, mew=0, zorder=2)
    axis.plot(steps, smoothed(np.asarray(rewards, dtype=np.float64)), color=theme.data, lw=1.8, label=name, zorder=4)
    axis.fill_between(step, low, high, color=theme.forecast, alpha=0.2, lw=0, label="mean reward, 90 % band", zorder=1)
    axis.plot(step, median, color=theme.forecast, lw=1.6, zorder=5)
    x = belief.step
    axis.axvline(x, color=theme.ink, lw=1.4, zorder=7)
    words = f"believed at step {x}" if stop is None else f"would have stopped\nat step {x}"
    words += f"\nfor the end {belief.median:.3g}\n({belief.low:.3g} to {belief.high:.3g})"
    words += "" if belief.identifiable else "\nnot identifiable yet"
    right = x < 0.6 * forecast.horizon
    axis.annotate(
        words,
        (x, 0.05),
        xycoords=axis.get_xaxis_transform(),
        xytext=(7 if right else -7, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="bottom",
        fontsize=8.5,
        color=theme.ink,
        linespacing=1.4,
        zorder=8,
        bbox={"facecolor": theme.paper, "alpha": 0.85, "lw": 0, "pad": 2.0},
    )
    if stop is not None and forecast.step > x:
        axis.axvspan(x, forecast.horizon, facecolor="none", edgecolor=theme.faint, hatch="///", alpha=0.3, lw=0, zorder=0.5)
        note(axis, (0.995, 0.985), "steps that would not have been run", color=theme.muted, ha="right")
    axis.set_ylabel(name, fontsize=9, color=theme.muted)
    x_label(axis, "step", theme)
    key(axis, theme)
    return figure


def write_log_plot(
    path: Path,
    steps: npt.NDArray[np.int64],
    rewards: Array,
    *,
    forecast: Forecast,
    stop: Forecast | None = None,
    name: str = "reward",
) -> None:
    """Writes the same as a PNG file.

    Raises:
        ValueError: the file's name does not end in ".png".
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} must end in .png: that is what is written")
    with drawing():
        path.write_bytes(png(plot_log(steps, rewards, forecast=forecast, stop=stop, name=name)))
