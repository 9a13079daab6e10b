from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from grpo_fast.law import Forecast, OnlinePredictor
from grpo_fast.report.log_plot import plot_log, write_log_plot

STEPS = np.arange(1, 41)
REWARDS = 0.2 + 0.6 * (1 - np.exp(-STEPS / 8)) + np.random.default_rng(0).normal(0, 0.02, 40)


@pytest.fixture(scope="module")
def beliefs() -> list[Forecast]:
    law = OnlinePredictor(100, reward_range=(0, 1))
    return [law.observe(int(step), step / 100, float(reward)) for step, reward in zip(STEPS, REWARDS, strict=True)]


def words_of(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.axes[0].texts)


def test_the_band_is_the_forecast_and_ends_with_the_budget(beliefs: list[Forecast]) -> None:
    figure = plot_log(STEPS, REWARDS, forecast=beliefs[-1], name="critic/rewards/mean")
    axis = figure.axes[0]
    assert axis.get_ylabel() == "critic/rewards/mean"
    corners = axis.collections[0].get_paths()[0].get_extents()
    assert (corners.x0, corners.x1) == (0, 100)
    assert corners.y1 == pytest.approx(max(beliefs[-1].band.high))
    assert axis.get_xlim()[1] >= 100
    assert "believed at step 40" in words_of(figure)
    assert "would" not in words_of(figure)


def test_a_stop_is_drawn_where_it_would_have_been(beliefs: list[Forecast]) -> None:
    stop = beliefs[29]
    figure = plot_log(STEPS, REWARDS, forecast=beliefs[-1], stop=stop)
    axis = figure.axes[0]
    assert f"would have stopped\nat step 30\nfor the end {stop.median:.3g}" in words_of(figure)
    assert "steps that would not have been run" in words_of(figure)
    assert [line.get_xdata()[0] for line in axis.lines if len(set(line.get_xdata())) == 1] == [30]
    assert axis.collections[0].get_paths()[0].get_extents().y1 == pytest.approx(max(stop.band.high))


def test_doubt_and_missing_rewards(beliefs: list[Forecast]) -> None:
    rewards = REWARDS.copy()
    rewards[3:6] = np.nan
    assert "not identifiable yet" in words_of(plot_log(STEPS, rewards, forecast=beliefs[2]))


def test_a_png_file_is_written(beliefs: list[Forecast], tmp_path: Path) -> None:
    path = tmp_path / "log.png"
    write_log_plot(path, STEPS, REWARDS, forecast=beliefs[-1])
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"log\.pdf must end in \.png"):
        write_log_plot(tmp_path / "log.pdf", STEPS, REWARDS, forecast=beliefs[-1])
