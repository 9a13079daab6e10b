"""The embedded default: a weak start, an S-shaped rise, and a stop by forecast that costs almost nothing."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

import pytest

from benchmarks.system.embedded_run import full_budget_run
from tests.conftest import without_tracer


@pytest.fixture(scope="module", params=[0, 1, 2])
def run(request: pytest.FixtureRequest) -> dict[str, Any]:
    with without_tracer():
        return full_budget_run(request.param)


@pytest.mark.slow
def test_it_starts_weak_and_ends_strong(run: dict[str, Any]) -> None:
    assert 0.05 <= run["initial_accuracy"] <= 0.25
    assert run["final_accuracy"] >= 0.85


@pytest.mark.slow
def test_the_rise_is_s_shaped(run: dict[str, Any]) -> None:
    tenth = run["max_steps"] // 10
    levels = [statistics.mean(run["reward"][i : i + tenth // 2]) for i in range(0, run["max_steps"], tenth // 2)]
    rises = [after - before for before, after in pairwise(levels)]
    steepest = max(range(len(rises)), key=rises.__getitem__)
    assert steepest > 0, f"no slow start: {levels[:6]}"
    assert rises[steepest] > 2 * max(rises[0], 0.0)
    assert abs(levels[-1] - statistics.mean(levels[-6:-1])) < 0.03, "no plateau"


@pytest.mark.slow
def test_the_forecast_stops_it_in_time_and_keeps_what_was_to_be_had(run: dict[str, Any]) -> None:
    stop = run["stop"]
    assert stop, "the forecast never asked for a stop"
    assert stop["step"] < run["max_steps"]
    assert stop["accuracy"] >= 0.98 * run["final_accuracy"]
    assert "chance that less than 0.01 reward is left" in stop["reason"]
