"""Rows of numbers out of what trainers print.

verl prints ``step:12 - critic/rewards/mean:0.31 - ...``, transformers and TRL a Python dict a log, OpenRLHF
``Global step 12: {...}`` or ``reward=0.31`` behind a progress bar, slime ``rollout 12: {...}``, ms-swift a dict that tells its
step; workers' prefixes, colours and other bars stand around them. TRL's dicts tell no step, but the bar beside them does.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

from grpo_fast.integrations.logs.log_columns import STEPS
from grpo_fast.integrations.logs.raw_log import Names, RawLog, counted

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_VALUE = r"(?:np\.\w+\(|tensor\()?['\"]?(?P<value>[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+|nan|inf)|None|null)\b"
_VERL = re.compile(r"(?:^|[\s\])])step:\s*(?P<step>\d+) - (?P<rest>.+)$")
_NUMBER = re.compile(rf"\s*{_VALUE}", re.IGNORECASE)
_DICT = re.compile(r"\{(?P<inside>.*['\"][^'\"]+['\"]\s*:.*)\}")
_PAIR = re.compile(rf"['\"](?P<name>[^'\"]+)['\"]\s*:\s*{_VALUE}", re.IGNORECASE)
_STEP_BEFORE = re.compile(r"\b(?:global[ _])?(?:step|iteration|iter|rollout)s?\W{0,3}(?P<step>\d+)\W*$", re.IGNORECASE)
_STEP_INSIDE = re.compile(r"['\"]global_step/max_steps['\"]\s*:\s*['\"](?P<step>\d+)/(?P<total>\d+)")
_TOTAL = re.compile(r"total[_ ](?:training|optimization)[_ ]steps['\"]?\s*[:=]\s*(?P<total>\d[\d,]*)", re.IGNORECASE)
_BAR = re.compile(r"Training Progress:.*?\|\s*\d+/(?P<total>\d+)\s*\[")
_BARE_BAR = re.compile(r"(?:^|\])\s*\d+%\|[^|]*\|\s*(?P<count>\d+)/(?P<total>\d+)\s*\[")
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
    beside = _BarsBeside()
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
                before = _clean(line)[: found.start()]
                told = _STEP_INSIDE.search(found["inside"]) or _STEP_BEFORE.search(before)
                row = {name: _float(value) for name, value in pairs.items() if names.keeps(name)}
                dicts.append(({"step": float(told["step"])} if told else {}) | row)
                total = int(told["total"]) if told and "total" in told.groupdict() else total
                beside.pass_by(before)
                beside.note(dicts[-1])
        elif "=" in line and not verl and not dicts and (found := _POSTFIX.search(_clean(line))):
            bars.append((int(found["count"]), int(found["total"]), _postfix(found["inside"], names)))
        elif "%|" in line:
            beside.pass_by(line)
        total = _planned(line) or total
    names.keeps("step")
    if verl:
        return RawLog(verl, "verl console log", total)
    if dicts:
        notes: list[str] = []
        total = beside.number(notes) or total
        return RawLog(dicts, "console log of Python dicts", total, notes=notes)
    return _bars(bars) if bars else None


class _BarsBeside:
    """Progress bars without a name, as transformers draws one of its steps, between rows that tell no step."""

    def __init__(self) -> None:
        self._at: dict[int, int] = {}
        self._moves: Counter[int] = Counter()
        self._rows: list[tuple[Row, dict[int, int]]] = []

    def pass_by(self, line: str) -> None:
        """Takes what the last bar on a line shows."""
        for found in _BARE_BAR.finditer(line):
            count, total = int(found["count"]), int(found["total"])
            self._moves[total] += count != self._at.get(total, 0)
            self._at[total] = count

    def note(self, row: Row) -> None:
        """Takes a row; an empty one, of which no column is read, needs no step."""
        if row:
            self._rows.append((row, dict(self._at)))

    def number(self, notes: list[str]) -> int | None:
        """Gives the rows the steps of the bar that goes on from row to row, and says how many steps it has.

        Where the rows were written late, several at once, none does. Then they are taken as evenly spread over the steps that
        the bar which moved most has done, if that leaves less than one more row's steps over.
        """
        size = len(self._rows)
        if not size or not self._at or any(name in STEPS for row, _ in self._rows for name in row):
            return None
        for total in sorted(self._at, reverse=True):
            counts = [at.get(total, 0) for _, at in self._rows]
            if counts[0] > 0 and all(before < after for before, after in pairwise(counts)):
                notes.append(f"the rows contain no step; the steps of the progress bar between them, of {total}, are used")
                return self._numbered(counts, total)
        total, moves = self._moves.most_common(1)[0]
        done = self._at[total]
        stride = done // size
        if moves < size or stride < 1 or done - stride * size >= stride:
            return None
        notes.append(f"the rows contain no step; {size} rows on {done} steps of a progress bar are taken as one every {stride}")
        return self._numbered([stride * place for place in range(1, size + 1)], total)

    def _numbered(self, steps: list[int], total: int) -> int:
        for (row, _), step in zip(self._rows, steps, strict=True):
            row["step"] = float(step)
        return total


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
    notes = ["steps are read from a progress bar"]
    if begun:
        notes.append(counted(begun, "time", "the bar started again; its counts are added up"))
    return RawLog(rows, "progress bars", None if begun else bars[-1][1], notes=notes)


def _planned(line: str) -> int | None:
    """Steps of the whole run, where the line or its progress bar tells them."""
    if "otal" not in line and "Progress" not in line:
        return None
    found = _TOTAL.search(line) or _BAR.search(line)
    return int(found["total"].replace(",", "")) or None if found else None


def _float(text: str) -> float:
    return float("nan") if text.lower() in {"none", "null"} else float(text)
