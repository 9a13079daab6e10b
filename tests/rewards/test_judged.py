from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_fast.rewards import RewardFunction, RewardPool
from grpo_fast.rewards.call import InvalidRewardError
from grpo_fast.rewards.judged import judge, set_apart
from grpo_fast.types import Completion, Episode, Group, Prompt


def of_text(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def of_games(environments: list[dict[str, float]], answer: list[str], **columns: Any) -> list[float | None]:
    return [game.get(right) for game, right in zip(environments, answer, strict=True)]


def groups(*judgements: tuple[float | None, ...]) -> list[Group]:
    return [
        Group(
            Prompt(0, "q", (1,), {"answer": "a"}),
            [Completion((1,), (0.0,), "stop", "x", episode=Episode((True,), (), 1, judgements=each)) for each in judgements],
        )
    ]


def test_functions_that_name_environments_are_set_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought_judges.py").write_text("def score(environments): ...\ndef other(completions): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = ["format", of_games, of_text, "brought_judges:score", "brought_judges:other", "brought_judges:missing"]
    kept, apart = set_apart(given)
    assert [reward.name for reward in apart] == ["of_games", "score"]
    assert [kept[place] for place in (0, 2, 4, 5)] == [given[place] for place in (0, 2, 4, 5)]
    assert [kept[place].__name__ for place in (1, 3)] == ["of_games", "score"]  # type: ignore[union-attr]
    assert set_apart((of_text,)) == ((of_text,), ())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pool_reads_what_was_said_where_the_environments_are(workers: int) -> None:
    kept, _ = set_apart([of_games, of_text])
    played = groups((0.5,), (None,))
    with RewardPool(kept, workers=workers, weights=[2.0, 1.0]) as pool:
        report = pool.score(played)
    assert report.mean["of_games"] == 0.5
    assert played[0].reward == [2.0, 1.0]


def test_what_they_say_is_held_to_what_rewards_are() -> None:
    played = groups((), ())
    assert judge(RewardFunction("of_games", of_games), played, [{"a": 1.0}, {}]) == [1.0, None]
    with pytest.raises(InvalidRewardError, match="returned 1 values for 2 completions"):
        judge(RewardFunction("short", lambda environments: [1.0]), played, [{}, {}])
