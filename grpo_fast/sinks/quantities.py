"""Numbers as people read them: metric prefixes, durations, shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def si(value: float, unit: str = "") -> str:
    """Three digits and a metric prefix: ``si(3.21e12, "FLOP")`` is ``3.21 TFLOP``; NaN is a dash."""
    if not math.isfinite(value):
        return "-"
    power = 0
    while abs(value) >= 999.5 and power < len(_PREFIXES) - 1:
        value /= 1000
        power += 1
    return f"{significant(value)} {_PREFIXES[power]}{unit}".rstrip()


def binary(num_bytes: float) -> str:
    """Bytes in GiB, or in MiB where they are few: ``binary(3 * 2**30)`` is ``3 GiB``."""
    return f"{significant(num_bytes / 2**30)} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def significant(value: float, digits: int = 3) -> str:
    """A number to a few significant digits, without an exponent between 0.0001 and a million; NaN is a dash."""
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -5 < size < 6:
        return f"{value:.{digits - 1}e}"
    text = f"{value:,.{max(0, digits - 1 - size)}f}"
    return text.rstrip("0").rstrip(".") if "." in text and float(text.replace(",", "")) == round(value) else text


def duration(seconds: float) -> str:
    """Seconds as ``0.84 s``, ``48 s``, ``6 min 05 s``, ``3 h 20 min`` or ``2 d 4 h``; NaN is a dash."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 9.95:
        return f"{significant(seconds, 2)} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def percent(share: float) -> str:
    """A share in [0, 1] as per cent: one digit more where it is small or nearly whole; NaN is a dash."""
    if not math.isfinite(share):
        return "-"
    value = 100 * share
    edge = 0 < value < 9.95 or 99 < value < 100
    return f"{value:.1f} %" if edge and f"{value:.1f}" not in {"0.0", "100.0"} else f"{value:.0f} %"


COST_WORDS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "tokens": ("tokens", si),
    "flops": ("model FLOPs", lambda value: si(value, "FLOP")),
    "wall_hours": ("wall-clock time", lambda hours: duration(3600 * hours)),
    "device_hours": ("device time", lambda hours: duration(3600 * hours)),
    "money": ("money", significant),
    "energy_kwh": ("energy, kWh", significant),
}
"""What a plan says that a run costs: each cost in words, and how its numbers are written."""
