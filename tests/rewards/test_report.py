from __future__ import annotations

import itertools
import math
import statistics

import pytest

from grpo_fast.rewards.report import Tally
from grpo_fast.types import Completion, Group, Prompt, Scored


def make_groups(*sizes: int) -> list[Group]:
    return [Group(Prompt(0, "p", (1,)), [Completion((1,), (0.0,), "stop", "x")] * size) for size in sizes]


def test_rewards_are_weighed_over_the_functions_that_gave_one() -> None:
    tally = Tally(["f", "g"], 4)
    tally.store(0, Scored([1.0, None]), first=0)
    tally.store(0, Scored([2.0, None]), first=2)
    tally.store(1, Scored([10.0, 20.0, None, None]))
    groups = make_groups(3, 1)
    tally.fill(groups, [1.0, 0.5])
    assert groups[0].reward == [6.0, 10.0, 2.0]
    assert math.isnan(groups[1].reward[0])
    assert groups[0].rewards[0] == [1.0, 10.0]
    assert math.isnan(groups[0].rewards[2][1])


def test_statistics_leave_out_what_has_no_value() -> None:
    tally = Tally(["f", "g", "h"], 3)
    tally.store(0, Scored([1.0, 2.0, None]))
    tally.store(1, Scored([5.0, None, None]))
    report = tally.report()
    assert report.mean["f"] == 1.5
    assert report.std["f"] == pytest.approx(statistics.stdev([1.0, 2.0]))
    assert report.mean["g"] == 5.0
    assert math.isnan(report.std["g"])
    assert math.isnan(report.mean["h"])
    assert report.nones == {"f": 1, "g": 2, "h": 3}


def test_metrics_have_trl_names_and_count_what_went_wrong() -> None:
    tally = Tally(["f"], 2)
    tally.store(0, Scored([0.0, 1.0]))
    assert tally.report().metrics() == {"rewards/f/mean": 0.5, "rewards/f/std": pytest.approx(math.sqrt(0.5))}
    tally.errors[0], tally.timeouts[0], tally.restarts = 2, 1, 3
    metrics = tally.report().metrics()
    assert (metrics["rewards/f/errors"], metrics["rewards/f/timeouts"], metrics["rewards/restarts"]) == (2.0, 1.0, 3.0)
    assert "rewards/f/nones" not in metrics


def test_tallies_join_in_order() -> None:
    parts = [Tally(["a", "b"], 2), Tally(["a", "b"], 0), Tally(["a", "b"], 1)]
    parts[0].store(0, Scored([1.0, 2.0], {"m": [0.5]}, {"said": ["a", "b"]}))
    parts[2].store(0, Scored([3.0], {"m": [2.0], "n": [1.0]}))
    parts[2].store(1, Scored([4.0], {}, {"said": ["c"]}))
    parts[0].errors[1], parts[2].errors[1], parts[2].timeouts[0], parts[0].restarts = 1, 2, 1, 3
    parts[0].problems.append("first")
    parts[2].problems.append("second")
    whole = Tally.joined(parts)
    assert whole.values[0] == [1.0, 2.0, 3.0]
    assert str(whole.values[1]) == "[nan, nan, 4.0]"
    assert (whole.errors, whole.timeouts, whole.restarts) == ([0, 3], [1, 0], 3)
    assert whole.problems == ["first", "second"]
    assert whole.num_completions == 3
    assert whole.report().logged == {"m": pytest.approx((2 * 0.5 + 1 * 2.0) / 3), "n": 1.0}
    assert whole.extra == [{"said": ["a", "b", None]}, {"said": [None, None, "c"]}]


def test_logged_numbers_weigh_as_the_completions_of_their_call_whatever_the_order() -> None:
    calls = [
        (0, Scored([1.0] * 3, {"share": [0.1], "each": [1.0, 2.0, 3.0]})),
        (3, Scored([1.0], {"share": [0.7], "none": [math.nan, math.inf]})),
        (4, Scored([1.0] * 2, {"share": [math.nan], "each": [5.0]})),
    ]
    found = []
    for order in itertools.permutations(calls):
        tally = Tally(["f"], 6)
        for first, scored in order:
            tally.store(0, scored, first=first)
        found.append(tally.report().logged)
    assert found[0]["share"] == pytest.approx((3 * 0.1 + 0.7) / 4)
    assert found[0]["each"] == pytest.approx((3 * 6.0 + 2 * 5.0) / 11)
    assert math.isnan(found[0]["none"])
    assert {str(one) for one in found} == {str(found[0])}, "bit for bit"
    assert list(found[0]) == ["each", "none", "share"]


def test_columns_are_cut_into_groups_and_taken_names_get_that_of_their_function() -> None:
    tally = Tally(["f", "g"], 3)
    tally.store(0, Scored([1.0] * 3, {}, {"parsed": ["1", "2", "3"], "reward": [0, 0, 1]}))
    tally.store(1, Scored([1.0], {}, {"parsed": [True], "note": ["x"]}), first=2)
    groups = make_groups(2, 1)
    tally.fill(groups, [1.0, 1.0])
    assert groups[0].extra == {"parsed": ["1", "2"], "f/reward": [0, 0], "g/parsed": [None, None], "note": [None, None]}
    assert groups[1].extra == {"parsed": ["3"], "f/reward": [1], "g/parsed": [True], "note": ["x"]}
