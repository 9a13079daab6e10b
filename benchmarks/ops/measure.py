"""Seconds, bytes and the device's ceilings.

Contenders take turns, one call each, in an order that rotates, so that all of them meet the same clocks and neighbours. On a
GPU the second-level cache is overwritten before each call. Calls too short for the clock are repeated inside one reading. A
first round is not read: in it, memory that was given back comes from the driver. What takes more than ten times as long as the
fastest has two readings, so that the others have many.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

_SHORT_S = 1e-3
_MAX_REPEATS = 50
_FLUSH_BYTES = 2**28
_SLOW_RATIO, _SLOW_READINGS = 10.0, 2


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if self._cuda else None

    def seconds(self, call: Callable[[], object], *, repeats: int = 1) -> float:
        """Of one call, the mean over ``repeats`` back to back."""
        if self._flush is None:
            begun = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - begun) / repeats
        self._flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / repeats


def take_turns(
    clock: Clock,
    calls: Mapping[str, Callable[[], object]],
    *,
    allowance_s: float,
    min_rounds: int = 3,
    max_rounds: int = 30,
    on_round: Callable[[], None] = lambda: None,
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Times warm calls in turns until an allowance is used up.

    Args:
        clock: of the device.
        calls: by name.
        allowance_s: seconds for all of them; ``min_rounds`` are done in any case.
        min_rounds: least rounds that are read, at least 2.
        max_rounds: most rounds that are read.
        on_round: called before each round.

    Returns:
        Readings in seconds by name, and what calls raised that are out of the game for it. The first round of a call that has
        to be repeated only tells how often.
    """
    names, begun = list(calls), time.perf_counter()
    found: dict[str, list[float]] = {name: [] for name in names}
    repeats, most = dict.fromkeys(names, 1), dict.fromkeys(names, max_rounds)
    failures: dict[str, Exception] = {}
    once: dict[str, float] = {}
    on_round()
    for name in names:
        try:
            clock.seconds(calls[name])
        except Exception as error:
            failures[name] = error
    for round_number in range(max_rounds):
        if round_number >= min_rounds and time.perf_counter() - begun > allowance_s:
            break
        on_round()
        for place in range(len(names)):
            name = names[(place + round_number) % len(names)]
            if name in failures or len(found[name]) >= most[name]:
                continue
            try:
                reading = clock.seconds(calls[name], repeats=repeats[name])
            except Exception as error:
                failures[name] = error
                continue
            if round_number == 0:
                once[name] = reading
            if round_number == 0 and reading < _SHORT_S:
                repeats[name] = _repeats(reading)
            else:
                found[name].append(reading)
        if round_number == 0:
            slow = _SLOW_RATIO * min(once.values(), default=0.0)
            most |= {name: _SLOW_READINGS for name, reading in once.items() if reading > slow}
    return {name: readings for name, readings in found.items() if name not in failures}, failures


def _repeats(seconds: float) -> int:
    return max(1, min(_MAX_REPEATS, math.ceil(_SHORT_S / max(seconds, 1e-9))))


def quantiles(readings: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, in milliseconds."""
    cuts = statistics.quantiles(readings, n=10, method="inclusive") if len(readings) > 1 else readings * 9
    return {"p50_ms": 1e3 * statistics.median(readings), "p20_ms": 1e3 * cuts[1], "p80_ms": 1e3 * cuts[7]}


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that a call holds beyond what was there before it, results included; ``None`` where nothing can tell.

    On a GPU by PyTorch's allocator; on Linux CPUs by the process's peak resident size, which the kernel resets on request.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return None
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


@dataclass(frozen=True)
class Ceilings:
    """What the device does at most, measured."""

    gemm_flops: dict[str, float]
    """FLOP/s of a large square matrix product, by type."""
    copy_bytes_per_s: float
    """Bytes read plus bytes written per second by a large copy."""


def ceilings(clock: Clock, device: torch.device, *, small: bool = False) -> Ceilings:
    """Measures both; seconds on a CPU, less on a GPU."""
    cuda = device.type == "cuda"
    size, elements = (256, 2**20) if small else (8192, 2**28) if cuda else (2048, 2**26)
    rates = {}
    for dtype in (torch.bfloat16, torch.float32) if cuda else (torch.float32,):
        one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(one)
        rates[str(dtype).removeprefix("torch.")] = (
            2 * size**3 / _best(clock, lambda a=one, b=other, c=out: torch.mm(a, b, out=c))
        )
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    return Ceilings(rates, 2 * source.nbytes / _best(clock, lambda: target.copy_(source)))


def _best(clock: Clock, call: Callable[[], object]) -> float:
    call()
    return statistics.median(clock.seconds(call) for _ in range(7))
