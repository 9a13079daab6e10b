from __future__ import annotations

import math
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_fast.ops.group_advantage import group_advantage

NAN = float("nan")
REWARDS = [
    [1.0, 0.0, 0.0, 1.0],
    [0.1, 0.1, 0.1, 0.1],
    [NAN, 2.0, -1.0, 0.5],
    [NAN, NAN, 3.0, NAN],
    [NAN, NAN, NAN, NAN],
    [0.3, 0.30000004172325134, 0.3, 0.3],
]


def expected(rewards: list[list[float]], scale: str, leave_one_out: bool) -> list[list[float]]:
    every = [Fraction(r) for row in rewards for r in row if not math.isnan(r)]
    result = []
    for row in rewards:
        known = [Fraction(r) for r in row if not math.isnan(r)]
        values = []
        for r in row:
            if math.isnan(r) or len(known) < 2:
                values.append(0.0)
                continue
            baseline = (sum(known) - Fraction(r)) / (len(known) - 1) if leave_one_out else sum(known) / len(known)
            spread = {"none": None, "group": known, "batch": every}[scale]
            values.append(float(Fraction(r) - baseline) / (1.0 if spread is None else float(statistics.stdev(spread)) + 1e-4))
        result.append(values)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_the_formula(scale: str, leave_one_out: bool, dtype: torch.dtype) -> None:
    rewards = torch.tensor(REWARDS, dtype=dtype)
    result = group_advantage(rewards, scale_rewards=scale, leave_one_out=leave_one_out)
    assert result.advantages.dtype == dtype
    truth = torch.tensor(expected(rewards.double().tolist(), scale, leave_one_out), dtype=torch.float64)
    torch.testing.assert_close(result.advantages.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-12)


def test_group_statistics() -> None:
    result = group_advantage(torch.tensor(REWARDS))
    assert result.zero_variance.tolist() == [False, True, False, True, True, False]
    torch.testing.assert_close(result.mean, torch.tensor([0.5, 0.1, 0.5, 3.0, NAN, 0.3]), equal_nan=True)
    torch.testing.assert_close(
        result.std, torch.tensor([3**-0.5, 0.0, 1.5, NAN, NAN, 1.4901e-08]), equal_nan=True, rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exact_zeros(scale: str, leave_one_out: bool) -> None:
    rewards = torch.tensor([[0.1] * 7, [1 / 3] * 7, [1e6 + 0.1] * 7, [0.0, 1.0] * 3 + [0.5]])
    result = group_advantage(rewards, scale_rewards=scale, leave_one_out=leave_one_out)
    assert (result.advantages[:3] == 0).all()
    assert (result.advantages[3] != 0).sum() == 6
    assert result.zero_variance.tolist() == [True, True, True, False]


def test_a_padded_group_equals_the_group_itself() -> None:
    short = group_advantage(torch.tensor([[1.0, 0.0, 0.5]])).advantages
    padded = group_advantage(torch.tensor([[1.0, 0.0, 0.5, NAN, NAN], [1.0, 2.0, 3.0, 4.0, 5.0]])).advantages
    assert torch.equal(padded[:1, :3], short)
    assert (padded[0, 3:] == 0).all()


def test_a_large_offset_costs_no_precision() -> None:
    rewards = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    torch.testing.assert_close(group_advantage(rewards + 2**20).advantages, group_advantage(rewards).advantages, rtol=0, atol=0)


@given(
    st.lists(st.lists(st.one_of(st.just(NAN), st.floats(-1e6, 1e6, width=32)), min_size=3, max_size=3), min_size=1, max_size=5),
    st.sampled_from(["group", "batch", "none"]),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_advantages_are_always_finite_and_centred(rewards: list[list[float]], scale: str, leave_one_out: bool) -> None:
    result = group_advantage(torch.tensor(rewards, dtype=torch.float64), scale_rewards=scale, leave_one_out=leave_one_out)
    assert result.advantages.isfinite().all()
    size = result.advantages.abs().sum(1).clamp(min=1.0)
    assert (result.advantages.sum(1).abs() <= 1e-4 * size).all()


def test_a_step_without_prompts() -> None:
    result = group_advantage(torch.zeros(0, 4), scale_rewards="batch")
    assert result.advantages.shape == (0, 4)
    assert result.zero_variance.shape == (0,)


def test_unusable_rewards_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.int64"):
        group_advantage(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        group_advantage(torch.zeros(3))
    with pytest.raises(ValueError, match="scale_rewards='std'"):
        group_advantage(torch.zeros(1, 3), scale_rewards="std")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt 1, completion 0 is -inf"):
        group_advantage(torch.tensor([[0.0, 1.0], [-math.inf, 2.0]]))
