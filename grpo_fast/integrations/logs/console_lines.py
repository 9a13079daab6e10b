"""Rows of numbers out of what trainers print.

verl prints ``step:12 - critic/rewards/mean:0.31 - ...``, transformers and TRL a Python dict a log, OpenRLHF
``Global step 12: {...}`` or ``reward=0.31`` behind a progress bar; workers' prefixes, colours and other bars stand around them.
"""

from __future__ import annotations

import re

from grpo_fast.integrations.logs.raw_log import Names, RawLog, counted

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_VALUE = r"(?:np\.\w+\(|tensor\()?['\"]?(?P<value>[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+|nan|inf)|None|null)\b"
_VERL = re.compile(r"(?:^|[\s\])])step:\s*(?P<step>\d+) - (?P<rest>.+)$")
_NUMBER = re.compile(rf"\s*{_VALUE}", re.IGNORECASE)
_DICT = re.compile(r"\{(?P<inside>.*['\"][^'\"]+['\"]\s*:.*)\}")
_PAIR = re.compile(rf"['\"](?P<name>[^'\"]+)['\"]\s*:\s*{_VALUE}", re.IGNORECASE)
_STEP_BEFORE = re.compile(r"\b(?:global[ _])?(?:step|iteration|iter)s?\W{0,3}(?P<step>\d+)\W*$", re.IGNORECASE)
_TOTAL = re.compile(r"total[_ ]training[_ ]steps['\"]?\s*[:=]\s*(?P<total>\d+)", re.IGNORECASE)
_BAR = re.compile(r"Training Progress:.*?\|\s*\d+/(?P<total>\d+)\s*\[")
_POSTFIX = re.compile(r"\|\s*(?P<count>\d+)/(?P<total>\d+)\s*\[(?P<inside>[^\[\]]*, [\w./ -]+=[^\[\]]*)\]")

_FIRST = {*"0123456789+-.nNitT"}  # of a number, nan, None, inf, np.float64(...) and tensor(...)

Row = dict[str, float]


def read_console(text: str, names: Names) -> RawLog | None:
    """The rows of a console log; None where no line looks like one.

    A file that holds verl's lines is read for those alone, and progress bars are read where there is nothing better: dicts that
    are printed beside them are configurations.
    """
    lines = text.replace("\r", "\n").splitlines()
    verl: list[Row] = []
    dicts: list[Row] = []
    bars: list[tuple[int, int, Row]] = []
    total: int | None = None
    for line in lines:
        if "step:" in line and (found := _VERL.search(_clean(line))):
            row = _parts(found["rest"], names)
            if row is not None:
                verl.append({"step": float(found["step"])} | row)
        elif "{" in line and (found := _DICT.search(_clean(line))):
            pairs = {pair["name"]: pair["value"] for pair in _PAIR.finditer(found["inside"])}
            if pairs:
                before = _STEP_BEFORE.search(_clean(line)[: found.start()])
                row = {name: _float(value) for name, value in pairs.items() if names.keeps(name)}
                dicts.append(({"step": float(before["step"])} if before else {}) | row)
        elif "=" in line and not verl and not dicts and (found := _POSTFIX.search(_clean(line))):
            bars.append((int(found["count"]), int(found["total"]), _postfix(found["inside"], names)))
        total = _planned(line) or total
    names.keeps("step")
    if verl:
        return RawLog(verl, "verl console log", total)
    if dicts:
        return RawLog(dicts, "console log of Python dicts", total)
    return _bars(bars) if bars else None


def _clean(line: str) -> str:
    return (_COLOUR.sub("", line) if "\x1b" in line else line).strip()


def _parts(text: str, names: Names) -> Row | None:
    """The ``name:value`` between verl's dashes; None where there is not one."""
    row: Row = {}
    numbers = False
    for part in text.split(" - "):
        name, mark, value = part.strip().rpartition(":")
        if not mark or value.lstrip()[:1] not in _FIRST:
            continue
        numbers = True
        if names.keeps(name) and (found := _NUMBER.match(value)):
            row[name] = _float(found["value"])
    return row if numbers else None


def _postfix(text: str, names: Names) -> Row:
    """A progress bar's ``name=value`` between commas."""
    row: Row = {}
    for part in text.split(", "):
        name, mark, value = part.strip().partition("=")
        if mark and (found := _NUMBER.match(value)) and names.keeps(name):
            row[name] = _float(found["value"])
    return row


def _bars(bars: list[tuple[int, int, Row]]) -> RawLog:
    """Rows of progress bars. A bar is drawn many times at one count, and a new one may begin at 0 for every epoch."""
    rows: list[Row] = []
    before = begun = last = 0
    for count, _, row in bars:
        if count < last:
            before, begun = before + last, begun + 1
        last = count
        rows.append({"step": float(before + count)} | row)
    notes = ["steps are counted by a progress bar"]
    if begun:
        notes.append(counted(begun, "time", "the bar began anew; its counts are added up"))
    return RawLog(rows, "progress bars", None if begun else bars[-1][1], notes=notes)


def _planned(line: str) -> int | None:
    """Steps of the whole run, where the line or its progress bar tells them."""
    if "otal" not in line and "Progress" not in line:
        return None
    found = _TOTAL.search(line) or _BAR.search(line)
    return int(found["total"]) or None if found else None


def _float(text: str) -> float:
    return float("nan") if text.lower() in {"none", "null"} else float(text)
