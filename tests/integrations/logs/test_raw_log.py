from __future__ import annotations

from grpo_fast.integrations.logs.raw_log import Names, counted


def test_only_columns_that_may_matter_are_read() -> None:
    names = Names("my/loss")
    seen = [
        "step",
        "train/reward",
        "my/loss",
        "run - my/loss",
        "kl",
        "rewards/format/mean",
        "actor/lr",
        "grad_norm",
        "reward_std",
    ]
    assert [name for name in seen if names.keeps(name)] == [name for name in seen if name not in {"kl", "grad_norm"}]
    assert names.all() == seen
    assert not Names().keeps("my/loss")


def test_words_for_one_and_for_many() -> None:
    assert counted(1, "reward", "is|are infinite") == "1 reward is infinite"
    assert counted(0, "reward", "is|are infinite") == "0 rewards are infinite"
