"""What is believed beforehand: by hand, through JSON, and refused where it makes no sense."""

from __future__ import annotations

import csv
import dataclasses
import json
import math

import numpy as np
import pytest

from grpo_fast.law import OnlinePredictor, Prior, RunFacts
from grpo_fast.law.posterior import DRIFTS, GRID
from grpo_fast.law.prior import FEATURES, PARTS, SHARES, RunScale, features
from grpo_fast.law.shapes import CLASSES

BOUNDED = RunScale(unit=1.0, low=0.0, high=1.0, start=0.4, noise_sd=0.05)
NOTHING = Prior(np.zeros((len(PARTS), len(FEATURES))), np.zeros((len(CLASSES), len(FEATURES))))


def with_logit(table: str, row: int, feature: str, value: float) -> Prior:
    changed = getattr(NOTHING, table).copy()
    changed[row, FEATURES.index(feature)] = value
    return dataclasses.replace(NOTHING, **{table: changed})


def of_classes(log_shapes: np.ndarray) -> np.ndarray:
    return np.bincount(GRID.classes, weights=np.exp(log_shapes), minlength=len(CLASSES))


def test_features_by_hand():
    known = features(RunFacts(size_b=30.0, lora=True), dataclasses.replace(BOUNDED, start=0.5), horizon=1000)
    np.testing.assert_allclose(known, [1, 1, 1, 0.1, 0, 1, 0])
    known = features(RunFacts(size_b=0.3, validation=True), RunScale(unit=7.0), horizon=10)
    np.testing.assert_allclose(known, [1, -1, -1, 0, 1, 0, 1])
    known = features(RunFacts(), BOUNDED, horizon=100)
    np.testing.assert_allclose(known, [1, 0, 0, 0, 0, 0, 0], atol=1e-12)
    assert known.shape == (len(FEATURES),)


def test_features_of_the_unheard_of_are_cut_off():
    many, few = (features(RunFacts(size_b=size), BOUNDED, horizon=steps) for size, steps in ((1e4, 10**7), (1e-3, 1)))
    assert many[1:3].tolist() == [1.5, 1.5]
    assert few[1:3].tolist() == [-1.5, -1.0]


def test_one_end_alone_is_no_range():
    assert BOUNDED.bounded
    assert not RunScale(unit=1.0, low=0.0).bounded
    assert features(RunFacts(), RunScale(unit=1.0, low=0.0), horizon=100)[FEATURES.index("unknown_range")] == 1.0


@pytest.mark.parametrize("prior", [NOTHING, Prior.default()], ids=["nothing", "shipped"])
@pytest.mark.parametrize("scale", [BOUNDED, RunScale(unit=250.0, start=0.2, noise_sd=20.0)])
def test_probabilities_sum_to_one_and_units_scale(prior, scale):
    said = prior.believed(RunFacts(size_b=7.0), scale, horizon=400)
    for name in ("log_parts", "log_shapes", "log_drifts"):
        assert np.exp(getattr(said, name)).sum() == pytest.approx(1.0)
    assert (said.log_parts.shape, said.log_shapes.shape, said.log_drifts.shape) == (
        (len(PARTS),),
        (GRID.num_shapes,),
        (DRIFTS.size,),
    )
    np.testing.assert_allclose(said.rise / scale.unit, [part[0] for part in PARTS])
    np.testing.assert_allclose(said.rise_sd / scale.unit, [part[1] for part in PARTS])
    assert said.start_sd / scale.unit == pytest.approx(0.3)
    assert (said.low, said.high) == (scale.low, scale.high)
    twice = dataclasses.replace(scale, unit=2 * scale.unit, noise_sd=2 * scale.noise_sd)
    for name in ("log_parts", "log_shapes", "log_drifts"):
        again = getattr(prior.believed(RunFacts(size_b=7.0), twice, horizon=400), name)
        np.testing.assert_allclose(again, getattr(said, name), rtol=1e-12)


def test_nothing_known_is_even_over_parts_and_classes():
    said = NOTHING.believed(RunFacts(), BOUNDED, horizon=100)
    np.testing.assert_allclose(np.exp(said.log_parts), 1 / len(PARTS))
    np.testing.assert_allclose(of_classes(said.log_shapes), 1 / len(CLASSES))
    first = GRID.classes == CLASSES.index("S-shaped, late")
    np.testing.assert_allclose(said.log_shapes[first], said.log_shapes[first][0])


def test_logits_are_linear_in_the_features():
    prior = with_logit("part_logits", 4, "size", math.log(5.0))
    odds = [np.exp(prior.believed(RunFacts(size_b=size), BOUNDED, horizon=100).log_parts) for size in (None, 3.0, 30.0, 0.3)]
    assert [each[4] / each[0] for each in odds] == pytest.approx([1.0, 1.0, 5.0, 0.2])
    late = CLASSES.index("S-shaped, late")
    prior = with_logit("class_logits", late, "lora", math.log(4.0))
    plain, lora = (of_classes(prior.believed(RunFacts(lora=known), BOUNDED, horizon=100).log_shapes) for known in (False, True))
    assert plain[late] / plain[0] == pytest.approx(1.0)
    assert lora[late] / lora[0] == pytest.approx(4.0)


def test_drifts_lie_around_their_median_in_units_of_the_noise():
    """Noise of 0.05 and a median of 0.06 of the range: kappa of 1.2, and 1 (by a log of 0.18) is nearer than 2.5 (0.73)."""
    prior = dataclasses.replace(NOTHING, drift_none=0.3, drift_median=0.06)
    said = np.exp(prior.believed(RunFacts(), BOUNDED, horizon=100).log_drifts)
    assert said[0] == pytest.approx(0.3)
    away = np.log(DRIFTS[1:] * 0.05 / 0.06)
    np.testing.assert_allclose(said[1:], 0.7 * np.exp(-0.5 * away**2) / np.exp(-0.5 * away**2).sum())
    assert DRIFTS[np.argmax(said[1:]) + 1] == 1.0
    silent = prior.believed(RunFacts(), dataclasses.replace(BOUNDED, noise_sd=0.0), horizon=100)
    assert np.all(np.isfinite(silent.log_drifts))


def test_the_spread_is_interpolated_between_the_shares():
    assert SHARES == (0.2, 0.4, 0.6, 0.8)
    prior = dataclasses.replace(NOTHING, spread=(2.0, 1.0, 1.5, 0.5))
    got = [prior.spread_at(share, 1.0) for share in (0.0, 0.2, 0.3, 0.4, 0.5, 0.75, 0.8, 1.0)]
    assert got == pytest.approx([2.0, 2.0, 1.5, 1.0, 1.25, 0.75, 0.5, 0.5])
    followed = [prior.spread_at(share, 0.1) for share in (0.2, 0.4, 0.8)]
    assert followed == pytest.approx([1.1, 1.0, 0.95]), "drift is believed as it is"


def some() -> Prior:
    rng = np.random.default_rng(0)
    parts, classes = (rng.standard_normal((rows, len(FEATURES))) for rows in (len(PARTS), len(CLASSES)))
    return Prior(parts.round(4), classes.round(4), 0.25, 0.1, (1.5, 1.25, 1.0, 0.75), {"curves": 3, "of": ["a", "b"]})


def assert_equal(one: Prior, other: Prior) -> None:
    for field in dataclasses.fields(Prior):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_a_prior_goes_through_json_and_a_file(tmp_path):
    prior = some()
    assert_equal(Prior.from_dict(json.loads(json.dumps(prior.to_dict(), allow_nan=False))), prior)
    prior.save(tmp_path / "prior.json")
    assert_equal(Prior.load(tmp_path / "prior.json"), prior)
    assert_equal(Prior.load(str(tmp_path / "prior.json")), prior)


def test_json_is_exact_and_a_file_holds_four_decimals(tmp_path):
    prior = with_logit("part_logits", 0, "one", 1 / 3)
    assert_equal(Prior.from_dict(json.loads(json.dumps(prior.to_dict()))), prior)
    prior.save(tmp_path / "prior.json")
    assert Prior.load(tmp_path / "prior.json").part_logits[0, 0] == 0.3333


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "{}", '{"format": 1}', '{"format": 99}', "not json", '{"format": 1, "part_logits": [[1, "x"]]}']
)
def test_a_file_without_a_prior_is_told_by_name(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json holds no prior .*law fit"):
        Prior.load(path)


def test_a_file_of_a_later_format_is_told_so(tmp_path):
    path = tmp_path / "later.json"
    path.write_text(json.dumps({**some().to_dict(), "format": 2}), encoding="utf-8")
    with pytest.raises(ValueError, match="its format is 2, but this version reads format 1"):
        Prior.load(path)
    with pytest.raises(FileNotFoundError):
        Prior.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"part_logits": np.zeros((2, 7))}, r"part_logits has shape \(2, 7\).*6 x 7"),
        ({"class_logits": np.zeros((9, 6))}, r"class_logits has shape \(9, 6\).*9 x 7"),
        ({"class_logits": np.full((9, 7), math.nan)}, "class_logits .*finite"),
        ({"drift_none": 0.0}, r"drift_none=0\.0"),
        ({"drift_none": 1.0}, r"drift_none=1\.0"),
        ({"drift_median": 0.0}, r"drift_median=0\.0"),
        ({"spread": (1.0, 1.0)}, r"spread=\(1\.0, 1\.0\) must hold 4"),
        ({"spread": (1.0, 1.0, 0.0, 1.0)}, "spread=.*positive"),
    ],
)
def test_tables_that_make_no_sense_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(NOTHING, **values)
    tables = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
    with pytest.raises(ValueError, match=words):
        Prior.from_dict({**NOTHING.to_dict(), **tables})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size_b": 0.0}, r"size_b=0\.0"),
        ({"size_b": -1.5}, r"size_b=-1\.5"),
        ({"size_b": math.inf}, "size_b=inf"),
        ({"size_b": math.nan}, "size_b=nan"),
        ({"start": math.nan}, "start=nan"),
        ({"start": math.inf}, "start=inf"),
        ({"start": 0.3, "start_error": 0.0}, r"start_error=0\.0"),
        ({"start_error": 0.1}, r"start_error=0\.1 must be positive and come with a start"),
    ],
)
def test_facts_that_make_no_sense_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        RunFacts(**values)


def test_the_shipped_prior_is_one_and_was_fitted():
    prior = Prior.default()
    assert Prior.default() is prior
    assert np.abs(prior.part_logits).max() > 0.05
    assert np.abs(prior.class_logits).max() > 0.05
    assert prior.spread != NOTHING.spread
    assert_equal(Prior.from_dict(prior.to_dict()), prior)


def test_the_shipped_prior_thinks_most_runs_move_little_and_low_starts_move_more():
    """Mean and spread of the rise, mixed over parts, from a low and a high start."""
    prior, rises = Prior.default(), []
    for start in (0.1, 0.8):
        said = prior.believed(RunFacts(), dataclasses.replace(BOUNDED, start=start), horizon=100)
        rises.append(float(np.exp(said.log_parts) @ said.rise))
    assert 0.0 < rises[1] < rises[0] < 0.8


def test_the_shipped_prior_says_where_it_comes_from():
    about = Prior.default().about
    if not about:
        pytest.skip("the shipped prior carries no account of its curves")
    assert json.loads(json.dumps(about, allow_nan=False)) == about
    assert any(isinstance(value, (int, float)) and value > 0 for value in about.values()), "figures belong to it"


def test_intervals_from_the_shipped_prior_hold_on_published_curves(shared_data):
    folder = shared_data / "reward_curves"
    if not folder.is_dir():
        pytest.skip("the published reward curves are not beside this checkout")
    with (folder / "index.csv").open() as handle:
        chosen = [row for row in csv.DictReader(handle) if row["unit_interval"] == "1" and int(row["n_points"]) >= 40][::4]
    assert len(chosen) >= 30
    hits: dict[float, list[bool]] = {0.2: [], 0.4: [], 0.6: [], 0.8: []}
    for entry in chosen:
        with (folder / entry["file"]).open() as handle:
            rewards = np.array([float(row["reward"] or "nan") for row in csv.DictReader(handle)])
        rewards = np.clip(rewards[np.isfinite(rewards)], 0, 1)
        size = -(-len(rewards) // 150)
        rewards = rewards[: len(rewards) // size * size].reshape(-1, size).mean(axis=1)
        tail = math.ceil(0.2 * len(rewards))
        end = rewards[-tail:].mean()
        for share, held in hits.items():
            predictor = OnlinePredictor(len(rewards), reward_range=(0.0, 1.0))
            for step in range(1, int(share * len(rewards)) + 1):
                predictor.absorb(step, step / len(rewards), float(rewards[step - 1]), num_generations=8)
            forecast = predictor.forecast()
            # The interval is that of the mean reward; what is measured of it carries the noise of as many rewards.
            side = forecast.high - forecast.median if end > forecast.median else forecast.median - forecast.low
            noise = 1.645 * predictor.scale.noise_sd / math.sqrt(tail)
            held.append(abs(end - forecast.median) <= math.hypot(side, noise))
    coverage = {share: float(np.mean(held)) for share, held in hits.items()}
    assert all(0.8 <= value <= 1.0 for value in coverage.values()), coverage
    assert 0.85 <= np.mean(list(coverage.values())) <= 0.98, coverage


def test_a_full_disk_is_told_with_the_file() -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        some().save("/dev/full")
