from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from grpo_fast.report.palettes import light_and_dark
from grpo_fast.report.theme import DARK, LIGHT, Theme, drawing, grid, key, png, title


def every_stroke(theme: Theme) -> Figure:
    """Lines, markers, bands, stacked areas, hatched bars, words in boxes, a key."""
    figure, (one, two) = grid(theme, 2, 1, height=3.0)
    steps = np.arange(20.0)
    one.plot(steps, steps, "o", color=theme.data, alpha=0.35, label="dots")
    one.plot(steps, steps**1.1, color=theme.forecast, ls=(0, (4, 3)), label="dashes")
    one.fill_between(steps, steps - 1, steps + 1, color=theme.forecast, alpha=0.2, lw=0)
    one.axvspan(5, 9, facecolor="none", edgecolor=theme.faint, hatch="///", alpha=0.5, lw=0)
    one.text(2, 10, "words", color=theme.ink, bbox={"facecolor": theme.paper, "alpha": 0.75, "lw": 0})
    key(one, theme)
    two.stackplot(steps, np.ones((3, 20)), colors=theme.stacked, lw=0)
    two.barh([0, 1], [3, 4], left=[1, 2], facecolor=theme.phases[0], edgecolor=theme.faint, hatch="///", height=0.5, lw=0)
    title(two, "Title", theme)
    return figure


def test_each_picture_has_the_bytes_of_one_that_is_drawn_by_itself() -> None:
    with drawing():
        light, dark = light_and_dark(every_stroke(LIGHT))
        assert light == png(every_stroke(LIGHT))
        assert dark == png(every_stroke(DARK))
    for picture, paper in ((light, LIGHT.paper), (dark, DARK.paper)):
        with Image.open(io.BytesIO(picture)) as image:
            corner = image.convert("RGB").getpixel((0, 0))
        assert corner == tuple(bytes.fromhex(paper.removeprefix("#")))


def unknown_line(axis: Axes) -> None:
    axis.plot([0, 1], [0, 1], color="#123456")


def unknown_face(axis: Axes) -> None:
    axis.axvspan(0, 1, facecolor="#123456", lw=0)


def unknown_word(axis: Axes) -> None:
    axis.text(0, 0, "word", color="#123456")


def unknown_area(axis: Axes) -> None:
    axis.fill_between([0, 1], [1, 2], color="#123456")


@pytest.mark.parametrize("draw", [unknown_line, unknown_face, unknown_word, unknown_area])
def test_a_colour_without_a_dark_one_is_refused(draw) -> None:
    figure, (axis,) = grid(LIGHT, 1, 1, height=2.0)
    draw(axis)
    with drawing(), pytest.raises(ValueError, match=r"the colour #123456 is none of the light theme's"):
        light_and_dark(figure)


def test_an_image_is_refused() -> None:
    figure, (axis,) = grid(LIGHT, 1, 1, height=2.0)
    axis.imshow(np.zeros((2, 2)))
    with drawing(), pytest.raises(NotImplementedError, match="an image has no dark colours"):
        light_and_dark(figure)
