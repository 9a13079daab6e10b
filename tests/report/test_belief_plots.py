from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from grpo_fast.report.belief_plots import (
    ahead_of,
    alarm_words,
    band_of,
    counts_for_stop,
    draw_end,
    draw_gain,
    draw_phase_probabilities,
    draw_prior,
    draw_shapes,
    has_alarm,
    has_beliefs,
    plot_alarm,
    plot_beliefs,
)
from grpo_fast.report.run import Run
from grpo_fast.report.theme import DARK, LIGHT, grid


def row(step: int, **values: Any) -> dict[str, Any]:
    found = {
        "step": step,
        "median": 0.7,
        "low": 0.5,
        "high": 0.8,
        "p_gain_below_eps": step / 40,
        "phase_probabilities": [max(0.0, 0.8 - step / 20), min(0.2 + step / 50, 1 - step / 40), 0.0],
        "identifiable": step > 10,
        "veto": "",
        "band": {"step": [0.0, 50.0, 100.0], "low": [0.1, 0.4, 0.5], "median": [0.2, 0.6, 0.7], "high": [0.3, 0.7, 0.8]},
    } | values
    shares = found["phase_probabilities"]
    shares[2] = 1 - shares[0] - shares[1]
    return found


ROWS = [row(step) for step in range(1, 41)]


@pytest.fixture
def axis() -> Axes:
    return grid(LIGHT, 1, 1, height=2.0)[1][0]


def words_of(axis: Axes) -> list[str]:
    return [axis.get_title(loc="left"), *(text.get_text() for text in axis.texts)]


def test_bands() -> None:
    assert [values.tolist() for values in band_of(ROWS[0])][1] == [0.1, 0.4, 0.5]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_phases_fill_the_panel_and_are_named_where_there_is_room(axis: Axes, theme: Any) -> None:
    draw_phase_probabilities(axis, ROWS, theme)
    assert axis.get_ylim() == (0, 1)
    tops = [area.get_paths()[0].get_extents() for area in axis.collections]
    assert (min(box.y0 for box in tops), max(box.y1 for box in tops)) == (0, pytest.approx(1))
    words = words_of(axis)
    assert words[0] == "Phase: plateau, 100 % at step 40"
    assert {"slow start", "plateau"} <= set(words)
    draw_phase_probabilities(axis, ROWS[:1], theme)


def test_the_reason_to_stop(axis: Axes) -> None:
    rows = [*ROWS[:-1], row(40, veto="rising slope")]
    draw_gain(axis, rows, LIGHT, epsilon=0.02, confidence=0.9)
    assert words_of(axis) == [
        "P(gain left < 0.02) is 100 %; 90 % stops",
        "grey: not identifiable\ncrosses: vetoed\ngreen: counts for a stop",
    ]
    known = axis.lines[2].get_ydata()
    assert np.isnan(np.asarray(known)[:10]).all()
    assert np.asarray(known)[10:].tolist() == pytest.approx([step / 40 for step in range(11, 41)])
    crosses, bar = axis.lines[3:5]
    assert np.asarray(crosses.get_xdata()).tolist() == [40]
    marked = np.isfinite(np.asarray(bar.get_ydata()))
    assert np.asarray(bar.get_xdata())[marked].tolist() == [36, 37, 38, 39]


@pytest.mark.parametrize(("sure", "foot"), [(0.9, True), (0.1, False)])
def test_what_colours_mean_is_told_where_no_line_runs(axis: Axes, sure: float, foot: bool) -> None:
    draw_gain(axis, [row(step, p_gain_below_eps=sure) for step in range(1, 41)], LIGHT, epsilon=0.02, confidence=0.95)
    told = next(text for text in axis.texts if text.get_text() == "grey: not identifiable")
    assert (told.get_position()[1] < 0.3) == foot


def test_what_counts_for_a_stop() -> None:
    sure = {"p_gain_below_eps": 0.9, "expected_gain": 0.004}
    rows = [
        row(30, **sure | change) for change in ({}, {"expected_gain": 0.02}, {"p_gain_below_eps": 0.7}, {"veto": "all wrong"})
    ]
    rows += [row(30, **sure, identifiable=False), row(30, p_gain_below_eps=0.9)]
    assert counts_for_stop(rows, epsilon=0.01, confidence=0.8).tolist() == [True, False, False, False, False, True]


def test_a_band_ahead_begins_with_its_forecast() -> None:
    step, low, median, high = ahead_of(row(25))
    assert step.tolist() == [25, 50, 100]
    assert (low[0], median[0], high[0]) == pytest.approx((0.25, 0.4, 0.5))
    assert ahead_of(row(100))[0].tolist() == [100]


def test_shapes_before_and_now(axis: Axes) -> None:
    before, now = {"none": 0.5, "straight": 0.5}, {"none": 0.02, "straight": 0.98}
    draw_shapes(axis, (before, now), LIGHT, step=1200)
    assert [bar.get_width() for bar in axis.patches] == [0.5, 0.5, 0.98, 0.02]
    assert words_of(axis) == ["Shape: straight, 98 %", "98 %"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["before", "at step 1,200"]


def test_nothing_is_said_of_what_did_not_happen(axis: Axes) -> None:
    draw_gain(axis, ROWS[15:30], LIGHT, epsilon=0.01, confidence=0.9)
    assert words_of(axis)[1:] == [""]


def test_the_end_and_what_came(axis: Axes) -> None:
    draw_end(axis, [*ROWS, row(41, low=0.75)], LIGHT, came=0.7)
    assert words_of(axis)[0] == "Forecast for the end, 90 %: held 98 % of the time"
    low, high = axis.get_ylim()
    assert low < 0.5
    assert high > 0.8
    draw_end(axis, ROWS, LIGHT, came=float("nan"))
    assert words_of(axis)[0] == "Forecast for the end, 90 %"


def test_prior_against_posterior(axis: Axes) -> None:
    prior = row(0, low=0.0, high=1.0)
    draw_prior(axis, prior, ROWS[-1], LIGHT)
    assert words_of(axis) == ["The rewards took 70 % off the interval", "before", "at step 40"]
    draw_prior(axis, ROWS[-1], prior, LIGHT)
    assert words_of(axis)[0] == "The rewards did not narrow the interval"


def test_beliefs_of_a_run(make_run: Callable[..., Path]) -> None:
    run = Run.load(make_run())
    assert has_beliefs(run)
    phases, prior = plot_beliefs(run).axes
    assert words_of(phases)[0] == "Phase: plateau, 99.9 % at step 168"
    assert words_of(prior)[1:] == ["at step 5", "at step 168"], "the first forecast stands for the prior"
    assert prior.get_xlim() == (0, 400)
    assert not has_beliefs(Run.load(make_run("early", steps=5)))
    assert not has_beliefs(Run.load(make_run("none", steps=20, forecasts=False)))


def test_the_alarm(make_run: Callable[..., Path]) -> None:
    assert not has_alarm(Run.load(make_run("without", steps=20)))
    quiet = Run.load(make_run("quiet", alarm=True))
    assert has_alarm(quiet)
    assert alarm_words(quiet) == "No collapse: the reward's detector came to 35 % of its threshold"
    lower = plot_alarm(quiet).axes[1]
    assert [text.get_text() for text in lower.get_legend().get_texts()] == ["reward", "grad norm", "entropy up"]
    assert np.asarray(lower.lines[-1].get_ydata()).tolist() == [1, 1]
    assert lower.get_ylim()[1] == 1.25

    path = make_run("fallen", alarm=True, collapse_at=150, steps=162, stopped_by="collapse")
    fallen = Run.load(path)
    assert alarm_words(fallen) == "Collapse confirmed at step 162"
    assert plot_alarm(fallen).axes[1].get_ylim()[1] > 1.5, "what went over the line is shown whole"
    (path / "summary.json").unlink()
    with (path / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 159, "event": "alarm", "message": "the reward fell"}) + "\n")
    assert alarm_words(Run.load(path)) == "Alarm at step 159; training went on"
