"""Curves from any folder, and the collection's own conventions."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from benchmarks.law.__main__ import SHARED
from benchmarks.law.curves import Curve, averaged, load_curves, smoothed, thinned

INDEX = [
    *("id", "file", "source_repo", "kind", "unit_interval", "shape", "params_B", "group_size", "rollouts_per_point"),
    *("near_dup_cluster", "algo", "task"),
]


def written(path, steps, rewards, header="step,reward"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + "\n" + "".join(f"{s},{r}\n" for s, r in zip(steps, rewards, strict=True)), encoding="utf-8")


def test_a_folder_of_logs_of_several_kinds(tmp_path):
    written(tmp_path / "a" / "one.csv", range(1, 31), np.linspace(0.1, 0.9, 30))
    written(tmp_path / "a" / "short.csv", range(1, 6), range(5))
    written(tmp_path / "b.csv", range(10, 210, 10), np.linspace(-3, 40, 20), header="global_step,mean_reward")
    rows = [json.dumps({"step": step, "reward": 0.5 if step % 4 else float("nan")}) for step in range(1, 41)]
    (tmp_path / "a" / "two.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "notes.txt").write_text("nothing here\n", encoding="utf-8")
    curves = {curve.name: curve for curve in load_curves(tmp_path)}
    assert set(curves) == {"a/one.csv", "a/two.jsonl", "b.csv"}
    assert curves["a/one.csv"].repository == curves["a/two.jsonl"].repository == "a"
    assert curves["a/two.jsonl"].rewards.size == 30  # NaN left out
    assert curves["b.csv"].reward_range is None
    assert curves["b.csv"].horizon == 200.0
    assert curves["a/one.csv"].shape == "still rising"


def test_a_moving_average_by_hand():
    curve = Curve("a", "b", np.arange(3.0), np.array([1.0, 0.0, 0.5]))
    # (0.5 * 1 + 0) / 1.5 and (0.25 * 1 + 0.5 * 0 + 0.5) / 1.75.
    np.testing.assert_allclose(averaged(curve, 0.5).rewards, [1.0, 1 / 3, 0.75 / 1.75])
    np.testing.assert_array_equal(averaged(curve, 0.0).rewards, curve.rewards)


def test_an_empty_or_missing_folder_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no reward curve"):
        load_curves(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_curves(tmp_path / "nowhere")


def test_an_index_says_whose_a_curve_is_and_which_are_the_same(tmp_path):
    entries = []
    for name, cluster in (("x", "1"), ("y", "1"), ("z", "2")):
        written(tmp_path / f"{name}.csv", range(20), np.linspace(0, 1, 20))
        entries.append(
            [name, f"{name}.csv", "r", "validation accuracy", "1", "flat/no gain", "1.5", "8.0", "64", cluster, "", ""]
        )
    with (tmp_path / "index.csv").open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows([INDEX, *entries])
    assert [curve.name for curve in load_curves(tmp_path)] == ["x", "z"]
    x, _, _ = load_curves(tmp_path, distinct=False)
    assert (x.validation, x.shape, x.learning, x.size_class, x.group_size, x.rollouts) == (
        True,
        "flat",
        False,
        "1B to 4B",
        8,
        64,
    )


def test_an_index_of_something_else_is_told(tmp_path):
    (tmp_path / "index.csv").write_text("id,file\n1,a.csv\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"lacks algo, group_size, .*; name it otherwise"):
        load_curves(tmp_path)


def test_smoothing_by_hand():
    # 36 points: a window of three, mirrored about the first and the last.
    rewards = np.arange(36.0) ** 2
    found = smoothed(rewards)
    assert found[0] == pytest.approx((1 + 0 + 1) / 3)
    assert found[10] == pytest.approx((81 + 100 + 121) / 3)
    assert found[-1] == pytest.approx((34**2 + 35**2 + 34**2) / 3)
    assert np.allclose(smoothed(np.arange(11.0))[1:-1], np.arange(11.0)[1:-1])


def test_thinning_keeps_means_last_steps_and_counts():
    steps = np.arange(1.0, 601.0)
    curve = Curve("c", "r", steps, steps / 600, rollouts=8, clock=steps / 600, mean=steps / 600)
    few = thinned(curve)
    assert few.rewards.size == 200
    assert (few.steps[0], few.steps[-1]) == (3.0, 600.0)
    assert few.rewards[0] == pytest.approx(2 / 600)
    assert few.clock[-1] == 1.0
    assert few.rollouts == 24
    assert thinned(few) is few


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published reward curves are not beside this checkout")
def test_the_smoothed_range_is_the_collections():
    with (SHARED / "index.csv").open(encoding="utf-8") as handle:
        entries = {entry["id"]: entry for entry in csv.DictReader(handle)}
    curves = load_curves(SHARED, distinct=False)
    assert len(curves) == len(entries)
    for curve in curves:
        entry = entries[curve.name]
        assert curve.smoothed.max() == pytest.approx(float(entry["peak_smoothed"]), abs=1e-5, rel=1e-5)
        assert curve.smoothed_range == pytest.approx(
            float(entry["range_over_noise"]) * float(entry["noise_sd"]), rel=0.01, abs=1e-4
        )
