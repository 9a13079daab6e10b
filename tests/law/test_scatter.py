"""The noise that is found against the one that was put in."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grpo_fast.law.scatter import BETWEEN, WITHIN, Scatter


def followed(rewards: np.ndarray, *, unit: float = 1.0, counts: list[tuple[int, int]] | None = None) -> tuple[Scatter, float]:
    """A scatter that has seen the rewards, and the variance expected of the last."""
    scatter, expected = Scatter(), 0.0
    for index, reward in enumerate(rewards.tolist()):
        prompts, generations = (16, 8) if counts is None else counts[index]
        expected = scatter.expected(reward, unit=unit, num_prompts=prompts, num_generations=generations, spread=None)
    return scatter, expected


@pytest.mark.parametrize("noise", [0.01, 0.04, 0.2])
@pytest.mark.parametrize("slope", [0.0, 5.0])
def test_the_noise_is_found_through_a_trend(noise, slope):
    found = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        rewards = slope * np.linspace(0, 1, 300) + noise * rng.standard_normal(300)
        scatter, expected = followed(rewards)
        found.append(scatter.ratio * expected / noise**2)
    assert np.mean(found) == pytest.approx(1.0, abs=0.08)
    assert 0.5 < min(found) <= max(found) < 1.7


def test_it_starts_from_the_counts_and_forgets_them():
    scatter, rng = Scatter(), np.random.default_rng(0)
    ratios = []
    for _ in range(40):
        theory = scatter.expected(0.5 + 0.001 * rng.standard_normal(), unit=1.0, num_prompts=16, num_generations=8, spread=None)
        ratios.append(scatter.ratio)
    assert ratios[:2] == [1.0, 1.0], "two rewards have no second difference"
    # The third: 3 * 0.85^3 pseudo-counts of 1 and one of next to nothing.
    pseudo = 3 * 0.85**3
    assert ratios[2] == pytest.approx(pseudo / (pseudo + 1), rel=0.01)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] * theory == pytest.approx(0.003**2), "the floor"


def test_it_forgets_a_noisy_start():
    rng = np.random.default_rng(1)
    rewards = np.concatenate([0.2 * rng.standard_normal(300), 0.02 * rng.standard_normal(900)])
    noisy, expected = followed(rewards[:300])
    assert math.sqrt(noisy.ratio * expected) == pytest.approx(0.2, rel=0.3)
    calm, expected = followed(rewards)
    assert math.sqrt(calm.ratio * expected) == pytest.approx(0.02, rel=0.3)


def test_what_is_expected_follows_the_counts_by_hand():
    scatter = Scatter()
    unknown = scatter.expected(0.0, unit=1.0, num_prompts=16, num_generations=8, spread=None)
    assert unknown == pytest.approx((BETWEEN + WITHIN / 8) / 16)
    assert scatter.expected(0.0, unit=1.0, num_prompts=32, num_generations=8, spread=None) == pytest.approx(unknown / 2)
    known = scatter.expected(0.0, unit=1.0, num_prompts=16, num_generations=8, spread=0.5)
    assert known == pytest.approx((BETWEEN + 0.25 / 8) / 16)
    assert scatter.expected(0.0, unit=1.0, num_prompts=4, num_generations=1, spread=0.0) == pytest.approx(BETWEEN / 4)
    assert scatter.expected(0.0, unit=100.0, num_prompts=16, num_generations=8, spread=None) == pytest.approx(unknown)


def test_steps_of_unequal_size_are_put_right_by_their_counts():
    """Batches of 4 and 64 prompts in turn, the noise as the counts have it: nothing is left to correct, neither way round."""
    counts = [(4, 8) if step % 3 else (64, 8) for step in range(900)]
    theory = np.array([(BETWEEN + WITHIN / generations) / prompts for prompts, generations in counts])
    ratios = []
    for seed in range(80):
        noise = np.sqrt(theory) * np.random.default_rng(seed).standard_normal(theory.size)
        ratios.append(followed(0.5 + noise, counts=counts)[0].ratio)
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("unit", [1.0, 100.0])
def test_noise_never_falls_below_the_floor(unit):
    scatter, expected = followed(np.full(500, 0.5 * unit), unit=unit)
    assert math.sqrt(scatter.ratio * expected) == pytest.approx(0.003 * unit)


def test_the_ratio_carries_the_scale_of_the_rewards_and_no_shift():
    rewards = np.cumsum(np.random.default_rng(2).standard_normal(60)) / 20
    plain, _ = followed(rewards)
    moved, _ = followed(8.0 * rewards + 3.0, unit=8.0)
    assert moved.ratio == pytest.approx(64.0 * plain.ratio, rel=1e-9)
