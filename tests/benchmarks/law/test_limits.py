"""What bounds a forecaster on runs that rise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.law.baselines import BASELINES
from benchmarks.law.evaluate import LEVEL, Record, evaluate, pooled, table
from benchmarks.law.limits import best_mixture, limits
from benchmarks.law.models import Law
from benchmarks.law.simulator import simulate


def records_of(signed: dict[str, list[float]], repositories: list[str]) -> list[Record]:
    runs = [replace(simulate(seed), name=str(seed), repository=name) for seed, name in enumerate(repositories)]
    return [
        Record(name, run, 0.4, LEVEL, abs(value), value)
        for name, values in signed.items()
        for run, value in zip(runs, values, strict=True)
    ]


def test_errors_that_cancel_are_mixed_until_they_do():
    found = best_mixture(records_of({"low": [-0.3, -0.6], "high": [0.1, 0.2], "far": [2.0, 2.0]}, ["a", "b"]))
    assert found["error"] == pytest.approx(0.0, abs=1e-9)
    assert found["weights"] == {"low": 0.25, "high": 0.75}


def test_every_repository_counts_once():
    signed = {"one": [0.0, 0.0, 0.0, 1.0], "other": [0.5, 0.5, 0.5, 0.0]}
    found = best_mixture(records_of(signed, ["a", "a", "a", "b"]))
    assert found["weights"] == {"other": 1.0}
    assert found["error"] == pytest.approx(0.25)


def test_a_mixture_that_was_chosen_elsewhere_is_judged_where_it_was_not():
    found = best_mixture(records_of({"one": [0.0, 0.0, 0.0, 1.0], "other": [1.0, 1.0, 1.0, 0.0]}, list("abcd")))
    assert (found["error"], found["elsewhere"]) == pytest.approx((0.25, 0.25))
    found = best_mixture(records_of({"one": [0.0, 1.0], "other": [1.0, 0.0]}, ["a", "b"]))
    assert (found["error"], found["elsewhere"]) == pytest.approx((0.5, 1.0))
    assert best_mixture(records_of({"one": [0.0, 1.0]}, ["a", "a"]))["elsewhere"] is None


def test_no_mixture_of_a_grid_is_better():
    signed = np.random.default_rng(0).normal(size=(3, 9))
    records = records_of(dict(zip("xyz", signed.tolist(), strict=True)), [str(run // 2) for run in range(9)])
    weight = np.array([0.5] * 8 + [1.0]) / 5
    grid = [(a, b, 1 - a - b) for a in np.linspace(0, 1, 41) for b in np.linspace(0, 1 - a, 41)]
    best = min(float(weight @ np.abs(np.array(mix) @ signed)) for mix in grid)
    assert best - 0.02 <= best_mixture(records)["error"] <= best + 1e-4


def test_it_is_told_of_runs_that_rise_alone():
    runs = [simulate(seed) for seed in range(8)]
    rising = [run for run in runs if run.learning]
    assert 0 < len(rising) < len(runs)
    law = Law()
    records = evaluate([*BASELINES[:2], law], runs, shares=(0.4,))
    found = limits(records, runs, law)
    assert found["told"] == pytest.approx(table(evaluate([Law()], rising, shares=(0.4,)))[law.name], abs=1e-4)
    single = [
        pooled([one for one in records if one.forecaster == name and one.target == LEVEL and one.curve.learning])
        for name in ("last value", law.name)
    ]
    assert found["mixture"][0]["error"] <= min(single)
    assert limits([], [run for run in runs if not run.learning], law) == {}
