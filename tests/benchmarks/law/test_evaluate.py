"""The measure itself, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.law.curves import Curve
from benchmarks.law.evaluate import LEVEL, Prediction, Record, evaluate, pooled, samples_from_quantiles, score


def straight(repository: str = "a", size: int = 100) -> Curve:
    steps = np.arange(1.0, size + 1)
    return Curve(name=f"{repository} {size}", repository=repository, steps=steps, rewards=steps / size, label="rise to plateau")


def judged(prediction: Prediction, truth: float, curve: Curve, tail: int = 1) -> Record:
    return score(prediction, truth, tail, curve=curve, share=0.2, target=LEVEL, forecaster="x")


class Oracle:
    name = "oracle"

    def forecast(self, seen, targets):
        return [Prediction(float(steps.mean()) / seen.horizon) for steps in targets]


class Still:
    name = "still"

    def forecast(self, seen, targets):
        return [Prediction(float(seen.rewards[-1])) for _ in targets]


def test_level_error_is_taken_over_the_last_fifth_in_smoothed_ranges():
    curve = straight()
    right, still = (evaluate([forecaster], [curve], shares=(0.2,))[0] for forecaster in (Oracle(), Still()))
    assert right.error == pytest.approx(0.0, abs=1e-12)
    # Seen 0.20; the last fifth is 0.81 ... 1.00, mean 0.905; nine points are averaged and mirrored at both ends.
    mirrored = 0.01 * (1 + 2 * (2 + 3 + 4 + 5)) / 9
    assert curve.smoothed_range == pytest.approx(1.01 - 2 * mirrored)
    assert still.error == pytest.approx((0.905 - 0.2) / curve.smoothed_range)
    assert still.signed < 0


def test_each_repository_counts_once():
    curves = [straight("a", 50), straight("a", 60), straight("b", 70)]
    records = [judged(Prediction(value * c.smoothed_range), 0.0, c) for value, c in zip((1.0, 3.0, 4.0), curves, strict=True)]
    assert pooled(records) == pytest.approx((2.0 + 4.0) / 2)


def test_scores_of_a_normal_forecast_match_their_closed_forms():
    curve = straight()
    unit = curve.smoothed_range
    samples = unit * samples_from_quantiles((0.05, 0.5, 0.95), (-1.644854, 0.0, 1.644854), 4001)
    for z in (0.0, 1.0, 1.7):
        record = judged(Prediction(0.0, samples), z * unit, curve)
        density, below = math.exp(-z * z / 2) / math.sqrt(2 * math.pi), 0.5 * (1 + math.erf(z / math.sqrt(2)))
        assert record.crps == pytest.approx(z * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi), abs=2e-3)
        assert record.log_score == pytest.approx(math.log(density), abs=0.03)
        assert (record.inside50, record.inside90) == (float(z < 0.67), float(z < 1.64))
        assert record.width90 == pytest.approx(2 * 1.644854, abs=2e-3)


def test_the_noise_of_the_truth_widens_an_interval_and_more_points_less():
    curve = straight()
    sure = Prediction(0.0, np.zeros(999), noise_sd=0.1)
    wide, narrow = judged(sure, 0.0, curve, tail=1), judged(sure, 0.0, curve, tail=4)
    assert wide.width90 == pytest.approx(2 * narrow.width90)
    assert wide.width90 * curve.smoothed_range == pytest.approx(2 * 1.645 * 0.1, rel=0.02)


def test_a_learner_never_sees_the_repository_it_is_judged_on():
    fitted_on = []

    class Learner(Still):
        def fit(self, curves):
            fitted_on.append({curve.repository for curve in curves})
            return Still()

    evaluate([Learner()], [straight("a"), straight("b"), straight("c"), straight("a", 40)], shares=(0.5,))
    assert fitted_on == [{"b", "c"}, {"a", "c"}, {"a", "b"}]


def test_a_forecast_that_is_no_number_is_an_error_not_a_gap():
    with pytest.raises(ValueError, match="forecast nan for a 100"):
        judged(Prediction(math.nan), 0.0, straight())
