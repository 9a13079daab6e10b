from __future__ import annotations

from grpo_fast.integrations.logs.raw_log import Names, RowWords, counted, runs_by_seed


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


def test_seeds_tell_runs_apart_where_a_run_has_several() -> None:
    assert runs_by_seed(None, None) is None
    assert runs_by_seed(None, ["0", "1", "0", "1"]) == ["0", "1", "0", "1"]
    assert runs_by_seed(["a", "a", "b", "b"], ["0", "0", "1", "1"]) == ["a", "a", "b", "b"], "names do already"
    assert runs_by_seed(["a", "a", "a", "a"], ["0", "1", "0", "1"]) == ["a, seed 0", "a, seed 1", "a, seed 0", "a, seed 1"]
    assert runs_by_seed(None, ["11", "12", "13", "14"]) is None, "another one in each row is no run's"


def test_words_of_rows() -> None:
    header = ["step", "seed", "split", "run"]
    words = RowWords(lambda known: next((name for name in header if name in known), None))
    for row in ({"run": "a", "seed": "1", "split": "eval"}, {}, {"run": "a", "seed": "2"}, {}):
        words.add(row.get)
    assert words.runs == ["a, seed 1", "a, seed 1", "a, seed 2", "a, seed 2"]
    assert words.splits == ["eval", "", "", ""], "what was measured is no property of the run"
    assert (RowWords[str](lambda known: None).runs, RowWords[str](lambda known: None).splits) == (None, None)
