"""The clock against schedules whose sums are known."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_fast.law.clock import StepClock


def seen(progress, until: int) -> StepClock:
    """A clock of 200 steps that has seen a schedule (a function of the share of steps) up to a step."""
    steps = np.arange(0.0, until + 1)
    return StepClock(steps, progress(steps / 200), 200)


@pytest.mark.parametrize(
    ("progress", "tolerance"),
    [
        (lambda u: u, 1e-9),  # constant
        (lambda u: 2 * u - u**2, 0.01),  # linear decay to zero
        (lambda u: u + np.sin(np.pi * u) / np.pi, 0.1),  # cosine decay to zero
    ],
)
@pytest.mark.parametrize("until", [40, 100, 160])
def test_the_rest_of_common_schedules_is_foreseen(progress, tolerance, until):
    clock = seen(progress, until)
    at = np.linspace(0, 200, 41)
    np.testing.assert_allclose(clock.progress_at(at), progress(at / 200), atol=tolerance)


def test_step_at_inverts_progress_at():
    clock = seen(lambda u: 2 * u - u**2, 80)
    for step in (0.0, 17.0, 80.0, 120.0, 199.0, 200.0):
        assert clock.step_at(float(clock.progress_at(np.array(step)))) == pytest.approx(step, abs=1e-6)


def test_the_end_of_the_budget_holds_no_more_progress():
    done = seen(lambda u: u, 200)
    assert done.step_at(1.0) == 200.0
    early = StepClock(np.array([0.0, 100.0, 150.0]), np.array([0.0, 1.0, 1.0]), 200)  # the rate fell to zero before the end
    np.testing.assert_array_equal(early.progress_at(np.array([150.0, 180.0, 200.0])), 1.0)


def test_a_warm_up_that_stands_still_does_not_divide_by_zero():
    clock = StepClock(np.array([0.0, 1.0, 2.0]), np.zeros(3), 100)
    assert 2.0 < clock.step_at(0.5) < 100.0
    assert float(clock.progress_at(np.array(100.0))) == 1.0
