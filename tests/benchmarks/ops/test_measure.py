"""Turns, quantiles, memory and ceilings of a CPU."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.ops.measure import Clock, ceilings, peak_extra_bytes, quantiles, take_turns

CPU = torch.device("cpu")


def test_calls_take_turns_in_an_order_that_rotates() -> None:
    order: list[str] = []

    def call(name: str):
        def run() -> None:
            order.append(name)
            time.sleep(0.002)

        return run

    calls = {name: call(name) for name in "abc"}
    found, failures = take_turns(Clock(CPU), calls, allowance_s=0.0, min_rounds=3, on_round=lambda: order.append(" "))
    assert not failures
    assert "".join(order) == " abc abc bca cab", "the first round is not read"
    assert all(len(readings) == 3 and min(readings) >= 0.002 for readings in found.values())


def test_short_calls_are_repeated_and_their_first_reading_is_not_kept() -> None:
    count = 0

    def run() -> None:
        nonlocal count
        count += 1

    for _attempt in range(5):  # on a busy machine the first reading may be a long one
        count = 0
        found, _ = take_turns(Clock(CPU), {"short": run}, allowance_s=0.0, min_rounds=3)
        if count == 2 + 2 * 50:
            break
    assert count == 2 + 2 * 50
    assert len(found["short"]) == 2


def test_turns_end_with_the_allowance() -> None:
    begun = time.perf_counter()
    found, _ = take_turns(Clock(CPU), {"a": lambda: time.sleep(0.02)}, allowance_s=0.1, min_rounds=2, max_rounds=100)
    assert time.perf_counter() - begun > 0.1
    assert len(found["a"]) == 2 or sum(found["a"][:-1]) <= 0.1


def test_a_call_that_breaks_in_the_turns_leaves_them_and_the_others_go_on() -> None:
    count = 0

    def breaks() -> None:
        nonlocal count
        count += 1
        time.sleep(0.002)
        if count == 3:
            raise MemoryError("full")

    calls = {"breaks": breaks, "holds": lambda: time.sleep(0.002)}
    found, failures = take_turns(Clock(CPU), calls, allowance_s=0.0, min_rounds=4)
    assert list(found) == ["holds"]
    assert len(found["holds"]) == 4
    assert str(failures["breaks"]) == "full"
    assert count == 3


def test_a_call_that_breaks_at_once_is_out() -> None:
    def breaks() -> None:
        raise MemoryError("full")

    found, failures = take_turns(Clock(CPU), {"breaks": breaks, "holds": lambda: time.sleep(0.002)}, allowance_s=0.0)
    assert (list(found), list(failures)) == (["holds"], ["breaks"])


class Told(Clock):
    """Reads what a call says that it took."""

    def seconds(self, call: Callable[[], object], *, repeats: int = 1) -> float:
        said = [call() for _ in range(repeats)]
        assert isinstance(said[0], float)
        return said[0]


def test_the_first_round_may_be_long() -> None:
    lasts = iter([0.05])
    found, _ = take_turns(Told(CPU), {"a": lambda: next(lasts, 0.002)}, allowance_s=0.0, min_rounds=3)
    assert found["a"] == [0.002] * 3


def test_what_is_slow_has_few_turns_and_the_others_many() -> None:
    calls = {"slow": lambda: 0.08, "fast": lambda: 0.002, "less": lambda: 0.006}
    found, failures = take_turns(Told(CPU), calls, allowance_s=600.0, min_rounds=3, max_rounds=20)
    assert not failures
    assert {name: len(readings) for name, readings in found.items()} == {"slow": 2, "fast": 20, "less": 20}


def test_quantiles() -> None:
    found = quantiles([0.001 * n for n in range(11)])
    assert found == pytest.approx({"p50_ms": 5.0, "p20_ms": 2.0, "p80_ms": 8.0})
    assert quantiles([0.5]) == {"p50_ms": 500.0, "p20_ms": 500.0, "p80_ms": 500.0}


@pytest.mark.skipif(sys.platform != "linux", reason="the resident size's peak is reset through /proc")
def test_peak_memory_is_seen_though_it_is_gone_afterwards() -> None:
    def run() -> torch.Tensor:
        held = torch.ones(2**26, dtype=torch.uint8)  # 64 MiB, and 64 more for a moment
        return (held + 1)[:10].clone()

    found = peak_extra_bytes(run, CPU)
    assert found is not None
    assert 120 * 2**20 < found < 150 * 2**20
    small = peak_extra_bytes(lambda: torch.ones(2**10), CPU)
    assert small is not None
    assert small < 8 * 2**20


def test_ceilings_are_rates() -> None:
    found = ceilings(Clock(CPU), CPU, small=True)
    assert 1e8 < found.gemm_flops["float32"] < 1e14
    assert 1e7 < found.copy_bytes_per_s < 1e13
