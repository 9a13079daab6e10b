from __future__ import annotations

import math

import pytest

from grpo_fast.sinks.quantities import duration, percent, si, significant


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (3.21e12, "3.21 T"), (999_600, "1 M"), (-2500, "-2.50 k"), (5e27, "5,000 Y"), (math.nan, "-")],
)
def test_si(value: float, text: str) -> None:
    assert si(value) == text


def test_si_with_a_unit() -> None:
    assert si(1.08e12, "FLOP") == "1.08 TFLOP"
    assert si(12, "FLOP") == "12 FLOP"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234.5, "1,234"), (0.04567, "0.0457"), (2.0, "2"), (1e-7, "1.00e-07"), (math.inf, "-"), (3e9, "3.00e+09")],
)
def test_significant(value: float, text: str) -> None:
    assert significant(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.84 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (365, "6 min 05 s"),
        (12_000, "3 h 20 min"),
        (187_200, "2 d 4 h"),
        (math.nan, "-"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (1, "100 %"),
        (0.5, "50 %"),
        (0.062, "6.2 %"),
        (0.996, "99.6 %"),
        (0.99999, "100 %"),
        (1e-5, "0 %"),
        (math.nan, "-"),
    ],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text
