from __future__ import annotations

import math

import pytest

from grpo_fast.config import Config
from grpo_fast.train.entropy_control import EntropyControl


def control(**settings: float) -> EntropyControl:
    return EntropyControl(Config(use_adaptive_entropy=True, entropy_target=0.5, **settings))


def test_the_weight_follows_the_entropy_and_keeps_to_its_bounds() -> None:
    made = control(entropy_coef=0.1, entropy_coef_delta=0.04, entropy_coef_min=0.05, entropy_coef_max=0.2)
    assert (made.coefficient, made.in_force) == (0.1, 0.0), "before anything was seen there is no bonus"
    seen = []
    for total, count in [(1.0, 2), (0.9, 2), (0.8, 4), (0.0, 7), (3.0, 2), (8.0, 2), (8.0, 2), (9.0, 2), (9.0, 2)]:
        made.observe(total, count)
        seen.append((round(made.coefficient, 6), round(made.in_force, 6)))
    assert seen == [
        (0.14, 0.14),
        (0.18, 0.18),
        (0.2, 0.2),
        (0.2, 0.2),
        (0.16, 0.0),
        (0.12, 0.0),
        (0.08, 0.0),
        (0.05, 0.0),
        (0.05, 0.0),
    ]
    made.observe(0.0, 0)
    assert made.coefficient == pytest.approx(0.05)


def test_a_fixed_weight_does_not_move() -> None:
    made = EntropyControl(Config(entropy_coef=0.3))
    assert made.in_force == 0.3


def test_its_state_is_taken_up_again() -> None:
    made = control()
    fresh = made.state_dict()
    assert fresh == {"coefficient": 0.0, "entropy": None}
    made.observe(0.4, 1)
    again = control()
    again.load_state_dict(made.state_dict())
    assert again.state_dict() == made.state_dict()
    assert again.in_force == made.in_force == 0.005
    again.load_state_dict(fresh)
    assert again.in_force == 0
    again.observe(math.nan, 1)
    assert again.in_force == 0
