"""How the pictures look: two palettes, two widths, and axes without ornament."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

Color = str

RC: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "text.usetex": False,
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "axes.formatter.use_mathtext": False,
    "axes.titley": 1.0,  # right above the panel: else matplotlib looks at all ticks for the place, each time
    "hatch.linewidth": 0.8,
    "path.sketch": None,
}
"""Settings that a user's own matplotlib configuration must not change."""

KEY_STYLE: dict[str, Any] = {
    "frameon": False,
    "fontsize": 8.5,
    "handlelength": 1.3,
    "handletextpad": 0.5,
    "columnspacing": 1.4,
    "borderaxespad": 0.2,
}
"""Style of the lists of series above panels."""

PHASE_NAMES = ("slow start", "rapid improvement", "plateau")


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one picture and whether it is made for a narrow screen.

    Series are from Okabe and Ito's palette, told apart by people of any colour vision, lightened for a dark page. Sizes are in
    inches at 100 CSS pixels an inch.
    """

    paper: Color
    ink: Color
    muted: Color
    faint: Color
    data: Color
    forecast: Color
    held_out: Color
    phases: tuple[Color, Color, Color]
    stacked: tuple[Color, Color, Color]
    narrow: bool = False

    @property
    def width(self) -> float:
        """Width of a picture."""
        return 4.1 if self.narrow else 8.4

    def columns(self, wide: int, narrow: int = 1) -> int:
        """Panels side by side."""
        return narrow if self.narrow else wide


LIGHT = Theme(
    paper="#ffffff",
    ink="#1f2328",
    muted="#656d78",
    faint="#c9d0d8",
    data="#0072b2",
    forecast="#d55e00",
    held_out="#00805e",
    phases=("#eceff3", "#d9eaf7", "#dcf1e7"),
    stacked=("#cdd3da", "#8cc6ec", "#66c2a5"),
)
DARK = Theme(
    paper="#15191e",
    ink="#e6e9ed",
    muted="#98a2ae",
    faint="#47515d",
    data="#56b4e9",
    forecast="#f09a50",
    held_out="#35c596",
    phases=("#20262e", "#172c3d", "#15302a"),
    stacked=("#3c444d", "#1f5f87", "#1d6e54"),
)


def grid(
    theme: Theme, rows: int, columns: int, *, height: float, ratios: Sequence[float] | None = None, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row.

    Args:
        theme: colours and width.
        rows: rows of panels.
        columns: columns of panels.
        height: height of the figure in inches.
        ratios: heights of the rows against one another.
        **shared: ``sharex`` and ``sharey`` of matplotlib.
    """
    figure = Figure(figsize=(theme.width, height), dpi=100, layout="constrained", facecolor=theme.paper)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.04, hspace=0.06)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=ratios, **shared)
    flat = [axis for row in axes for axis in row]
    for axis in flat:
        dress(axis, theme)
    return figure, flat


def dress(axis: Axes, theme: Theme) -> None:
    """Removes everything from the axes that nobody reads."""
    axis.set_facecolor(theme.paper)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(theme.faint)
    axis.tick_params(length=0, labelsize=9, colors=theme.muted, pad=4)
    axis.grid(axis="y", color=theme.faint, linewidth=0.6, alpha=0.6)
    axis.set_axisbelow(True)
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def bare(axis: Axes) -> None:
    """Leaves nothing of the axes but the names of their rows."""
    axis.grid(visible=False)
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def title(axis: Axes, text: str, theme: Theme) -> None:
    """Names a panel, flush left."""
    axis.set_title(text, loc="left", fontsize=9.5, color=theme.ink, fontweight="bold", pad=6)


def x_label(axis: Axes, text: str, theme: Theme) -> None:
    """Names the horizontal axis."""
    axis.set_xlabel(text, fontsize=9, color=theme.muted)


def note(axis: Axes, xy: tuple[float, float], text: str, *, color: Color, **options: Any) -> None:
    """Words inside a panel, at a place in shares of its width and height."""
    settings: dict[str, Any] = {
        "fontsize": 8.5,
        "ha": "left",
        "va": "top",
        "color": color,
        "transform": axis.transAxes,
    } | options
    axis.text(*xy, text, **settings)


def key(axis: Axes, theme: Theme) -> None:
    """Names the series above the panel, in their own colours."""
    handles, labels = axis.get_legend_handles_labels()
    if not handles:
        return
    columns = 2 if theme.narrow else len(handles)
    axis.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, labelcolor=theme.ink, **KEY_STYLE
    )


def value_limits(*series: Any, beliefs: Any = ()) -> tuple[float, float]:
    """Limits that show every observed value, and beliefs as far as half the observed range beyond it.

    Args:
        *series: arrays of observed values, NaN among them.
        beliefs: bounds of intervals, which may be very wide.
    """
    seen = np.concatenate([np.atleast_1d(np.asarray(values, dtype=np.float64)) for values in series])
    seen = seen[np.isfinite(seen)]
    if not seen.size:
        return 0.0, 1.0
    low, high = float(seen.min()), float(seen.max())
    span = max(high - low, 0.05, 0.05 * max(abs(low), abs(high)))
    believed = np.asarray(beliefs, dtype=np.float64)
    believed = believed[np.isfinite(believed)]
    if believed.size:
        low = min(low, max(float(believed.min()), low - 0.5 * span))
        high = max(high, min(float(believed.max()), high + 0.5 * span))
    return low - 0.06 * span, high + 0.08 * span


@contextmanager
def drawing() -> Iterator[None]:
    """Keeps a user's own matplotlib settings out of the pictures."""
    with mpl.rc_context(RC):
        yield


def png(figure: Figure) -> bytes:
    """A figure as PNG at two pixels a CSS pixel. Always the same bytes."""
    figure.set_dpi(200)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return compressed(np.asarray(canvas.buffer_rgba()))


def compressed(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """[height, width, 4] as PNG in 256 colours: a third of a full-colour file.

    The colours are chosen among the distinct ones, some thousands; only 3 % of the pixels differ from the one before.
    """
    flat = np.ascontiguousarray(pixels).view(np.uint32).ravel()
    starts = np.flatnonzero(np.concatenate(([True], flat[1:] != flat[:-1])))
    colors, numbers = np.unique(flat[starts], return_inverse=True)
    distinct = Image.fromarray(colors.view(np.uint8).reshape(1, -1, 4)).convert("RGB")
    few = distinct.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    indices = np.repeat(np.asarray(few)[0][numbers], np.diff(starts, append=flat.size))
    image = Image.fromarray(indices.reshape(pixels.shape[:2]))
    image.putpalette(few.getpalette() or [])
    with io.BytesIO() as file:
        image.save(file, format="PNG")
        return file.getvalue()
