"""Pictures are drawn from tables and runs, and hold what they should."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from benchmarks.law import pictures, results
from benchmarks.law.baselines import BASELINES
from benchmarks.law.evaluate import evaluate
from benchmarks.law.models import Law
from benchmarks.law.residuals import Residual
from benchmarks.law.simulator import simulate
from benchmarks.law.stopping import Fixed, LawStop, Oracle, replay

SHARES = (0.2, 0.6)


@pytest.fixture(scope="module")
def judged():
    runs, law = [simulate(seed) for seed in range(6)], Law()
    records = evaluate([Residual(BASELINES[2]), law], runs, shares=SHARES)
    short = [run for run in runs if run.rewards.size <= 250][:2]
    return (
        runs,
        law,
        results.forecast_tables(records),
        replay([Oracle(), Fixed(0.4), LawStop(law, 0.8), LawStop(law, 0.9)], short),
    )


def inked(path) -> float:
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.shape[0] > 300
    return float((pixels < 250).mean())


def test_tables_become_pictures(judged, tmp_path):
    _, law, tables, stops = judged
    pictures.errors(tables, SHARES, law.name, tmp_path / "error.png")
    pictures.coverage(tables, SHARES, law.name, tmp_path / "coverage.png")
    pictures.stops(results.stopping_tables(stops), law.name, tmp_path / "stops.png")
    for name in ("error", "coverage", "stops"):
        assert 0.005 < inked(tmp_path / f"{name}.png") < 0.5


def test_no_two_rivals_share_a_colour(judged, tmp_path, monkeypatch):
    _, law, tables, _ = judged
    errors = tables["all"]["level"]["error"]
    crowd = {f"rival {index}": next(iter(errors.values())) for index in range(12)} | {law.name: errors[law.name]}
    drawn = []
    monkeypatch.setattr(pictures, "_saved", lambda figure, path: drawn.append(figure))
    pictures.errors({"all": {"curves": 6, "level": {"error": crowd}}}, SHARES, law.name, tmp_path / "error.png")
    colours = [line.get_color() for line in drawn[0].axes[0].get_lines()]
    assert len(set(colours)) == len(colours) == 13
    plt.close(drawn[0])


def test_examples_need_samples(judged, tmp_path):
    runs, law, _, _ = judged
    pictures.examples(runs[:2], law, tmp_path / "examples.png")
    assert 0.01 < inked(tmp_path / "examples.png") < 0.5
    with pytest.raises(ValueError, match="bare guess"):
        pictures.examples(runs[:1], BASELINES[0], tmp_path / "no.png")
