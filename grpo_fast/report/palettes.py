"""One figure in two palettes: it is laid out and its words are placed once, and each stroke is drawn twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from matplotlib.backend_bases import GraphicsContextBase, RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from grpo_fast.report.theme import DARK, LIGHT, compressed

Rgb = tuple[int, int, int]


def _colors() -> dict[Rgb, tuple[float, float, float]]:
    """The dark colour for each light one."""
    pairs: list[tuple[str, str]] = []
    for field in fields(LIGHT):
        light, dark = getattr(LIGHT, field.name), getattr(DARK, field.name)
        if isinstance(light, tuple):
            pairs += zip(light, dark, strict=True)
        elif isinstance(light, str):
            pairs.append((light, dark))
    colors = {_rgb(to_rgb(light)): to_rgb(dark) for light, dark in pairs}
    assert len(colors) == len(pairs), "a light colour that stands for two dark ones"
    return colors


def _rgb(color: Sequence[float]) -> Rgb:
    red, green, blue = (round(255 * float(channel)) for channel in color[:3])
    return red, green, blue


class _TwoPalettes(RendererBase):
    """Draws what it is told on a light and on a dark canvas."""

    def __init__(self, width: int, height: int, dpi: float) -> None:
        super().__init__()
        canvas: Any = RendererAgg
        self.light, self.dark = canvas(width, height, dpi), canvas(width, height, dpi)
        self.dpi = dpi
        self._colors = _colors()

    def draw_path(self, gc: GraphicsContextBase, path: Any, transform: Any, rgbFace: Any = None) -> None:
        self.light.draw_path(gc, path, transform, rgbFace)
        self.dark.draw_path(self._darkened(gc), path, transform, self._dark(rgbFace))

    def draw_markers(
        self,
        gc: GraphicsContextBase,
        marker_path: Any,
        marker_trans: Any,
        path: Any,
        trans: Any,
        rgbFace: Any = None,
    ) -> None:
        self.light.draw_markers(gc, marker_path, marker_trans, path, trans, rgbFace)
        self.dark.draw_markers(self._darkened(gc), marker_path, marker_trans, path, trans, self._dark(rgbFace))

    def draw_text(self, gc: GraphicsContextBase, *where_and_what: Any, **how: Any) -> None:
        self.light.draw_text(gc, *where_and_what, **how)
        self.dark.draw_text(self._darkened(gc), *where_and_what, **how)

    def draw_path_collection(self, gc: GraphicsContextBase, *given: Any, **more: Any) -> None:
        self.light.draw_path_collection(gc, *given, **more)
        *where, faces, edges = given[:7]
        darkened = (np.array([self._dark(color) for color in colors]).reshape(-1, 4) for colors in (faces, edges))
        self.dark.draw_path_collection(gc, *where, *darkened, *given[7:], **more)

    def draw_image(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("an image has no dark colours")

    def get_text_width_height_descent(self, *text: Any) -> Any:
        return self.light.get_text_width_height_descent(*text)

    def get_canvas_width_height(self) -> Any:
        return self.light.get_canvas_width_height()

    def points_to_pixels(self, points: Any) -> Any:
        return self.light.points_to_pixels(points)

    def _darkened(self, gc: GraphicsContextBase) -> GraphicsContextBase:
        dark: GraphicsContextBase = self.dark.new_gc()
        dark.copy_properties(gc)
        if gc.get_linewidth() > 0:
            dark.set_foreground(self._dark(gc.get_rgb()), isRGBA=True)
        if gc.get_hatch() is not None:
            dark.set_hatch_color(self._dark(gc.get_hatch_color()))
        return dark

    def _dark(self, color: Any) -> Any:
        if color is None or (len(color) == 4 and color[3] == 0):
            return color
        if (dark := self._colors.get(_rgb(color))) is None:
            raise ValueError(f"the colour {to_hex(color)} is none of the light theme's, so there is no dark one for it")
        return (*dark, *map(float, color[3:]))


def light_and_dark(figure: Figure) -> tuple[bytes, bytes]:
    """A figure that was drawn in colours of ``LIGHT``, as PNG in these and in those of ``DARK``.

    Raises:
        ValueError: the figure has a colour that is none of the theme's.
    """
    figure.set_dpi(200)
    renderer = _TwoPalettes(*FigureCanvasAgg(figure).get_width_height(physical=True), figure.dpi)
    figure.draw(renderer)
    return compressed(np.asarray(renderer.light.buffer_rgba())), compressed(np.asarray(renderer.dark.buffer_rgba()))
