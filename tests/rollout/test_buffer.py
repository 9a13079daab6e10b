from __future__ import annotations

import threading
import time

import pytest

from grpo_fast.rollout.buffer import RolloutBuffer


class Producer:
    """Makes the number of a step once it is let; ``order`` holds what began and ended."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.let = {step: threading.Event() for step in range(1, 10)}
        self.fault: Exception | None = None

    def __call__(self, step: int) -> int:
        self.order.append(f"begin {step}")
        assert self.let[step].wait(20)
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        self.order.append(f"end {step}")
        return step

    def allow(self, *steps: int) -> None:
        for step in steps:
            self.let[step].set()


def until(condition: object) -> None:
    for _ in range(2000):
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.005)
    raise TimeoutError


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_nothing_begins_earlier_than_its_bound_and_everything_comes_in_order(staleness: int) -> None:
    producer = Producer()
    buffer = RolloutBuffer(producer, max_staleness=staleness, last_step=9)
    producer.allow(*range(1, 10))
    for step in range(1, 10 - staleness):
        assert buffer.take(step)[0] == step
        newest = step + staleness
        until(lambda newest=newest: f"end {newest}" in producer.order)
        time.sleep(0.01)
        assert f"begin {newest + 1}" not in producer.order
    buffer.close()
    buffer.close()


def test_holding_waits_for_all_that_may_be_made_and_lets_nothing_begin() -> None:
    producer = Producer()
    buffer = RolloutBuffer(producer, max_staleness=2, last_step=9)
    buffer.hold()
    producer.allow(1)
    buffer.take(1)
    threading.Timer(0.2, producer.allow, (2, 3, 4)).start()
    buffer.hold()
    assert producer.order == [f"{what} {step}" for step in (1, 2, 3) for what in ("begin", "end")]
    assert buffer.ready() == [2, 3]
    time.sleep(0.02)
    assert "begin 4" not in producer.order
    assert buffer.take(2)[0] == 2
    until(lambda: "end 4" in producer.order)
    buffer.close()


def overlap_and_production() -> tuple[float, float, float]:
    """The overlap that a buffer tells of a second product; the overlap there was at least; how long the product took."""
    spans: dict[int, tuple[float, float]] = {}
    begun = threading.Event()

    def produce(step: int) -> int:
        begin = time.perf_counter()
        if step == 2:
            begun.set()
        time.sleep(0.2)
        spans[step] = (begin, time.perf_counter())
        return step

    buffer = RolloutBuffer(produce, max_staleness=1, last_step=2)
    _, overlapped = buffer.take(1)
    assert overlapped == pytest.approx(0, abs=1e-6)
    taken = time.perf_counter()
    assert begun.wait(60)
    time.sleep(0.1)  # as a trainer works
    held = time.perf_counter()
    buffer.hold()
    _, overlapped = buffer.take(2)
    buffer.close()
    begin, end = spans[2]
    return overlapped, min(held, end) - max(taken, begin), end - begin


def test_the_seconds_nobody_waited_are_told() -> None:
    tries = [overlap_and_production() for _ in range(5)]
    assert all(least <= overlapped + 1e-6 for overlapped, least, _ in tries)
    # Half of each is waited for, and counted as no overlap; a busy machine may put that off now and then.
    assert min(overlapped / whole for overlapped, _, whole in tries) < 0.8


def test_what_fails_is_raised_when_its_step_comes_and_tried_again() -> None:
    producer = Producer()
    buffer = RolloutBuffer(producer, max_staleness=1, last_step=9)
    producer.allow(1)
    assert buffer.take(1)[0] == 1
    producer.fault = ConnectionError("the engine is gone")
    producer.allow(2, 3)
    buffer.hold()
    with pytest.raises(ConnectionError, match="the engine is gone"):
        buffer.take(2)
    assert buffer.take(2)[0] == 2
    buffer.close()


def test_what_was_brought_along_comes_first_and_is_not_made_again() -> None:
    producer = Producer()
    producer.allow(*range(1, 10))
    buffer = RolloutBuffer(producer, max_staleness=2, last_step=6)
    buffer.restore(4, [40, 50])
    assert buffer.ready() == [40, 50]
    assert [buffer.take(step)[0] for step in (4, 5, 6)] == [40, 50, 6]
    buffer.close()
    assert producer.order == ["begin 6", "end 6"], "nothing is made past the last step"


def test_nothing_is_waited_for_once_it_is_closed() -> None:
    buffer = RolloutBuffer(lambda step: step, max_staleness=1, last_step=9)
    assert buffer.take(1)[0] == 1
    buffer.close()
    with pytest.raises(ValueError, match="is closed; make a new one"):
        buffer.take(4)


def test_without_staleness_there_is_nothing_to_make_ahead() -> None:
    with pytest.raises(ValueError, match="max_staleness=0"):
        RolloutBuffer(lambda step: step, max_staleness=0, last_step=1)
