"""Rows of numbers out of what trainers print.

verl prints ``step:12 - critic/rewards/mean:0.31 - ...``, transformers and TRL a Python dict a log, OpenRLHF
``Global step 12: {...}``; workers' prefixes, colours and progress bars stand around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_VALUE = r"(?:np\.\w+\(|tensor\()?['\"]?(?P<value>[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+|nan|inf)|None|null)\b"
_VERL = re.compile(r"(?:^|\s)step:\s*(?P<step>\d+) - (?P<rest>.+)$")
_PART = re.compile(rf"^(?P<name>\S.*?):\s*{_VALUE}", re.IGNORECASE)
_DICT = re.compile(r"\{(?P<inside>.*['\"][^'\"]+['\"]\s*:.*)\}")
_PAIR = re.compile(rf"['\"](?P<name>[^'\"]+)['\"]\s*:\s*{_VALUE}", re.IGNORECASE)
_STEP_BEFORE = re.compile(r"\b(?:global[ _])?(?:step|iteration|iter)s?\W{0,3}(?P<step>\d+)\W*$", re.IGNORECASE)
_TOTAL = re.compile(r"total[_ ]training[_ ]steps['\"]?\s*[:=]\s*(?P<total>\d+)", re.IGNORECASE)
_BAR = re.compile(r"Training Progress:.*?\|\s*\d+/(?P<total>\d+)\s*\[")


def read_console(lines: Iterable[str]) -> tuple[list[dict[str, float]], str]:
    """Rows and the source in words; no rows where no line looks like a log of numbers.

    A file that holds verl's lines is read for those alone: dicts that it prints beside them are configurations.
    """
    verl: list[dict[str, float]] = []
    dicts: list[dict[str, float]] = []
    for line in lines:
        clean = _COLOUR.sub("", line).strip()
        if found := _VERL.search(clean):
            parts = [part for text in found["rest"].split(" - ") if (part := _PART.match(text.strip()))]
            if parts:
                verl.append({"step": float(found["step"])} | {part["name"]: _float(part["value"]) for part in parts})
        elif found := _DICT.search(clean):
            row = {pair["name"]: _float(pair["value"]) for pair in _PAIR.finditer(found["inside"])}
            before = _STEP_BEFORE.search(clean[: found.start()])
            if row:
                dicts.append(({"step": float(before["step"])} if before else {}) | row)
    return (verl, "verl console log") if verl else (dicts, "console log of Python dicts")


def planned_steps(lines: Iterable[str]) -> int | None:
    """Steps of the whole run, where the log or its progress bar tells them; the last word wins."""
    total = None
    for line in lines:
        for found in (_TOTAL.search(line), _BAR.search(line)):
            if found and int(found["total"]) > 0:
                total = int(found["total"])
    return total


def _float(text: str) -> float:
    return float("nan") if text.lower() in {"none", "null"} else float(text)
