from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from grpo_fast.compute import ComputeMeter, ModelShape
from grpo_fast.compute.outlook import COSTS, Guess, Pace, StepWork, end_steps, step_costs
from grpo_fast.device import EstimatedEnergy

SHAPE = ModelShape(body_params=1000, head_params=200, attention_layers=2, attention_dim=16, hidden_size=16, vocab_size=20)
WORK = StepWork(SHAPE, num_prompts=4, num_generations=8, prompt_tokens=10.0)
SURE = Guess(20.0, 1.0, "given")
ALL = Guess(1.0, 1.0, "given", most=1.0)
NORMALS = np.random.default_rng(0).standard_normal((3, 2000))


def test_a_guess_lies_within_its_factor_nine_times_in_ten() -> None:
    drawn = Guess(100.0, 2.0, "assumed").draws(NORMALS[0])
    assert np.median(drawn) == pytest.approx(100, rel=0.03)
    assert np.mean((drawn >= 50) & (drawn <= 200)) == pytest.approx(0.9, abs=0.02)
    assert Guess(100.0, 2.0, "assumed", most=120.0).draws(NORMALS[0]).max() == 120
    for value, factor in ((0.0, 2.0), (float("nan"), 2.0), (1.0, 0.5)):
        with pytest.raises(ValueError, match="give a positive value"):
            Guess(value, factor, "given")


def test_a_step_costs_what_the_meter_will_charge() -> None:
    work = replace(WORK, num_iterations=2, checkpointing=True, scoring_passes=(False,))
    meter = ComputeMeter(SHAPE, power=EstimatedEnergy(0.0))
    meter.add_rollout([10] * 4, [[20] * 8] * 4)
    meter.add_train([30] * 16, 20 * 16, checkpointing=True, num_iterations=2)
    meter.add_reference([30] * 16, 20 * 16)
    used = meter.usage(1)
    assert work.flops(20.0, 0.5) == used.flops
    assert work.tokens(np.array(20.0)) == used.tokens == 4 * 8 * 30
    cut = ComputeMeter(SHAPE, power=EstimatedEnergy(0.0))
    cut.add_rollout([10] * 4, [[20] * 8] * 4)
    cut.add_train([30] * 16, 20 * 16, num_kept=5 * 20 * 16)
    assert replace(WORK, top_k=5).flops(20.0, 0.5) == cut.usage(1).flops < WORK.flops(20.0, 0.5)
    idle = ComputeMeter(SHAPE, power=EstimatedEnergy(0.0))
    idle.add_reference([30] * 3 * 16, 20 * 3 * 16)
    assert replace(work, idle_passes=3).flops(20.0, 0.5) == used.flops + idle.usage(1).flops
    assert WORK.flops(20.0, 0.0) < WORK.flops(20.0, 0.5) < work.flops(20.0, 0.5)


def test_costs_follow_from_lengths_shares_and_pace() -> None:
    pace = Pace(seconds=Guess(36.0, 1.0, "given"), num_devices=2, price_per_gpu_hour=3.0, watts=500.0)
    costs = step_costs(WORK, pace, completion_tokens=SURE, trained_share=ALL, normals=NORMALS)
    assert tuple(costs) == COSTS
    assert {name: pytest.approx(values[0]) for name, values in costs.items()} == {
        "tokens": 960.0,
        "flops": WORK.flops(20.0, 1.0),
        "device_hours": 0.02,
        "wall_hours": 0.01,
        "money": 0.06,
        "energy_kwh": 0.01,
    }
    long = step_costs(WORK, pace, completion_tokens=Guess(20.0, 2.0, "given"), trained_share=ALL, normals=NORMALS)
    assert np.corrcoef(long["tokens"], long["flops"])[0, 1] > 0.99
    assert np.ptp(long["wall_hours"]) == 0, "a mean over all steps does not change with lengths"
    timed = step_costs(
        WORK, replace(pace, at_tokens=960.0), completion_tokens=Guess(20.0, 2.0, "given"), trained_share=ALL, normals=NORMALS
    )
    assert timed["wall_hours"] == pytest.approx(0.01 * timed["tokens"] / 960)


def test_seconds_from_the_peak() -> None:
    pace = Pace(mfu=Guess(0.1, 1.0, "assumed"), peak_flops=1e6, num_devices=2)
    costs = step_costs(WORK, pace, completion_tokens=SURE, trained_share=ALL, normals=NORMALS)
    assert costs["wall_hours"][0] == pytest.approx(WORK.flops(20.0, 1.0) / (0.1 * 1e6 * 2) / 3600)
    nothing = step_costs(WORK, Pace(), completion_tokens=SURE, trained_share=ALL, normals=NORMALS)
    assert all(np.isnan(nothing[name]).all() for name in ("wall_hours", "device_hours", "money", "energy_kwh"))


def test_the_first_limit_ends_a_run() -> None:
    costs = {"tokens": np.array([10.0, 20.0, 40.0]), "money": np.array([1.0, 1.0, np.nan])}
    ends, name = end_steps(costs, {"tokens": 200.0, "money": None}, max_steps=15)
    assert ends.tolist() == [15, 10, 5]
    assert name == "tokens"
    assert end_steps(costs, {"tokens": None}, max_steps=15)[1] == "steps"
    assert end_steps(costs, {"tokens": 1.0}, max_steps=15)[0].tolist() == [1, 1, 1], "a run ends after a step, not before"
    with pytest.raises(ValueError, match="money"):
        end_steps(costs, {"money": 5.0}, max_steps=15)
