"""Async functions in the pool: awaited together, on a loop that each process keeps, under one deadline each."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.rewards import RewardError
from tests.rewards.pool.groups import Factory, group


def test_async_functions_and_reused_workers(make_pool: Factory) -> None:
    async def later(completions: list[str]) -> list[float]:
        await asyncio.sleep(0.01)
        return [float(os.getpid())] * len(completions)

    pool = make_pool(later)
    first, second = group("a"), group("b")
    pool.score([first])
    pool.score([second])
    assert first.reward == second.reward == [float(pool.process_ids[0])]
    assert first.reward != [float(os.getpid())]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_async_functions_are_awaited_together(make_pool: Factory, workers: int) -> None:
    """Neither ends without the other; what they share, they share where they run."""

    def meet(name: str, mine: str, other: str) -> Any:
        async def waits(completions: list[str]) -> list[float]:
            import builtins

            events = builtins.__dict__.setdefault(f"events of {name} {workers}", {})
            events.setdefault(mine, asyncio.Event()).set()
            await events.setdefault(other, asyncio.Event()).wait()
            return [float(len(text)) for text in completions]

        return waits

    def not_async(completions: list[str]) -> list[float]:
        async def inner() -> float:
            return 0.5

        return [asyncio.run(inner())] * len(completions)  # which is refused inside a running loop

    pool = make_pool(meet("one", "a", "b"), not_async, meet("one", "b", "a"), workers=workers, timeout_s=120.0)
    scored = group("a", "bb")
    report = pool.score([scored])
    assert scored.rewards == [[1.0, 0.5, 1.0], [2.0, 0.5, 2.0]]
    assert report.restarts == 0


def test_async_functions_meet_inside_a_running_loop(make_pool: Factory) -> None:
    meeting: list[asyncio.Event] = []

    async def first(completions: list[str]) -> list[float]:
        meeting.append(asyncio.Event())
        await meeting[0].wait()
        return [1.0]

    async def second(completions: list[str]) -> list[float]:
        meeting[0].set()
        return [2.0]

    async def in_a_notebook() -> list[list[float]]:
        pool, scored = make_pool(first, second, workers=0), group("a")
        pool.score([scored])
        pool.close()
        return scored.rewards

    assert asyncio.run(in_a_notebook()) == [[1.0, 2.0]]


def test_async_functions_of_all_workers_are_under_way_at_once(make_pool: Factory, tmp_path: Path) -> None:
    def there(word: str) -> list[float]:
        (tmp_path / word).touch()
        return [1.0]

    async def waits(completions: list[str]) -> list[float]:
        there(completions[0])
        while len(list(tmp_path.iterdir())) < 2:
            await asyncio.sleep(0.01)
        return [1.0]

    def comes_later(completions: list[str]) -> list[float]:
        return [float(len(list(tmp_path.iterdir())))]

    groups = [group("a"), group("b")]
    make_pool(comes_later, waits, workers=2, timeout_s=120.0).score(groups)
    assert [each.rewards for each in groups] == [[[2.0, 1.0]], [[2.0, 1.0]]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loop_is_kept_from_step_to_step(make_pool: Factory, workers: int) -> None:
    async def same(completions: list[str]) -> list[float]:
        import builtins

        running = asyncio.get_running_loop()
        return [float(builtins.__dict__.setdefault(f"loop with {workers}", running) is running)]

    pool = make_pool(same, workers=workers)
    for scored in (group("a"), group("b")):
        pool.score([scored])
        assert scored.reward == [1.0], "a client that is kept would be bound to a loop that is closed"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_async_function_that_fails_is_named_and_the_other_keeps_its_values(make_pool: Factory, workers: int) -> None:
    async def fine(completions: list[str], log_metric: Any) -> list[float]:
        await asyncio.sleep(0)
        log_metric("fine", 1.0)
        return [1.0]

    async def bad(completions: list[str], log_metric: Any, log_extra: Any) -> list[float]:
        log_metric("bad", 1.0)
        log_extra("bad", [1])
        raise LookupError("no answer")

    with pytest.raises(RewardError, match=r"reward function 'bad' raised LookupError: no answer \(.*in bad") as caught:
        make_pool(fine, bad, workers=workers).score([group("a")])
    assert caught.value.function == "bad"
    scored = group("a")
    report = make_pool(fine, bad, workers=workers, on_error="none").score([scored])
    assert scored.reward == [1.0]
    assert report.errors == {"fine": 0, "bad": 1}
    assert report.logged == {"fine": 1.0}, "what a failed call has logged goes with it"
    assert scored.extra == {}


@pytest.mark.parametrize("how", ["awaits", "blocks"])
def test_a_deadline_holds_for_async_functions_and_those_that_missed_it_are_named(make_pool: Factory, how: str) -> None:
    async def fine(completions: list[str]) -> list[float]:
        return [1.0]

    async def hangs(completions: list[str]) -> list[float]:
        if how == "blocks":
            time.sleep(600)
        await asyncio.Event().wait()
        return [1.0]

    async def waits(completions: list[str]) -> list[float]:
        await asyncio.sleep(600)
        return [1.0]

    pool = make_pool(fine, hangs, waits, timeout_s=3.0, on_error="none")
    pool.start()
    scored = group("a")
    report = pool.score([scored])
    assert scored.reward == [1.0]
    assert report.timeouts == {"fine": 0, "hangs": 1, "waits": 1}
    assert report.restarts == 1
    together = "; it was awaited together with '{}', and any of them may be the cause"
    for problem, name, other in zip(report.problems, ("hangs", "waits"), ("waits", "hangs"), strict=True):
        assert problem.startswith(f"reward function '{name}' took longer than 3 s for 1 completions; its worker was killed")
        assert problem.endswith(together.format(other))


def test_an_async_function_that_ends_its_process_is_named(make_pool: Factory) -> None:
    async def waits(completions: list[str]) -> list[float]:
        await asyncio.Event().wait()
        return [1.0]

    async def dies(completions: list[str]) -> list[float]:
        os._exit(7)

    with pytest.raises(RewardError, match=r"'waits' ended its worker process with exit code 7; .* together with 'dies'"):
        make_pool(waits, dies).score([group("a")])
