from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.colors import to_hex

from grpo_fast.config import Config
from grpo_fast.law import OnlinePredictor
from grpo_fast.report.belief_plots import ahead_of
from grpo_fast.report.palettes import light_and_dark
from grpo_fast.report.plots import (
    PICTURES,
    belief_steps,
    phase_spans,
    pictures_of,
    plot_forecasts,
    plot_health,
    plot_phases,
    plot_stop,
    view_end,
)
from grpo_fast.report.run import Run
from grpo_fast.report.theme import DARK, LIGHT, drawing, png

MakeRun = Callable[..., Path]


def _line(axis: Axes, color: str, *, marker: str = "None") -> np.ndarray:
    """(n, 2) points of the first line with that colour and marker."""
    found = [line for line in axis.get_lines() if to_hex(line.get_color()) == color and line.get_marker() == marker]
    return np.asarray(found[0].get_xydata())


def _texts(axis: Axes) -> str:
    return "\n".join(text.get_text() for text in axis.texts)


def test_beliefs_are_shown_at_shares_of_the_steps_done(make_run: MakeRun) -> None:
    run = Run.load(make_run(steps=150))
    assert belief_steps(run) == [30, 60, 90, 120]
    assert belief_steps(Run.load(make_run("none", steps=150, forecasts=False))) == []
    assert belief_steps(Run.load(make_run("few", steps=6))) == [2, 3, 4, 5]


def test_each_panel_shows_only_what_was_known(make_run: MakeRun) -> None:
    run = Run.load(make_run(steps=150))
    figure = plot_forecasts(run, LIGHT)
    assert len(figure.axes) == 4
    for axis, cut in zip(figure.axes, [30, 60, 90, 120], strict=True):
        seen, later = _line(axis, LIGHT.data, marker="o"), _line(axis, LIGHT.faint, marker="o")
        assert seen[:, 0].max() == cut
        assert later[:, 0].min() == cut + 1
        assert np.array_equal(seen[:, 1], run.metric("reward")[:cut], equal_nan=True)
        forecast = run.forecast_at(cut)
        assert forecast is not None
        ahead, believed = np.array(forecast["band"]["step"]) > cut, _line(axis, LIGHT.forecast)
        assert believed[0, 0] == cut, "nothing is foretold of the past"
        assert np.allclose(believed[1:, 1], np.array(forecast["band"]["median"])[ahead])
        (band,) = (item for item in axis.collections if isinstance(item, FillBetweenPolyCollection))
        corners = band.get_paths()[0].vertices
        assert corners[:, 1].max() == pytest.approx(ahead_of(forecast)[3].max())
        assert f"After step {cut}" in axis.get_title(loc="left")
        assert f"{forecast['median']:.3f} ({forecast['low']:.3f} to {forecast['high']:.3f})" in _texts(axis)
    assert "not identifiable yet" in _texts(figure.axes[0])
    assert "not identifiable yet" not in _texts(figure.axes[3])
    assert f"ended at {run.final_reward:.3f}: inside" in _texts(figure.axes[3])


def test_a_final_level_outside_the_interval_is_called_so(make_run: MakeRun) -> None:
    path = make_run(steps=150)
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"final_reward": 0.2}))
    assert "ended at 0.200: outside" in _texts(plot_forecasts(Run.load(path)).axes[3])


def test_without_forecasts_there_is_one_panel_that_says_so(make_run: MakeRun) -> None:
    run = Run.load(make_run(steps=40, forecasts=False))
    figure = plot_forecasts(run)
    assert len(figure.axes) == 1
    assert "no forecast was made" in _texts(figure.axes[0])
    assert "no forecast was made" in _texts(plot_stop(run).axes[1])
    assert view_end(run) == 80


def test_before_the_first_forecast_a_panel_says_so(make_run: MakeRun) -> None:
    assert "no forecast yet" in _texts(plot_forecasts(Run.load(make_run(steps=12))).axes[0])


def test_phases_are_three_spans_in_order_whatever_the_flicker(make_run: MakeRun) -> None:
    run = Run.load(make_run(steps=168))
    assert phase_spans(run) == [("slow start", 0, 35), ("rapid improvement", 35, 105), ("plateau", 105, 168)]
    assert phase_spans(Run.load(make_run("early", steps=20))) == [("slow start", 0, 20)]
    always = dataclasses.replace(run, forecasts=[{"step": step, "phase": "plateau"} for step in range(5, 169)])
    assert phase_spans(always) == [("plateau", 0, 168)]
    assert phase_spans(dataclasses.replace(run, forecasts=[])) == []


def test_the_end_is_marked_and_unused_budget_hatched(make_run: MakeRun) -> None:
    run = Run.load(make_run(steps=168))
    (axis,) = plot_phases(run).axes
    hatched = [patch for patch in axis.patches if patch.get_hatch()]
    assert [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in hatched] == [(168, 400)]  # type: ignore[attr-defined]
    assert "stopped by its forecast\nstep 168" in _texts(axis)
    assert "232 steps not run, 58 % of the budget" in _texts(axis)
    assert _line(axis, LIGHT.held_out, marker="D")[:, 0].tolist() == [*range(20, 161, 20), 168]
    assert _line(axis, LIGHT.forecast)[0, 0] == 168
    assert axis.get_xlim()[1] >= 400


@pytest.mark.parametrize(
    ("stopped_by", "words", "hatched"),
    [(None, "last step so far", 0), ("interrupt", "interrupted", 0), ("max_tokens", "budget reached: max_tokens", 1)],
)
def test_other_ends_are_named(make_run: MakeRun, stopped_by: str | None, words: str, hatched: int) -> None:
    (axis,) = plot_phases(Run.load(make_run(steps=100, stopped_by=stopped_by, resumed_at=40))).axes
    assert words in _texts(axis)
    assert "resumed" in _texts(axis)
    assert sum(bool(patch.get_hatch()) for patch in axis.patches) == hatched
    assert f"300 steps {'not run' if hatched else 'to come'}" in _texts(axis)


def test_the_stop_shows_probability_threshold_and_moment(make_run: MakeRun) -> None:
    run = Run.load(make_run(steps=168))
    upper, lower = plot_stop(run).axes
    assert np.allclose(_line(upper, LIGHT.forecast)[:, 1], run.forecast_series("median"))
    sure = _line(lower, LIGHT.forecast)
    known = run.forecast_series("step") > 45
    assert np.isnan(sure[~known, 1]).all()
    assert np.allclose(sure[known, 1], run.forecast_series("p_gain_below_eps")[known])
    assert any(np.allclose(line.get_ydata(), Config().forecast_confidence) for line in lower.get_lines())
    assert any(np.allclose(line.get_xdata(), 168) for line in lower.get_lines())
    assert f"enough to stop: {Config().forecast_confidence:.0%}".replace("%", " %") in _texts(lower)
    assert "sure at step 168" in _texts(lower)


def test_the_stop_marks_what_counts_and_what_was_vetoed(make_run: MakeRun) -> None:
    run = Run.load(make_run(steps=168))
    sure = [dict(row, p_gain_below_eps=0.99, expected_gain=0.0) for row in run.forecasts]
    lower = plot_stop(dataclasses.replace(run, forecasts=[*sure[:-1], sure[-1] | {"veto": "rising slope"}])).axes[1]
    told = [text.get_text() for text in lower.get_legend().get_texts()]
    assert told == ["while not identifiable", "identifiable", "vetoed", "counts for a stop"]
    assert _line(lower, LIGHT.ink, marker="x")[:, 0].tolist() == [sure[-1]["step"]]


def test_health_shows_what_was_logged(make_run: MakeRun) -> None:
    def titles(run: Run) -> list[str]:
        return [axis.get_title(loc="left") for axis in plot_health(run).axes if axis.get_visible()]

    without, with_kl = Run.load(make_run("a", steps=30)), Run.load(make_run("b", steps=30, kl=True))
    assert "KL to reference, nats" not in titles(without)
    assert titles(with_kl)[:3] == ["Entropy, nats", "KL to reference, nats", "Gradient norm"]
    axis = plot_health(with_kl).axes[0]
    assert np.allclose(_line(axis, LIGHT.data, marker="o")[:, 1], with_kl.metric("entropy"))
    bare = dataclasses.replace(without, metrics={"reward": without.metric("reward")})
    assert "none of these metrics was logged" in _texts(plot_health(bare).axes[0])
    jumpy = dataclasses.replace(without, metrics={"grad_norm": np.logspace(-2, 3, 30)})
    assert plot_health(jumpy).axes[0].get_yscale() == "log"


@pytest.mark.parametrize("name", sorted(PICTURES))
@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1, "stopped_by": None, "eval_steps": 0},
        {"steps": 3, "stopped_by": "interrupt"},
        {"steps": 40, "nan_steps": tuple(range(1, 41)), "eval_steps": 0},
        {"steps": 60, "max_steps": 60, "stopped_by": "max_steps"},
    ],
    ids=["one step", "three steps", "only NaN", "to the end"],
)
def test_every_picture_is_drawn_for_odd_runs(make_run: MakeRun, name: str, options: dict[str, object]) -> None:
    run = Run.load(make_run(alarm=True, **options))
    drawn = set(pictures_of(run))
    assert drawn >= set(PICTURES) - {"beliefs"}
    assert ("beliefs" in drawn) == (len(run.forecasts) > 1)
    for theme in (DARK, dataclasses.replace(LIGHT, narrow=True)):
        with drawing():
            assert name not in drawn or png(PICTURES[name](run, theme)).startswith(b"\x89PNG")


def test_a_dark_picture_is_the_same_where_it_is_drawn_with_the_light_one(make_run: MakeRun) -> None:
    run = Run.load(make_run(alarm=True, steps=40))
    with drawing():
        for name, draw in pictures_of(run).items():
            light, dark = light_and_dark(draw(run, LIGHT))
            assert light == png(draw(run, LIGHT)), name
            assert dark == png(draw(run, DARK)) != light, name


def test_forecasts_as_they_are_logged_are_enough_for_every_picture(make_run: MakeRun) -> None:
    path = make_run(steps=30)
    law = OnlinePredictor(400, reward_range=(0.0, 1.0))
    rows = [law.observe(step, step / 400, 0.1 + 0.02 * step).to_dict() | {"veto": ""} for step in range(1, 31)]
    (path / "forecasts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    run = Run.load(path)
    assert {"phases", "forecasts", "beliefs", "stop"} <= set(pictures_of(run))
    for draw in pictures_of(run).values():
        assert draw(run, LIGHT).axes
