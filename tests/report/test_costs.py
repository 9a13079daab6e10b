from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_fast.report.costs import plot_compute
from grpo_fast.report.run import Run
from grpo_fast.report.theme import LIGHT

MakeRun = Callable[..., Path]


def test_bars_are_the_phases_by_size(make_run: MakeRun) -> None:
    run = Run.load(make_run(steps=100))
    seconds, flops, saved = plot_compute(run).axes
    assert [bar.get_width() for bar in seconds.patches] == pytest.approx(sorted(run.seconds_by_phase().values()))  # type: ignore[attr-defined]
    assert [label.get_text() for label in seconds.get_yticklabels()][-2:] == ["train", "rollout"]
    assert [label.get_text() for label in flops.get_yticklabels()] == ["prefill", "forward", "decode", "backward"]
    assert "1 min 50 s, 57 %" in [text.get_text() for text in seconds.texts]
    assert "260 GFLOP, 41 %" in [text.get_text() for text in flops.texts]
    assert [label.get_text() for label in saved.get_yticklabels()] == ["money", "device time", "FLOPs", "steps"]
    widths = [patch.get_width() for patch in saved.patches]  # type: ignore[attr-defined]
    assert widths == pytest.approx([0.25] * 4 + [0.75] * 4)
    assert "300 not run, 75 %" in [text.get_text() for text in saved.texts]


def test_what_an_interrupted_run_left_is_to_come_not_saved(make_run: MakeRun) -> None:
    words = [text.get_text() for text in plot_compute(Run.load(make_run(steps=100, stopped_by="interrupt"))).axes[2].texts]
    assert "300 to come, 75 %" in words
    assert not any("saved" in word for word in words)


def test_nothing_saved_no_panel(make_run: MakeRun) -> None:
    assert len(plot_compute(Run.load(make_run("full", steps=40, max_steps=40, stopped_by="max_steps"))).axes) == 2
    assert len(plot_compute(Run.load(make_run("going", steps=40, stopped_by=None))).axes) == 2


def test_a_run_without_meter_says_so(make_run: MakeRun) -> None:
    run = dataclasses.replace(Run.load(make_run(steps=4, stopped_by=None)), metrics={})
    for axis in plot_compute(run).axes:
        assert [text.get_text() for text in axis.texts] == ["not measured"]


def test_narrow_pictures_stand_upright(make_run: MakeRun) -> None:
    run = Run.load(make_run(steps=100))
    wide, narrow = plot_compute(run), plot_compute(run, dataclasses.replace(LIGHT, narrow=True))
    assert narrow.get_figwidth() < 0.5 * wide.get_figwidth()
    assert narrow.get_figheight() > wide.get_figheight()
