from __future__ import annotations

from grpo_fast.train.logged import named_apart


def test_names_that_the_run_has_are_told_apart() -> None:
    own = {"loss": 1.0, "time/judge": 2.0, "eval_reward": 3.0, "forecast/median": 3.5, "kl": 3.6}
    others = {"share": 4.0, "lossy": 5.0, "timely/judge": 6.0, "evaluated": 7.0, "judge/time": 8.0, "eval": 9.0}
    found = named_apart(own | others, ["loss", "time/train", "time/sync"])
    assert found == {f"logged/{name}": value for name, value in own.items()} | others
