from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from grpo_fast.timed_calls import OverdueError, TimedCalls

LONG_S = 60.0


def failed(place: int, error: BaseException) -> Exception:
    return LookupError(f"call {place}: {type(error).__name__} {error}")


@pytest.fixture
def make() -> Iterator[Callable[..., TimedCalls]]:
    made: list[TimedCalls] = []

    def build(*, timeout_s: float = LONG_S, workers: int = 4) -> TimedCalls:
        made.append(TimedCalls(timeout_s=timeout_s, workers=workers))
        return made[-1]

    yield build
    for each in made:
        each.close()
        each.close()


def test_calls_run_side_by_side_and_their_results_keep_their_order(make: Callable[..., TimedCalls]) -> None:
    together = threading.Barrier(4)
    assert make().run([lambda: together.wait(20)] * 4, failed).count(0) == 1
    assert make(workers=2).run([lambda value=value: value for value in range(9)], failed) == list(range(9))


def test_async_calls_share_one_loop_that_is_kept(make: Callable[..., TimedCalls]) -> None:
    calls, met = make(), asyncio.Barrier(3)

    async def meet() -> asyncio.AbstractEventLoop:
        await met.wait()
        return asyncio.get_running_loop()

    assert len({*calls.run([meet] * 3, failed), *calls.run([meet] * 3, failed)}) == 1


def test_what_is_raised_is_told_with_its_place_and_an_exit_is_no_end(make: Callable[..., TimedCalls]) -> None:
    def leave() -> None:
        raise SystemExit(3)

    async def leave_later() -> None:
        leave()

    async def broken() -> None:
        raise KeyError("page")

    calls = make()
    for function, told in (
        (leave, "call 1: SystemExit 3"),
        (leave_later, "call 1: SystemExit 3"),
        (broken, "call 1: KeyError 'page'"),
    ):
        with pytest.raises(LookupError, match=told):
            calls.run([int, function], failed)
    assert calls.run([int] * 9, failed) == [0] * 9


def test_each_call_has_a_deadline_of_its_own(make: Callable[..., TimedCalls]) -> None:
    """Others that wait for a worker do not lengthen it, and their wait does not count."""
    released = threading.Event()
    calls = make(timeout_s=2.0, workers=2)
    in_turn = [lambda: time.sleep(0.05)] * 120  # 3 s together by two workers
    assert calls.run(in_turn, failed) == [None] * 120
    begin = time.monotonic()
    with pytest.raises(OverdueError) as caught:
        calls.run([int, lambda: released.wait(LONG_S), *in_turn], failed)
    assert list(caught.value.places) == [1]
    assert time.monotonic() - begin < 20
    assert calls.run([int], failed) == [0], "other threads go on"
    released.set()


def test_calls_that_others_hold_up_for_ever_end_too(make: Callable[..., TimedCalls]) -> None:
    released, began = threading.Event(), threading.Event()
    calls = make(timeout_s=2.0, workers=1)
    told: list[Any] = []

    def hang() -> None:
        began.set()
        released.wait(LONG_S)

    def attempt(function: Callable[[], Any]) -> None:
        with pytest.raises(OverdueError) as caught:
            calls.run([function], failed)
        told.append(list(caught.value.places))

    first = threading.Thread(target=attempt, args=(hang,))
    first.start()
    assert began.wait(20)
    attempt(int)
    first.join()
    released.set()
    assert sorted(told) == [[], [0]]


def test_closing_cancels_what_is_awaited(make: Callable[..., TimedCalls]) -> None:
    calls, ended, began = make(timeout_s=0.2), threading.Event(), threading.Event()

    async def endless() -> None:
        began.set()
        try:
            await asyncio.sleep(LONG_S)
        finally:
            ended.set()

    with pytest.raises(OverdueError):
        calls.run([endless], failed)
    assert began.wait(20)
    calls.close()
    assert ended.wait(20)


def test_calls_that_wait_are_not_begun_once_another_is_overdue(make: Callable[..., TimedCalls]) -> None:
    released, done = threading.Event(), list[int]()
    calls = make(timeout_s=1.0, workers=2)
    with pytest.raises(OverdueError) as caught:
        calls.run([lambda: released.wait(LONG_S)] * 2 + [lambda: done.append(1)] * 5, failed)
    assert list(caught.value.places) == [0, 1]
    assert caught.value.blocked_at == ""
    released.set()
    assert calls.run([int] * 4, failed) == [0] * 4
    assert done == []


def test_after_an_interrupt_nothing_waits_for_what_hangs(make: Callable[..., TimedCalls]) -> None:
    """The signal comes while every worker hangs; closing, which makes calls, gets others."""
    released, main = threading.Event(), threading.get_ident()
    calls = make(workers=1)

    def hang() -> None:
        signal.pthread_kill(main, signal.SIGINT)
        released.wait(LONG_S)

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        calls.run([hang], failed)
    assert calls.run([int], failed) == [0]
    assert time.monotonic() - begin < LONG_S / 2
    released.set()


def test_what_blocks_the_loop_is_told(make: Callable[..., TimedCalls]) -> None:
    released = threading.Event()

    async def block() -> None:
        released.wait(LONG_S)

    with pytest.raises(OverdueError) as caught:
        make(timeout_s=0.5).run([block], failed)
    released.set()
    assert "test_timed_calls.py" in caught.value.blocked_at
    assert "in block" in caught.value.blocked_at
