"""Spending by step: interpolated behind, carried on at the pace of late ahead."""

from __future__ import annotations

import pytest

from grpo_fast.law import Spending
from grpo_fast.law.spending import SpendingCurve


def curve(told: dict[int, Spending]) -> SpendingCurve:
    made = SpendingCurve()
    for step, spent in told.items():
        made.add(step, spent)
    return made


def test_behind_it_is_interpolated_from_zero():
    spent = curve({4: Spending(tokens=400.0), 6: Spending(tokens=1000.0)})
    assert [spent.at(step).tokens for step in (0, 2, 4, 5, 6)] == [0.0, 200.0, 400.0, 700.0, 1000.0]


def test_ahead_the_pace_is_that_of_the_last_fifth():
    told = {step: Spending(money=float(min(step, 16) + 3 * max(0, step - 16))) for step in range(1, 21)}
    assert curve(told).at(30).money == pytest.approx(16 + 12 + 30)


def test_what_was_not_told_stays_unknown():
    spent = curve({1: Spending(tokens=10.0), 2: Spending(tokens=20.0, device_hours=0.5)})
    assert spent.at(3) == Spending(tokens=30.0, device_hours=0.75, money=None)
    assert spent.at(None) is None
    assert SpendingCurve().at(3) is None
    assert curve({1: Spending()}).at(1) is None
