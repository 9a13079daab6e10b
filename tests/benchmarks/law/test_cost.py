"""The cost of a step is measured on runs of the length that is said."""

from __future__ import annotations

from benchmarks.law.cost import cost_ms


def test_a_long_run_costs_what_a_short_one_does():
    found = cost_ms((50, 2_000))
    assert set(found) == {"50", "2000"}
    for figures in found.values():
        assert 0 < figures["median"] <= figures["worst"]
    assert found["2000"]["median"] < 5 * found["50"]["median"] + 5
