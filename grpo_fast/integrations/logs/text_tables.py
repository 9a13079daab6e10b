"""Tables in plain text: commas, semicolons, tabs or blanks between cells, numbers as people and spreadsheets write them."""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from grpo_fast.integrations.logs.log_columns import underscored
from grpo_fast.integrations.logs.raw_log import Names, RawLog, RowWords, counted

_SAMPLE = 500
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?")
_POINTED_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(?:\.\d{3})+")
_DECIMAL_COMMA = re.compile(r"[-+]?(?:\d{1,3}(?:\.\d{3})+|\d*),\d+(?:[eE][-+]?\d+)?")
_MISSING = {"nan", "null", "none", "-nan", "n/a", "na", "inf", "-inf", "infinity", "-infinity"}
_TENSORBOARD = {"wall time", "step", "value"}


@dataclass
class _Cells:
    """Cells as numbers; remembers what it met on the way."""

    decimal_comma: bool
    percent: bool = False
    thousands: bool = False

    def number(self, cell: str) -> float:
        """NaN where a cell is no number."""
        if not self.decimal_comma:
            try:
                return float(cell)
            except ValueError:
                pass
        return self._written(cell.strip().replace("\u00a0", "").replace("\u202f", ""))

    def _written(self, cell: str) -> float:
        share = cell.endswith("%")
        bare = cell[:-1].rstrip() if share else cell
        if self.decimal_comma and _DECIMAL_COMMA.fullmatch(bare):
            bare = bare.replace(".", "").replace(",", ".")
        elif self.decimal_comma and _POINTED_THOUSANDS.fullmatch(bare):
            self.thousands, bare = True, bare.replace(".", "")
        elif _THOUSANDS.fullmatch(bare):
            self.thousands, bare = True, bare.replace(",", "")
        try:
            value = float(bare)
        except ValueError:
            return math.nan
        self.percent = self.percent or share
        return value / 100 if share else value


def read_table(text: str, names: Names) -> RawLog | None:
    """A table with or without a header; None where the text is none."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    split = _splitter([line for line in itertools.islice(lines, _SAMPLE) if line.strip()])
    if split is None:
        return None
    table = (row for row in split(lines) if any(row))
    header = [cell.strip() for cell in next(table, [])]
    sample = list(itertools.islice(table, _SAMPLE))
    cells = _Cells(decimal_comma=_has_decimal_commas(sample))
    notes: list[str] = []
    if header and all(math.isfinite(cells.number(cell)) for cell in header):
        sample.insert(0, header)
        header, told = _without_header(header)
        notes.append(told)
    if not header or not any(math.isfinite(cells.number(cell)) for row in sample for cell in row):
        return None
    header = _told_apart(header, notes)
    rows, words = _rows(itertools.chain(sample, table), header, cells, names=names)
    if cells.percent:
        notes.append("values with a percent sign are read as hundredths: 50 % is 0.5")
    if cells.decimal_comma:
        notes.append("numbers are read with a decimal comma")
    if cells.thousands:
        notes.append("thousands separators were removed from numbers")
    reward = next((name for name in header if name.lower() == "value"), None) if _is_tensorboard(header) else None
    return RawLog(rows, _source(header), reward_column=reward, notes=notes, runs=words.runs, splits=words.splits)


def is_header_alone(text: str) -> bool:
    """Whether a text is one line of names between marks."""
    line, _, rest = text.strip().partition("\n")
    return not rest and any(mark in line for mark in ",;\t")


def _rows(
    table: Iterator[list[str]], header: list[str], cells: _Cells, *, names: Names
) -> tuple[list[dict[str, float]], RowWords[int]]:
    """Rows of numbers, and the words that tell them apart."""
    read = [(place, name) for place, name in enumerate(header) if names.keeps(name)]

    def find(known: tuple[str, ...]) -> int | None:
        return next((place for place, name in enumerate(header) if underscored(name) in known), None)

    words: RowWords[int] = RowWords(find)
    rows: list[dict[str, float]] = []
    for line in table:
        row: dict[str, float] = {}
        for place, name in read:
            cell = line[place] if place < len(line) else ""
            if cell:
                value = cells.number(cell)
                if value == value or cell.strip().lower() in _MISSING:  # noqa: PLR0124 (not NaN, and fast)
                    row[name] = value
        rows.append(row)
        words.add(lambda column, line=line: line[column].strip() if column < len(line) else "")  # type: ignore[misc]
    return rows, words


def _splitter(sample: list[str]) -> Callable[[list[str]], Iterator[list[str]]] | None:
    """The function that cuts lines into cells, at the mark most frequent in the first line and found in nearly every line."""
    sample = [line for line in sample if not line.lstrip().startswith("#")] or sample
    for mark in sorted(",;\t", key=sample[0].count if sample else str, reverse=True):
        counts = [line.count(mark) for line in sample]
        if counts and counts[0] and sum(count > 0 for count in counts) > 0.8 * len(counts):
            return lambda lines, mark=mark: csv.reader(_data(lines), delimiter=mark, skipinitialspace=True)  # type: ignore[misc]
    widths = {len(line.split()) for line in sample}
    if len(sample) > 1 and len(widths) == 1:
        return lambda lines: (line.split() for line in _data(lines))
    return None


def _data(lines: list[str]) -> Iterator[str]:
    """Lines without comments; the first comment stays where it stands in for a header, as numpy writes it."""
    for number, line in enumerate(lines):
        if number == 0 or not line.startswith("#"):
            yield line.lstrip("# ") if number == 0 else line


def _has_decimal_commas(sample: list[list[str]]) -> bool:
    """Whether some cell can only have a decimal comma: 0,31 or 0,5 or 1.234,5, but not 1,234."""
    cells = (cell.strip().rstrip("%").rstrip() for row in sample for cell in row if "," in cell)
    return any(_DECIMAL_COMMA.fullmatch(cell) and not _THOUSANDS.fullmatch(cell) for cell in cells)


def _without_header(first: list[str]) -> tuple[list[str], str]:
    if len(first) > 2:
        return [], ""
    header = ["step", "reward"][-len(first) :]
    return header, f"the file has no header; its columns are taken as {' and '.join(header)}"


def _told_apart(header: list[str], notes: list[str]) -> list[str]:
    """Columns of one name get a number from the second on."""
    seen: dict[str, int] = {}
    result = []
    for name in header:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    twice = [name for name, count in seen.items() if count > 1 and name]
    if twice:
        notes.append(
            f"{counted(len(twice), 'column', 'occurs|occur')} more than once: {', '.join(twice[:5])}; the first is read"
        )
    return result


def _is_tensorboard(header: list[str]) -> bool:
    return {name.lower() for name in header} == _TENSORBOARD


def _source(header: list[str]) -> str:
    if _is_tensorboard(header):
        return "TensorBoard CSV export"
    return "W&B CSV export" if any(name.endswith("__MAX") for name in header) else "CSV"
