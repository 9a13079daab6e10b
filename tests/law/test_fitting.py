"""Priors from finished runs: mass goes to what the runs were, and new runs of the kind are foreseen better."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.special import expit

from grpo_fast.law import OnlinePredictor, Prior, RewardCurve, RunFacts, fit_prior
from grpo_fast.law.fitting import MAX_POINTS, fit_witnesses, witness
from grpo_fast.law.posterior import GRID, quantiles
from grpo_fast.law.prior import FEATURES, PARTS, SHARES, RunScale
from grpo_fast.law.shapes import CLASSES

UNIT = (0.0, 1.0)
SIZE = 100
X = np.arange(1, SIZE + 1) / SIZE
NOISE = 0.03
NOTHING = Prior(np.zeros((len(PARTS), len(FEATURES))), np.zeros((len(CLASSES), len(FEATURES))))


def curve(mean: np.ndarray, seed: int, **options: object) -> RewardCurve:
    noise = NOISE * np.random.default_rng(seed).standard_normal(mean.size)
    place = np.arange(1, mean.size + 1) / mean.size
    values = {"horizon": mean.size, "source": str(seed), "reward_range": UNIT, "num_prompts": 32, "num_generations": 8}
    return RewardCurve(np.clip(mean + noise, 0, 1), place, **{**values, **options})


def flat(seed: int, **options: object) -> RewardCurve:
    return curve(np.full(SIZE, 0.2 + 0.6 * (seed % 7) / 7), seed, **options)


def late(seed: int, **options: object) -> RewardCurve:
    """Nothing for half of the budget, then 0.2 to 0.7 within a fifth of it."""
    return curve(0.2 + 0.5 * expit((X - 0.55 - 0.03 * (seed % 7)) / 0.04), seed, **options)


def early(seed: int, **options: object) -> RewardCurve:
    return curve(0.2 + 0.5 * (1 - np.exp(-X / (0.06 + 0.005 * (seed % 7)))), seed, **options)


def said(prior: Prior, facts: RunFacts | None = None, horizon: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of parts and classes for an ordinary run."""
    believed = prior.believed(facts or RunFacts(), RunScale(1.0, *UNIT, 0.4, NOISE), horizon=horizon)
    classes = np.bincount(GRID.classes, weights=np.exp(believed.log_shapes), minlength=len(CLASSES))
    return np.exp(believed.log_parts), classes


def of(classes: np.ndarray, name: str) -> float:
    return float(classes[CLASSES.index(name)])


@pytest.fixture(scope="module")
def fitted() -> dict[str, Prior]:
    return {kind.__name__: fit_prior([kind(seed) for seed in range(20)]) for kind in (flat, late, early)}


def mean_rise(prior: Prior) -> float:
    """Of all runs, those that do not rise included."""
    parts, classes = said(prior)
    return float(parts @ [part[0] for part in PARTS]) * (1.0 - of(classes, "none"))


def test_flat_runs_make_small_rises_likely(fitted):
    parts, _ = said(fitted["flat"])
    small = parts[0] + parts[1]
    assert small > 0.55 > 1 / 3, "a third is what nothing known says"
    assert mean_rise(fitted["flat"]) < 0.5 * mean_rise(NOTHING)
    rising, _ = said(fitted["late"])
    assert rising[0] + rising[1] < 0.2


def test_late_rises_put_mass_on_late_classes(fitted):
    _, classes = said(fitted["late"])
    assert np.argmax(classes) == CLASSES.index("S-shaped, late")
    assert of(classes, "S-shaped, late") > 0.4
    assert of(classes, "exponential, early") < 1 / len(CLASSES)


def test_early_rises_put_mass_on_early_classes(fitted):
    _, classes = said(fitted["early"])
    early_mass = sum(of(classes, name) for name in CLASSES if name.endswith("early"))
    late_mass = sum(of(classes, name) for name in CLASSES if name.endswith("late"))
    assert early_mass > 0.5
    assert late_mass < 0.2
    assert of(classes, "none") < 1 / len(CLASSES)


@pytest.mark.parametrize(("kind", "seen"), [("flat", 10), ("late", 45), ("early", 10)])
def test_new_runs_of_the_kind_are_foreseen_better(fitted, kind, seen):
    errors = {name: [] for name in ("fitted", "neutral")}
    for seed in range(100, 108):
        run = {"flat": flat, "late": late, "early": early}[kind](seed)
        end = float(run.rewards[-20:].mean())
        for name, prior in (("fitted", fitted[kind]), ("neutral", NOTHING)):
            predictor = OnlinePredictor(SIZE, reward_range=UNIT, prior=prior)
            for step in range(1, seen + 1):
                predictor.absorb(step, step / SIZE, float(run.rewards[step - 1]), num_prompts=32, num_generations=8)
            values, weight = predictor.levels(np.linspace(0.8, 1.0, 5))
            level = values.mean(axis=1)
            crps = weight @ np.abs(level - end) - 0.5 * weight @ np.abs(level[:, None] - level[None, :]) @ weight
            errors[name].append(float(crps))
    assert np.mean(errors["fitted"]) < 0.9 * np.mean(errors["neutral"]), errors


def test_a_source_counts_as_one_whatever_its_size():
    """One flat run nineteen times over, from one source, and a late rise of another: as one flat run and one late rise."""
    calm, rise = witness(flat(0, source="big")), witness(late(1, source="small"))
    many, one = fit_witnesses([*[calm] * 19, rise]), fit_witnesses([calm, rise])
    np.testing.assert_allclose(many.part_logits, one.part_logits, atol=2e-3)
    np.testing.assert_allclose(many.class_logits, one.class_logits, atol=2e-3)
    own = [dataclasses.replace(calm, source=f"own {index}") for index in range(19)]
    apart = fit_witnesses([*own, rise])
    assert said(many)[0][:2].sum() < said(apart)[0][:2].sum() - 0.1, "nineteen sources outvote the one"


def test_facts_are_learnt_from():
    """Adapters stay flat, full training rises: the table tells them apart."""
    runs = [flat(seed, facts=RunFacts(lora=True)) for seed in range(15)] + [late(seed) for seed in range(15, 30)]
    prior = fit_prior(runs)
    adapters, full = (said(prior, RunFacts(lora=lora))[0] for lora in (True, False))
    assert adapters[0] + adapters[1] > full[0] + full[1] + 0.2


def test_few_curves_are_held_to_the_base(fitted):
    base = fitted["late"]
    one, many = fit_prior([flat(0)], base=base), fit_prior([flat(seed) for seed in range(20)], base=base)
    moved = [float(np.abs(prior.part_logits - base.part_logits).max()) for prior in (one, many)]
    assert 0.0 < moved[0] < 0.5 < moved[1]
    neutral = fit_prior([flat(0)])
    assert said(one)[0][:2].sum() < said(neutral)[0][:2].sum()
    assert (one.drift_none, one.drift_median) == (base.drift_none, base.drift_median)


def test_the_spread_needs_ten_sources(fitted):
    base = dataclasses.replace(NOTHING, spread=(1.5, 1.4, 1.3, 1.2))
    assert fit_prior([flat(seed, source=str(seed % 9)) for seed in range(12)], base=base).spread == base.spread
    ten = fit_prior([flat(seed) for seed in range(10)], base=base).spread
    assert len(ten) == len(SHARES)
    assert all(0 < value < 3 for value in ten)
    assert ten != base.spread


@pytest.mark.parametrize("place", [0, 1, 3])
def test_the_spread_makes_intervals_hold_nine_in_ten_ends(mixed, place):
    """On the runs that it was fitted on: flat ones and late rises, which look alike at first."""
    runs, prior = mixed
    seen, held = round(SHARES[place] * SIZE), []
    for run in runs:
        predictor = OnlinePredictor(SIZE, reward_range=UNIT, prior=prior)
        for step in range(1, seen + 1):
            predictor.absorb(step, step / SIZE, float(run.rewards[step - 1]), num_prompts=32, num_generations=8)
        values, weight = predictor.levels(X[-20:])
        noise = NOISE / np.sqrt(20) * np.random.default_rng(0).standard_normal(weight.size)
        low, high = quantiles((values.mean(axis=1) + noise)[:, None], weight, np.array([0.05, 0.95]))
        held.append(low[0] <= run.rewards[-20:].mean() <= high[0])
    assert 0.8 <= np.mean(held) <= 0.97


@pytest.fixture(scope="module")
def mixed() -> tuple[list[RewardCurve], Prior]:
    runs = [flat(seed) for seed in range(18)] + [late(seed) for seed in range(18, 30)]
    return runs, fit_prior(runs)


def test_long_curves_are_thinned_to_means_of_neighbours():
    size = 5 * MAX_POINTS
    rewards, place = np.random.default_rng(0).uniform(0, 1, size), np.arange(1, size + 1) / size
    long = RewardCurve(rewards, place, size, num_prompts=8)
    few = long.thinned()
    assert few.rewards.size == few.progress.size == MAX_POINTS
    np.testing.assert_allclose(few.rewards, rewards.reshape(MAX_POINTS, 5).mean(axis=1))
    np.testing.assert_array_equal(few.progress, place[4::5])
    assert (few.num_prompts, few.horizon) == (40, size)
    some = 5 * MAX_POINTS // 3
    odd = RewardCurve(rewards[:some], place[:some] / place[some - 1], some).thinned()
    assert odd.rewards.size == MAX_POINTS
    assert odd.progress[-1] == 1.0
    sizes = np.diff(np.concatenate([[0.0], odd.progress])) * some
    assert odd.rewards @ sizes == pytest.approx(rewards[:some].sum())
    short = RewardCurve(rewards[:MAX_POINTS], place[:MAX_POINTS], size)
    assert short.thinned() is short


def test_thinning_changes_little_of_what_a_curve_says():
    place = np.arange(1, 20001) / 20000
    mean = 0.2 + 0.5 * (1 - np.exp(-place / 0.3))
    noise = 0.05 * np.random.default_rng(3).standard_normal(20000)
    rewards = np.clip(mean + noise, 0, 1)
    long = RewardCurve(rewards, place, 20000, reward_range=UNIT, num_prompts=8, num_generations=8)
    said_of = witness(long)
    assert said_of.horizon == 20000
    assert said_of.level == pytest.approx(rewards[-4000:].mean(), abs=1e-3)
    best = np.unravel_index(np.argmax(said_of.evidence), said_of.evidence.shape)
    assert PARTS[best[0]][0] > 0.1
    assert CLASSES[best[1]].startswith(("exponential", "stretched"))


def test_what_a_witness_saw_on_the_way():
    one = witness(late(0))
    assert one.evidence.shape == (len(PARTS), len(CLASSES))
    assert np.all(np.isfinite(one.evidence))
    assert [posterior.num_observations for posterior, _, _ in one.seen] == [20, 40, 60, 80]
    assert one.tail.tolist() == X[-20:].tolist()
    ends = witness(RewardCurve(np.array([0.1, 0.2]), np.array([0.5, 1.0]), 2))
    assert [posterior.num_observations for posterior, _, _ in ends.seen] == [2, 2, 2, 2]


def test_equal_curves_give_equal_bits():
    one, other = (fit_prior([late(seed) for seed in range(3)]) for _ in range(2))
    np.testing.assert_array_equal(one.part_logits, other.part_logits)
    np.testing.assert_array_equal(one.class_logits, other.class_logits)


def test_a_fitted_prior_survives_its_file(fitted, tmp_path):
    fitted["late"].save(tmp_path / "mine.json")
    np.testing.assert_allclose(Prior.load(tmp_path / "mine.json").class_logits, fitted["late"].class_logits, atol=5e-5)


def test_what_is_no_curve_is_refused():
    place = np.array([0.5, 1.0])
    with pytest.raises(ValueError, match="1 rewards with 1 values of progress"):
        RewardCurve(place[:1], place[:1], 10)
    with pytest.raises(ValueError, match="2 rewards with 1 values of progress"):
        RewardCurve(place, place[:1], 10)
    with pytest.raises(ValueError, match="finite"):
        RewardCurve(np.array([0.5, np.nan]), place, 10)
    with pytest.raises(ValueError, match="at least one finished run"):
        fit_prior([])
    with pytest.raises(ValueError, match="outside reward_range"):
        witness(RewardCurve(np.array([0.5, 7.0]), place, 10, reward_range=UNIT))
