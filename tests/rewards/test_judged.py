from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.async_code import AsyncCode
from grpo_fast.rewards import RewardFunction, RewardPool
from grpo_fast.rewards.call import InvalidRewardError
from grpo_fast.rewards.judged import judge, set_apart
from grpo_fast.types import Completion, Episode, Group, Prompt, Scored, TrainerState

TRAINERS = {"trainer_state", "log_extra", "log_metric"}
STATE = TrainerState(global_step=3, max_steps=10)


def of_text(completions: list[str], **columns: Any) -> list[float]:
    assert set(columns) == {"prompts", "completion_ids", "completion_openings", "environment_rewards", "answer"} | TRAINERS
    return [float(len(text)) for text in completions]


def of_games(environments: list[dict[str, float]], answer: list[str], **columns: Any) -> list[float | None]:
    return [game.get(right) for game, right in zip(environments, answer, strict=True)]


def groups(*judgements: tuple[Scored, ...]) -> list[Group]:
    """Of two completions each."""
    played = [Completion((1,), (0.0,), "stop", "x", episode=Episode((True,), (), 1, judgements=each)) for each in judgements]
    return [Group(Prompt(0, "q", (1,), {"answer": "a"}), played[first : first + 2]) for first in range(0, len(played), 2)]


@pytest.fixture
def loop() -> Iterator[AsyncCode]:
    code = AsyncCode()
    yield code
    code.close()


def test_functions_that_name_environments_are_set_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought_judges.py").write_text("def score(environments): ...\ndef other(completions): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = ["format", of_games, of_text, "brought_judges:score", "brought_judges:other", "brought_judges:missing"]
    kept, apart = set_apart(given)
    assert [reward.name for reward in apart] == ["of_games", "score"]
    assert [kept[place] for place in (0, 2, 4, 5)] == [given[place] for place in (0, 2, 4, 5)]
    assert [kept[place].__name__ for place in (1, 3)] == ["of_games", "score"]  # type: ignore[union-attr]
    assert set_apart((of_text,)) == ((of_text,), ())


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_pool_reads_what_was_said_where_the_environments_are(workers: int) -> None:
    """With what was logged there: a metric weighs as many completions as its call had, whichever slices the pool makes."""
    kept, _ = set_apart([of_games, of_text, of_games])
    first, second = {"share": [1.0], "once": [4.0]}, {"share": [3.0, 5.0]}
    said = [Scored([0.5], first, {"note": ["a"]}), Scored([None], first, {"note": ["b"]})]
    said += [Scored([1.0], second), *[Scored([0.0], second)] * 3]
    played = groups(*((each, Scored([7.0])) for each in said))
    with RewardPool(kept, workers=workers, weights=[2.0, 1.0, 0.0]) as pool:
        pool.start(["answer"])
        report = pool.score(played)
    assert report.mean == {"of_games": pytest.approx(1.5 / 5), "of_text": 1.0, "of_games_2": 7.0}
    assert [group.reward for group in played] == [[2.0, 1.0], [3.0, 1.0], [1.0, 1.0]]
    assert report.logged == {"share": (2 * 1.0 + 4 * 3.0 + 4 * 5.0) / 10, "once": 4.0}
    assert [group.extra for group in played] == [{"note": ["a", "b"]}, {"note": [None, None]}, {"note": [None, None]}]
    assert report.nones == {"of_games": 1, "of_text": 0, "of_games_2": 0}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pool_of_nothing_else_needs_no_worker(workers: int) -> None:
    kept, _ = set_apart([of_games])
    with RewardPool(kept, workers=workers) as pool:
        pool.start(["answer"])
        played = groups((Scored([0.5]),), (Scored([1.0]),))
        assert pool.score(played).mean == {"of_games": 0.75}
        assert pool.process_ids == []
    assert played[0].reward == [0.5, 1.0]


def test_what_they_say_is_held_to_what_rewards_are(loop: AsyncCode) -> None:
    played = groups((), ())
    of = RewardFunction("of_games", of_games)
    assert judge(of, played, [{"a": 1.0}, {}], state=STATE, loop=loop) == [Scored([1.0]), Scored([None])]
    with pytest.raises(InvalidRewardError, match="returned 1 values for 2 completions"):
        judge(RewardFunction("short", lambda environments: [1.0]), played, [{}, {}], state=STATE, loop=loop)


def test_they_are_given_what_others_are_and_may_be_async(loop: AsyncCode) -> None:
    found: list[asyncio.AbstractEventLoop] = []

    async def waits(environments: Any, trainer_state: TrainerState, log_metric: Any, log_extra: Any, **columns: Any) -> Any:
        found.append(asyncio.get_running_loop())
        log_metric("step", trainer_state.global_step)
        log_extra("board", environments)
        assert {"prompts", "completions", "completion_ids", "answer", "environment_rewards"} <= set(columns)
        return [0.5, 1.0]

    def judged() -> list[Scored]:
        return judge(RewardFunction("waits", waits), groups((), ()), ["x", "y"], state=STATE, loop=loop)

    expected = [Scored([0.5], {"step": [3.0]}, {"board": ["x"]}), Scored([1.0], {"step": [3.0]}, {"board": ["y"]})]
    assert judged() == judged() == expected

    async def own() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert set(found) == {loop.awaited(own())}, "what environments keep is bound to it"
