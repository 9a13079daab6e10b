from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grpo_fast.law import Forecast, OnlinePredictor
from grpo_fast.report.log_plot import LogBeliefs, headline, plot_log, write_log_plot

STEPS = np.arange(1, 41)
REWARDS = 0.2 + 0.6 * (1 - np.exp(-STEPS / 8)) + np.random.default_rng(0).normal(0, 0.02, 40)


def row(forecast: Forecast) -> dict[str, Any]:
    return forecast.to_dict()


@pytest.fixture(scope="module")
def beliefs() -> LogBeliefs:
    law = OnlinePredictor(100, reward_range=(0, 1))
    prior = row(law.forecast())
    rows = [row(law.observe(int(step), step / 100, float(reward))) for step, reward in zip(STEPS, REWARDS, strict=True)]
    return LogBeliefs(
        steps=STEPS,
        rewards=REWARDS,
        name="critic/rewards/mean",
        horizon=100,
        rows=rows,
        prior=prior,
        stop_step=None,
        epsilon=0.01,
        confidence=0.9,
    )


def words_of(figure: Figure) -> str:
    return "\n".join(text.get_text() for axis in figure.axes for text in (*axis.texts, axis.title, axis._left_title))


def upright(axis: Axes) -> list[float]:
    return [float(np.asarray(line.get_xdata())[0]) for line in axis.lines if len(set(np.asarray(line.get_xdata()))) == 1]


def test_the_band_is_the_forecast_and_ends_with_the_budget(beliefs: LogBeliefs) -> None:
    figure = plot_log(beliefs)
    assert len(figure.axes) == 9, "the log, four beliefs, and four panels of how they came about"
    axis = figure.axes[0]
    assert axis.get_ylabel() == "critic/rewards/mean"
    corners = axis.collections[0].get_paths()[0].get_extents()
    assert (corners.x0, corners.x1) == (40, 100), "nothing is foretold of the past"
    assert corners.y1 == pytest.approx(max(beliefs.rows[-1]["band"]["high"]))
    low, high = axis.get_ylim()
    assert low < beliefs.rows[-1]["low"] < beliefs.rows[-1]["high"] < high, "no interval is cut off"
    assert axis.get_xlim() == (0, 100)
    assert upright(axis) == [40]
    assert [upright(small)[0] for small in figure.axes[1:5]] == [8, 16, 24, 32]
    assert "step 40: for the end" in words_of(figure)
    assert "Step 8" in words_of(figure)
    assert "held" not in words_of(figure), "the end has not come"


def test_a_stop_is_drawn_where_it_would_have_been(beliefs: LogBeliefs) -> None:
    stopped = replace(beliefs, stop_step=30, horizon=40)
    figure = plot_log(stopped)
    axis, stop = figure.axes[0], beliefs.rows[29]
    assert f"step 30: for the end\n{stop['median']:.3g}" in words_of(figure)
    assert (
        headline(stopped)
        == f"Would have stopped at step 30, 25 % saved, expecting {stop['median']:.3g}; {stopped.came:.3g} came"
    )
    assert upright(axis) == [30]
    assert axis.collections[0].get_paths()[0].get_extents().y1 == pytest.approx(max(stop["band"]["high"]))
    assert "Step 16: held" in words_of(figure)
    assert stopped.came == pytest.approx(np.mean(REWARDS[-5:]))


def test_what_the_title_says(beliefs: LogBeliefs) -> None:
    last = beliefs.rows[-1]
    sure, unsure = (replace(beliefs, rows=[last | {"identifiable": known}]) for known in (True, False))
    assert headline(sure).endswith("is expected at step 100; no stop")
    assert headline(unsure).startswith("Too early to tell: ")
    assert "expected at step 1,000" in headline(replace(sure, horizon=1000))


def test_doubt_and_missing_rewards(beliefs: LogBeliefs) -> None:
    rewards = REWARDS.copy()
    rewards[3:6] = np.nan
    few = replace(beliefs, rewards=rewards[:7], steps=STEPS[:7], rows=beliefs.rows[:3])
    figure = plot_log(few)
    assert len(figure.axes) == 1, "three beliefs are no history"
    assert "not identifiable yet" in words_of(figure)
    assert np.isnan(few.came)
    assert len(plot_log(replace(few, rows=[])).axes) == 1


def test_a_png_file_is_written(beliefs: LogBeliefs, tmp_path: Path) -> None:
    path = tmp_path / "log.png"
    write_log_plot(path, beliefs)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_full_disk_is_told_with_the_file(beliefs: LogBeliefs) -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_log_plot(Path("/dev/full"), beliefs)
