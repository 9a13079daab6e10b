from __future__ import annotations

import pytest

from grpo_fast.compute import (
    BUDGET_FIELDS,
    Budget,
    Usage,
)


def usage(**changes: float | None) -> Usage:
    zero = {"steps": 0, "tokens": 0, "flops": 0, "gpu_hours": 0.0, "wall": 0.0, "money": 0.0, "energy": 0.0}
    return Usage(**(zero | changes))


@pytest.mark.parametrize("limit", BUDGET_FIELDS)
def test_each_limit_trips(limit: str) -> None:
    budget = Budget(**{limit: 10})
    assert budget.check(usage(**{limit: 9})) is None
    assert budget.remaining(usage(**{limit: 9})) == {limit: pytest.approx(0.1)}
    verdict = budget.check(usage(**{limit: 10}))
    assert verdict is not None
    assert (verdict.limit, verdict.stopped_by, verdict.used, verdict.allowed) == (limit, BUDGET_FIELDS[limit], 10, 10)
    assert verdict.reason.startswith(f"{BUDGET_FIELDS[limit]}=10 is reached: 10 ")
    assert budget.remaining(usage(**{limit: 30})) == {limit: 0.0}


def test_the_limit_exceeded_most_is_named() -> None:
    budget = Budget(steps=100, tokens=1e6, wall=2)
    verdict = budget.check(usage(steps=100, tokens=1_200_000, wall=1.0))
    assert verdict is not None
    assert verdict.reason == "max_tokens=1e+06 is reached: 1.2e+06 tokens are used."


@pytest.mark.parametrize(("done", "told"), [(1, "1 step is done"), (2, "2 steps are done"), (1200, "1,200 steps are done")])
def test_a_limit_below_what_is_done_is_told_apart_from_it(done: int, told: str) -> None:
    verdict = Budget(steps=1).check(usage(steps=done))
    assert verdict is not None
    assert verdict.reason == f"max_steps=1 is reached: {told}."


def test_no_limit_never_trips() -> None:
    assert Budget().check(usage(steps=10**9)) is None
    assert Budget().remaining(usage()) == {}


@pytest.mark.parametrize("value", [0, -1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("limit", BUDGET_FIELDS)
def test_limits_must_be_positive(limit: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Budget\({limit}=...\) must be a positive number"):
        Budget(**{limit: value})


def test_money_needs_a_price() -> None:
    with pytest.raises(ValueError, match="needs a price: set price_per_gpu_hour"):
        Budget(money=5).check(usage(money=None))
    assert Budget(money=5).check(usage(money=0.0)) is None
    assert Budget(steps=5).check(usage(money=None)) is None


def test_a_budget_reads_the_names_of_the_configuration() -> None:
    budget = Budget.from_config(max_steps=5, max_wall_hours=1.5, max_energy_kwh=None)
    assert budget == Budget(steps=5, wall=1.5)
    with pytest.raises(TypeError, match="unknown limits max_stepz; known are max_steps"):
        Budget.from_config(max_stepz=5)


def test_the_configuration_has_every_limit() -> None:
    from grpo_fast.config import Config

    assert set(BUDGET_FIELDS.values()) <= Config.model_fields.keys()
