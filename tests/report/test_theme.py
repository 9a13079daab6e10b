from __future__ import annotations

import io
from dataclasses import fields

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from grpo_fast.report.theme import DARK, LIGHT, Theme, compressed, drawing, grid, key, png, value_limits


def _luminance(color: str) -> float:
    channels = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _contrast(a: str, b: str) -> float:
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_words_and_series_stand_out_from_the_paper(theme: Theme) -> None:
    for name in ("ink", "muted"):
        assert _contrast(getattr(theme, name), theme.paper) >= 4.5, name
        assert all(_contrast(getattr(theme, name), phase) >= 4.0 for phase in theme.phases), name
    assert all(_contrast(theme.ink, area) >= 4.5 for area in theme.stacked)
    for name in ("data", "forecast", "held_out"):
        assert _contrast(getattr(theme, name), theme.paper) >= 3.0, name


def test_the_themes_say_the_same_things() -> None:
    assert {f.name for f in fields(LIGHT)} == {f.name for f in fields(DARK)}
    assert LIGHT.columns(3, 2) == 3
    assert Theme(**{f.name: getattr(DARK, f.name) for f in fields(DARK)} | {"narrow": True}).columns(3, 2) == 2


def test_a_picture_has_two_pixels_for_each_css_pixel_and_always_the_same_bytes() -> None:
    def draw() -> bytes:
        figure, (axis,) = grid(LIGHT, 1, 1, height=2.0)
        axis.plot([0, 1], [0, 1], color=LIGHT.data)
        return png(figure)

    first = draw()
    assert first == draw()
    with Image.open(io.BytesIO(first)) as image:
        assert image.size == (1680, 400)
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_a_picture_has_the_256_colours_that_cover_all_of_its_own() -> None:
    figure, (axis,) = grid(LIGHT, 1, 1, height=2.0)
    axis.plot([0, 1], [0, 1], color=LIGHT.data)
    axis.fill_between([0, 1], [0, 1], color=LIGHT.forecast, alpha=0.2)
    axis.text(0.2, 0.5, "words", color=LIGHT.held_out, alpha=0.7)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())
    noisy = drawn.copy()
    noisy[::7, ::5, :3] = np.random.default_rng(0).integers(0, 256, noisy[::7, ::5, :3].shape)
    for pixels, furthest in ((drawn, 8), (noisy, 48)):
        assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 256
        with Image.open(io.BytesIO(compressed(pixels))) as image:
            assert image.mode == "P"
            found = np.asarray(image.convert("RGB"))
        whole = Image.fromarray(pixels).convert("RGB")
        chosen = whole.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).convert("RGB")
        errors = [np.abs(colors.astype(int) - pixels[..., :3]) for colors in (found, np.asarray(chosen))]
        assert errors[0].mean() <= 1.05 * errors[1].mean(), "it is as good as what Pillow makes of all pixels"
        assert errors[0].max() <= furthest


def test_foreign_settings_stay_out_and_come_back() -> None:
    with mpl.rc_context({"text.usetex": True, "font.family": ["serif"]}):
        with drawing():
            assert mpl.rcParams["text.usetex"] is False
            assert mpl.rcParams["font.family"] == ["DejaVu Sans"]
        assert mpl.rcParams["text.usetex"] is True


def test_limits_hold_the_data_and_tame_beliefs() -> None:
    low, high = value_limits(np.array([0.2, np.nan, 0.8]), beliefs=[-5.0, 9.0])
    assert -0.2 < low < 0.0
    assert 1.0 < high < 1.2
    assert value_limits(np.array([np.nan])) == (0.0, 1.0)
    low, high = value_limits(np.array([0.5]))
    assert low < 0.5 < high
    low, high = value_limits(np.array([0.0, 1.0]), beliefs=[0.4, 0.6])
    assert -0.1 < low < 0.0
    assert 1.0 < high < 1.1


def test_no_series_no_key() -> None:
    _, (axis,) = grid(LIGHT, 1, 1, height=2.0)
    key(axis, LIGHT)
    assert axis.get_legend() is None
