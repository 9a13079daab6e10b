"""The picture of a prior that was fitted: what is believed of a run before it begins, by the old prior and by the new one.

It reads the JSON object that ``grpo-fast law fit --json`` prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from grpo_fast.report.belief_plots import draw_shares
from grpo_fast.report.theme import LIGHT, Theme, drawing, grid, png, title
from grpo_fast.run_dir import naming


def plot_prior(fitted: Mapping[str, Any], theme: Theme = LIGHT) -> Figure:
    """Draws how likely rises of which size and which shapes are, before and after."""
    columns = theme.columns(2)
    figure, axes = grid(theme, 2 // columns, columns, height=3.0 * (2 // columns))
    runs = f"{fitted['num_used']} run{'' if fitted['num_used'] == 1 else 's'}"
    for axis, name, words in zip(axes, ("rises", "shapes"), ("How far a run rises", "In which shape"), strict=True):
        shares = tuple({kind: pair[when] for kind, pair in fitted[name].items()} for when in ("before", "after"))
        draw_shares(axis, (shares[0], shares[1]), theme, now=f"after {runs}")
        title(axis, words, theme)
    axes[0].get_legend().remove()  # type: ignore[union-attr]
    return figure


def write_prior_plot(path: Path, fitted: Mapping[str, Any]) -> None:
    """Writes the picture as a PNG file."""
    with drawing(), naming(path):
        path.write_bytes(png(plot_prior(fitted)))
