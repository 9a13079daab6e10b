"""What is published: intervals by resampling repositories, paired ratios, and no NaN in JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.law import results
from benchmarks.law.__main__ import SHARED, judged, printed
from benchmarks.law.baselines import BASELINES
from benchmarks.law.curves import Curve, load_curves, repositories
from benchmarks.law.evaluate import LEVEL, Prediction, Record, evaluate, pooled
from benchmarks.law.models import Law
from benchmarks.law.simulator import simulate
from benchmarks.law.stopping import Fixed, Oracle, replay

SIMPLE = [baseline for baseline in BASELINES if baseline.name in {"last value", "mean of last 20 % seen", "exponential + R0"}]


@pytest.fixture(scope="module")
def runs():
    return [simulate(seed) for seed in range(20)]


def test_bootstrap_agrees_with_the_standard_error_of_a_mean(runs):
    rng = np.random.default_rng(0)
    records = [Record("x", run, 0.2, LEVEL, float(value), 0.0) for run, value in zip(runs, rng.random(20), strict=True)]
    resamples = results.Bootstrap(repositories(runs)).resampled(records, "error")
    values = np.array([record.error for record in records])
    assert resamples.mean() == pytest.approx(values.mean(), abs=0.01)
    assert resamples.std() == pytest.approx(values.std() / math.sqrt(20), rel=0.1)
    value, low, high = results.Bootstrap(repositories(runs)).figure(records, "error")
    assert low < value < high


def test_a_bare_guess_has_no_spread_figures(runs):
    tables = results.forecast_tables(evaluate(SIMPLE, runs, shares=(0.2, 0.4)))
    text = json.dumps(tables, allow_nan=False)
    assert json.loads(text)["all"][LEVEL]["crps"]["last value"] == [[None, None, None]] * 2
    assert tables["all"]["curves"] == 20
    classes = {name for name in tables if name.startswith("class")}
    assert sum(tables[name]["curves"] for name in classes) == 20


def test_a_rival_is_also_chosen_without_the_repository_it_is_judged_on(runs):
    records = evaluate(SIMPLE, runs, shares=(0.2,))
    row = results.against_best(records, "last value")["all"][0]
    level = [record for record in records if record.target == LEVEL]
    error = {(one.forecaster, one.curve.repository): one.error for one in level}
    rivals = {one.forecaster for one in level} - {"last value"}
    sources = repositories(runs)
    chosen = [
        error[min(rivals, key=lambda name: sum(error[name, other] for other in sources if other != source)), source]
        for source in sources
    ]
    ours = [error["last value", source] for source in sources]
    assert row["chosen"][0] == pytest.approx(np.mean(ours) / np.mean(chosen), abs=1e-4)
    assert row["chosen"][0] <= row["ratio"][0], "hindsight chooses no worse"


def test_the_bar_is_the_best_other_one_at_each_share(runs):
    records = evaluate(SIMPLE, runs, shares=(0.2, 0.6))
    rows = results.against_best(records, "last value")["all"]
    for row in rows:
        at = [record for record in records if record.share == row["seen"] and record.target == LEVEL]
        scores = {name: pooled([r for r in at if r.forecaster == name]) for name in {r.forecaster for r in at}}
        others = {name: value for name, value in scores.items() if name != "last value"}
        assert row["best"] == min(others, key=others.get)
        assert row["ratio"][0] == pytest.approx(scores["last value"] / min(others.values()), abs=1e-4)
        assert row["ratio"][1] < row["ratio"][0] < row["ratio"][2]


def test_stopping_tables_by_hand(runs):
    stops = replay([Oracle(), Fixed(0.4)], runs)
    table = results.stopping_tables(stops)["all"]
    assert table["fixed 40%"]["saved"][0] == pytest.approx(0.6, abs=0.01)
    assert table["hindsight oracle"]["share_of_oracle"][0] == 1.0
    assert table["fixed 40%"]["per_run"]["saved"] == pytest.approx(0.6, abs=0.01)
    false = np.mean([run.hindsight.lost(round(0.4 * len(run.hindsight.level)))[0] > 0.02 for run in runs])
    assert table["fixed 40%"]["false"][0] == pytest.approx(false, abs=1e-4)


def test_the_floor_is_the_error_of_knowing_the_mean(runs):
    class Knowing:
        name = "knowing"

        def forecast(self, seen, targets):
            run = next(run for run in runs if np.array_equal(run.rewards[: seen.rewards.size], seen.rewards))
            return [Prediction(float(run.mean[-steps.size :].mean())) for steps in targets]

    records = evaluate([Knowing()], runs, shares=(0.2,))
    known = results.floor(runs)
    assert known["all"] == pytest.approx(pooled([r for r in records if r.target == LEVEL]), abs=1e-4)
    # Told nothing of the mean, the scatter of the rewards says somewhat more: prompts come without replacement.
    blind = results.floor([replace(run, mean=None, label="rise to plateau") for run in runs])
    assert known["all"] < blind["all"] < 2 * known["all"]


def test_forecasts_are_filed_by_the_rise_behind_them(runs):
    steps = np.arange(1.0, 201.0)
    curve = Curve("c", "c", steps, np.clip(steps / 100, 0, 1), mean=np.clip(steps / 100, 0, 1), label="rise to plateau")
    assert results.rise_seen(curve, 0.2) == pytest.approx(0.4, abs=0.01)
    assert results.rise_seen(curve, 0.6) == pytest.approx(1.0)
    rows = results.by_rise_seen(evaluate(SIMPLE, [curve, *runs]))["rows"]
    assert sum(row["forecasts"] for row in rows) == 4 * sum(run.learning for run in [curve, *runs])


@pytest.mark.slow
def test_everything_on_simulated_runs_is_json(runs):
    found = judged(runs[:4], Law(), only="law")
    text = json.dumps(found, allow_nan=False)
    assert set(json.loads(text)) == {"about", "shares", "forecasts", "stopping", "seconds"}
    assert "rewards" not in text


def test_one_repository_of_flat_runs_is_enough(capsys):
    steps = np.arange(1.0, 41.0)
    noisy = [0.5 + 0.01 * np.random.default_rng(seed).standard_normal(40) for seed in range(2)]
    curves = [Curve(f"c{seed}", "only", steps, rewards, label="flat") for seed, rewards in enumerate(noisy)]
    found = judged(curves, Law())
    printed(found)
    assert "learning" not in found["against_best"]
    assert found["about"]["classes"] == {"flat": 2}
    assert found["forecasts"]["all"][LEVEL]["crps"]["last value"][0] == [None, None, None]
    assert "stops, all (2 curves)" in capsys.readouterr().out


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published reward curves are not beside this checkout")
def test_the_published_figures_of_simple_forecasters_come_out_again():
    curves = load_curves(SHARED, distinct=False)
    assert (len(curves), len(repositories(curves))) == (229, 27)
    records = [record for record in evaluate(SIMPLE, curves, shares=(0.2, 0.4, 0.6)) if record.target == LEVEL]
    published = {"mean of last 20 % seen": (0.385, 0.250, 0.173), "exponential + R0": (0.487, 0.261, 0.171)}
    for name, values in published.items():
        for share, value in zip((0.2, 0.4, 0.6), values, strict=True):
            found = pooled([record for record in records if record.forecaster == name and record.share == share])
            assert found == pytest.approx(value, abs=0.045), (name, share)
