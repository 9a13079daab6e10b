"""The alarm: how often it cries wolf, how soon it sees one, and what it says."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from grpo_fast.law.alarm import ALONE, OTHER, SIGNALS, TOGETHER, AlarmState, CollapseAlarm, Cusum

Metrics = dict[str, float]


def wander(rng: np.random.Generator, size: int, *, sd: float, memory: float) -> np.ndarray:
    """Autocorrelated noise."""
    steps = rng.standard_normal(size) * sd * math.sqrt(1 - memory**2)
    values, now = np.empty(size), rng.standard_normal() * sd
    for i, step in enumerate(steps):
        now = memory * now + step
        values[i] = now
    return values


def rewards(rng: np.random.Generator, mean: np.ndarray, prompts: int, generations: int) -> tuple[np.ndarray, np.ndarray]:
    """Batch means of prompts of mixed difficulty, and the share of groups without variance."""
    difficulty = rng.beta(3 * mean[:, None], 3 * (1 - mean[:, None]), (mean.size, prompts))
    right = rng.binomial(generations, difficulty)
    return right.mean(axis=1) / generations, ((right == 0) | (right == generations)).mean(axis=1)


def run(
    seed: int, *, steps: int = 1000, batch: tuple[int, int] = (16, 8), collapse: int | None = None
) -> tuple[list[float], list[Metrics]]:
    """A run with everything that is watched; a collapse halves the reward over 20 steps, and entropy and gradient rise."""
    rng = np.random.default_rng(seed)
    x = np.arange(1, steps + 1) / steps
    start, end = rng.uniform(0.02, 0.5), rng.uniform(0.6, 0.95)
    mean = start + (end - start) * (1 - np.exp(-x / rng.uniform(0.05, 0.6))) if seed % 2 else np.full(steps, start)
    fall = np.zeros(steps)
    if collapse is not None:
        fall = np.clip((np.arange(1, steps + 1) - collapse) / 20, 0, 1)
        mean = 0.6 * (1 - fall / 2)
    reward, uniform = rewards(rng, mean, *batch)
    entropy = rng.uniform(-1, 0.7) - rng.uniform(0, 2) * (1 - np.exp(-x / rng.uniform(0.05, 0.5)))
    entropy += wander(rng, steps, sd=0.08, memory=0.5) + fall
    gradient = wander(rng, steps, sd=0.25, memory=0.3) + rng.uniform(-0.7, 0.7) * x + 1.5 * np.minimum(3 * fall, 1)
    gradient += np.where(rng.random(steps) < 0.02, rng.exponential(1.0, steps), 0.0)
    cut = rng.binomial(math.prod(batch), 0.02 + 0.25 * np.exp(-x / rng.uniform(0.02, 0.3))) / math.prod(batch)
    kl = np.log(1e-3 + rng.uniform(0.01, 0.2) * (1 - np.exp(-x / rng.uniform(0.1, 1)))) + wander(
        rng, steps, sd=0.15, memory=0.5
    )
    names = ("entropy", "grad_norm", "completions/clipped_ratio", "kl", "frac_reward_zero_std")
    rows = zip(np.exp(entropy), np.exp(gradient), cut, np.exp(kl), uniform, strict=True)
    return reward.tolist(), [dict(zip(names, map(float, row), strict=True)) for row in rows]


def replay(reward: list[float], metrics: list[Metrics] | None = None, alarm: CollapseAlarm | None = None) -> list[AlarmState]:
    alarm = alarm or CollapseAlarm(least_reward=0.0)
    return [
        alarm.update(step, value, metrics[step - 1] if metrics is not None else None) for step, value in enumerate(reward, 1)
    ]


def alarms(states: list[AlarmState]) -> list[int]:
    return [step for step, state in enumerate(states, 1) if state.confirmed]


def test_quiet_runs_stay_quiet():
    told = [alarms(replay(*run(seed, steps=300))) for seed in range(20)]
    assert told == [[]] * 20


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(2, 8), (16, 8), (64, 16)])
def test_false_alarms_come_on_less_than_one_in_a_hundred_quiet_runs(batch: tuple[int, int]) -> None:
    """60 runs of 1,000 steps: at a rate of 1 %, two of them or more would raise an alarm with a probability of 12 %."""
    assert sum(bool(alarms(replay(*run(seed, batch=batch)))) for seed in range(60)) <= 1


@pytest.mark.parametrize(("batch", "soon", "late"), [((64, 16), 11, 13), ((16, 8), 14, 17)])
def test_a_collapse_to_half_is_seen_within_its_twenty_steps(batch: tuple[int, int], soon: int, late: int) -> None:
    delays, onsets = [], []
    for seed in range(30):
        states = replay(*run(seed, steps=150, batch=batch, collapse=100))
        found = next(step for step in alarms(states) if step > 100)
        delays.append(found - 100)
        onsets.append(states[found - 1].onset - 101)
        assert not any(state.confirmed for state in states[: found - 1])
    assert np.median(delays) <= soon
    assert np.quantile(delays, 0.9) <= late
    assert abs(np.median(onsets)) <= 6


def test_other_signals_make_it_sooner():
    alone, together = [], []
    for seed in range(20):
        reward, metrics = run(seed, steps=160, batch=(8, 8), collapse=100)
        alone.append(alarms(replay(reward))[0])
        together.append(alarms(replay(reward, metrics))[0])
    assert np.mean(together) < np.mean(alone) - 1


def steady(steps: int, level: float = 0.6, swing: float = 0.05) -> list[float]:
    """A level with a swing that any estimate of noise gets right: every pair of steps differs by twice the swing or nothing."""
    return [level + swing * (-1 if step % 4 < 2 else 1) for step in range(steps)]


def test_the_sentence_names_what_moved_with_numbers():
    before = [{"entropy": 0.5 + 0.02 * (i % 2), "grad_norm": 0.8 + 0.1 * (i % 3), "kl": 0.0} for i in range(40)]
    after = [{"entropy": 2.0, "grad_norm": 0.9, "kl": 0.0}] * 10
    states = replay([*steady(40), *[0.1] * 10], before + after)
    (step,) = alarms(states)
    state = states[step - 1]
    assert state.moved == ("entropy_up",)
    assert state.onset == 41
    assert state.reason.startswith(f"The policy is collapsing: the reward fell from 0.610 to 0.100 from step 41 to step {step}")
    assert "entropy up from 0.5" in state.reason
    assert state.reason.endswith("to 2")
    assert state.words == "collapse since step 41"
    assert [s.words for s in states[:40]] == ["quiet"] * 40


def test_a_collapse_in_the_middle_of_a_rise_is_judged_by_the_level_just_reached():
    """A mean over fifty steps would be 0.36 here, and the fall below it eight steps late."""
    rng = np.random.default_rng(0)
    mean = np.concatenate([np.linspace(0.1, 0.8, 60), np.linspace(0.8, 0.2, 16)])
    states = replay((mean + 0.02 * rng.standard_normal(mean.size)).tolist())
    (found,) = alarms(states)
    assert found <= 70
    assert 61 <= states[found - 1].onset <= 65


def test_falls_that_do_not_matter_are_no_collapse():
    shallow = [*steady(60, 0.95, 0.002), *steady(60, 0.90, 0.002)]
    assert alarms(replay(shallow)) == []
    deep = [*steady(60, 0.95, 0.002), *steady(60, 0.70, 0.002)]
    assert alarms(replay(deep)) == [65]


def test_depth_is_counted_from_the_least_possible():
    reward = [*steady(60, 2.5, 0.01), *steady(60, 2.1, 0.01)]
    assert alarms(replay(reward, alarm=CollapseAlarm())) == []
    assert alarms(replay(reward, alarm=CollapseAlarm(least_reward=1.0))) == [65]
    low = [value - 3.0 for value in reward]
    assert alarms(replay([-1.5, *low], alarm=CollapseAlarm())) == [66]


def test_an_unlucky_batch_is_no_collapse():
    reward = steady(100)
    reward[50] = reward[51] = 0.0
    assert alarms(replay(reward)) == []


def test_a_rise_is_no_collapse_and_neither_is_what_comes_with_it():
    reward = np.linspace(0.1, 0.95, 200).tolist()
    entropy = [{"entropy": math.exp(-step / 50), "frac_reward_zero_std": step / 200} for step in range(200)]
    assert alarms(replay(reward, entropy)) == []


def test_what_others_do_without_the_reward_is_watched_only():
    metrics = [{"grad_norm": 0.5 + 0.05 * (i % 3)} for i in range(40)] + [{"grad_norm": 5.0}] * 20
    states = replay(steady(60), metrics)
    assert alarms(states) == []
    assert states[-1].moved == ("grad_norm",)
    assert states[-1].words == "watching: gradient norm moved"
    assert states[-1].levels["grad_norm"] > 1


def test_a_new_level_is_taken_for_the_rule_in_the_end():
    metrics = [{"grad_norm": 0.5 + 0.05 * (i % 3)} for i in range(40)] + [
        {"grad_norm": 5.0 + 0.5 * (i % 3)} for i in range(100)
    ]
    states = replay(steady(140), metrics)
    assert states[60].moved
    assert not states[-1].moved


def test_it_can_be_told_twice():
    reward = [*steady(40), *steady(60, 0.3, 0.02), *[0.02, 0.01] * 10]
    states = replay(reward)
    assert len(alarms(states)) == 2
    assert states[alarms(states)[1] - 1].onset == 101


def test_missing_and_unknown_values_are_passed_over():
    reward = [*steady(40), *[0.1] * 10]
    plain = alarms(replay(reward))
    gaps = [*reward[:20], math.nan, *reward[20:]]
    metrics = [{"entropy": math.nan, "unheard_of": 1.0, "grad_norm": math.inf}] * len(gaps)
    assert alarms(replay(gaps, metrics)) == [plain[0] + 1]


@pytest.mark.parametrize("cut", [3, 30, 105, 112])
def test_state_goes_on_bit_for_bit_after_json(cut: int) -> None:
    reward, metrics = run(5, steps=140, collapse=100)
    whole = replay(reward, metrics)
    alarm = CollapseAlarm(least_reward=0.0)
    first = replay(reward[:cut], metrics[:cut], alarm)
    again = CollapseAlarm(least_reward=0.0)
    again.load_state_dict(json.loads(json.dumps(alarm.state_dict())))
    rest = [again.update(step, reward[step - 1], metrics[step - 1]) for step in range(cut + 1, 141)]
    assert first + rest == whole
    assert any(state.confirmed for state in whole)


def test_a_detector_by_hand():
    found = Cusum(1, floor=1e-9, trend=False)
    for step in range(1, 17):
        found.add(step, float(step % 2))
    # mean 0.5; every step differs by 1, so sd = 0.8862; of a further value with the mean's own error: sd * sqrt(1 + 1/16)
    scale = math.sqrt(math.pi) / 2 * math.sqrt(17 / 16)
    assert found.total == 0.0
    found.add(17, 0.5 + 2.5 * scale)
    assert found.total == pytest.approx(1.5)
    found.add(18, 100.0)
    assert found.total == pytest.approx(3.5), "cut at 3, less the slack of 1"
    assert (found.onset, found.before) == (17, 0.5)
    assert found.now == pytest.approx((100.5 + 2.5 * scale) / 2)


def test_a_trend_is_gone_on_with():
    found = Cusum(-1, floor=0.1, trend=True)
    for step in range(1, 31):
        found.add(step, 1.0 * step)
    assert found.total == 0.0
    # on the line 31 is due; the error of a value 16 behind the middle of 30: sqrt(1 + 1/30 + 15.5^2 / 2247.5)
    error = 0.1 * math.sqrt(1 + 1 / 30 + 15.5**2 / 2247.5)
    found.add(31, 31.0 - 2 * error)
    assert found.total == pytest.approx(1.0)
    assert found.before == pytest.approx(30.0)


def test_thresholds_are_what_the_docstring_says():
    assert (ALONE, TOGETHER, OTHER) == (9.0, 6.0, 8.0)
    assert set(SIGNALS) == {"entropy_up", "entropy_down", "grad_norm", "truncation", "kl", "zero_std"}


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"epsilon=0\.0 must be"):
        CollapseAlarm(0.0)
