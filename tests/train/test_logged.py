from __future__ import annotations

import pytest

from grpo_fast.train.logged import is_own, named_apart
from tests.train.trainer.test_loop import NAMES


def test_names_that_the_run_has_are_told_apart() -> None:
    own = {"loss": 1.0, "time/judge": 2.0, "eval_reward": 3.0}
    others = {"share": 4.0, "lossy": 5.0, "timely/judge": 6.0, "evaluated": 7.0}
    assert named_apart(own | others) == {f"logged/{name}": value for name, value in own.items()} | others


@pytest.mark.parametrize("name", sorted({*NAMES, "tools/call_frequency", "tools/failure_frequency"}))
def test_every_metric_of_a_run_is_its_own(name: str) -> None:
    assert is_own(name)
