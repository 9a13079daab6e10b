from __future__ import annotations

import math
import statistics

import pytest

from grpo_fast.rewards.report import Tally
from grpo_fast.types import Completion, Group, Prompt


def make_groups(*sizes: int) -> list[Group]:
    return [Group(Prompt(0, "p", (1,)), [Completion((1,), (0.0,), "stop", "x")] * size) for size in sizes]


def test_rewards_are_weighed_over_the_functions_that_gave_one() -> None:
    tally = Tally(["f", "g"], 4)
    tally.store(0, [1.0, None], first=0)
    tally.store(0, [2.0, None], first=2)
    tally.store(1, [10.0, 20.0, None, None])
    groups = make_groups(3, 1)
    tally.fill(groups, [1.0, 0.5])
    assert groups[0].reward == [6.0, 10.0, 2.0]
    assert math.isnan(groups[1].reward[0])
    assert groups[0].rewards[0] == [1.0, 10.0]
    assert math.isnan(groups[0].rewards[2][1])


def test_statistics_leave_out_what_has_no_value() -> None:
    tally = Tally(["f", "g", "h"], 3)
    tally.store(0, [1.0, 2.0, None])
    tally.store(1, [5.0, None, None])
    report = tally.report()
    assert report.mean["f"] == 1.5
    assert report.std["f"] == pytest.approx(statistics.stdev([1.0, 2.0]))
    assert report.mean["g"] == 5.0
    assert math.isnan(report.std["g"])
    assert math.isnan(report.mean["h"])
    assert report.nones == {"f": 1, "g": 2, "h": 3}


def test_metrics_have_trl_names_and_count_what_went_wrong() -> None:
    tally = Tally(["f"], 2)
    tally.store(0, [0.0, 1.0])
    assert tally.report().metrics() == {"rewards/f/mean": 0.5, "rewards/f/std": pytest.approx(math.sqrt(0.5))}
    tally.errors[0], tally.timeouts[0], tally.restarts = 2, 1, 3
    metrics = tally.report().metrics()
    assert (metrics["rewards/f/errors"], metrics["rewards/f/timeouts"], metrics["rewards/restarts"]) == (2.0, 1.0, 3.0)
    assert "rewards/f/nones" not in metrics


def test_tallies_join_in_order() -> None:
    parts = [Tally(["a", "b"], 2), Tally(["a", "b"], 0), Tally(["a", "b"], 1)]
    parts[0].store(0, [1.0, 2.0])
    parts[2].store(0, [3.0])
    parts[2].store(1, [4.0])
    parts[0].errors[1], parts[2].errors[1], parts[2].timeouts[0], parts[0].restarts = 1, 2, 1, 3
    parts[0].problems.append("first")
    parts[2].problems.append("second")
    whole = Tally.joined(parts)
    assert whole.values[0] == [1.0, 2.0, 3.0]
    assert str(whole.values[1]) == "[nan, nan, 4.0]"
    assert (whole.errors, whole.timeouts, whole.restarts) == ([0, 3], [1, 0], 3)
    assert whole.problems == ["first", "second"]
    assert whole.num_completions == 3
