"""Simulated runs: repeatable, unbiased about their own mean, and each story tells what it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.law.simulator import STORIES, Run, learning_rates, simulate

PLAIN = Run("plain", 200, 16, 8, "constant", 0.0, 30.0, 0.5, 0.6, 0.5, 0.0, 0.1)


def test_a_seed_is_a_run():
    one, same, other = simulate(3), simulate(3), simulate(4)
    np.testing.assert_array_equal(one.rewards, same.rewards)
    assert one.rewards.shape != other.rewards.shape or not np.array_equal(one.rewards, other.rewards)
    assert one.rollouts == one.group_size * (one.rollouts // one.group_size)


@pytest.mark.parametrize("prompts", [2, 32])
def test_rewards_scatter_about_the_mean_as_prompts_and_completions_say(prompts):
    run = replace(PLAIN, num_prompts=prompts, rate=1e-9, steps=400)
    curves = [simulate(seed, run) for seed in range(6)]
    off = np.concatenate([curve.rewards - curve.mean for curve in curves])
    assert abs(off.mean()) < 4 * off.std() / np.sqrt(off.size)
    # Half to all of the binomial variance p (1 - p) / P lies between prompts.
    binomial = np.mean([curve.mean[0] * (1 - curve.mean[0]) for curve in curves])
    assert 0.3 * binomial / prompts < off.var() < binomial / prompts


def test_schedules():
    line, cosine = (learning_rates(replace(PLAIN, schedule=name)) for name in ("linear", "cosine"))
    np.testing.assert_allclose(line[[0, 100]], [1.0, 0.5])
    np.testing.assert_allclose(cosine[[0, 100]], [1.0, 0.5])
    warm = learning_rates(replace(PLAIN, warmup=0.1))
    np.testing.assert_allclose(warm[[0, 9, 19, 150]], [0.05, 0.5, 1.0, 1.0])
    # 1 + 199/200 + ... + 101/200 = 75.25 of 100.5.
    assert simulate(0, replace(PLAIN, schedule="linear")).clock[[99, 199]] == pytest.approx([75.25 / 100.5, 1.0])


def test_stories():
    means = {story: simulate(11, replace(PLAIN, story=story)).mean for story in STORIES}
    assert means["plain"][-1] > means["plain"][0] + 0.3
    assert np.ptp(means["flat"]) < 0.02
    assert means["breaks"][-1] < 0.5 * means["breaks"].max()
    assert means["format first"][0] < 0.25 * means["plain"][0]
    assert simulate(11, replace(PLAIN, story="flat")).shape == "flat"
    assert simulate(11, replace(PLAIN, story="breaks")).shape == "collapse"


def test_uniform_groups_give_no_gradient():
    # With two completions a prompt of p near 1 or 0 is hardly ever mixed: the same pool learns more slowly than with sixteen.
    few, many = (simulate(5, replace(PLAIN, num_generations=size, shared=0.0)).mean for size in (2, 16))
    assert few[40] < many[40]
