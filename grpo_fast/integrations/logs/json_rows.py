"""JSON as rows of numbers: a trainer's state, lists of rows, columns of values, and one object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

from grpo_fast.integrations.logs.log_columns import underscored
from grpo_fast.integrations.logs.raw_log import SEED_COLUMNS, Names, RawLog, RowWords, counted

_NOT_NUMBERS = ("nan", "null", "none", "-nan")
_POINT = 3
_STEP_OF_ALL = "global_step/max_steps"
"""ms-swift's column of both: "5/400"."""


def read_json(text: str, names: Names) -> RawLog | None:
    """Rows of one JSON document; None if the text is not JSON or holds no rows."""
    if text.lstrip()[:1] not in {"{", "["}:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return _state(found, names) if isinstance(found, dict) else _list(found, names)


def _state(found: dict[str, Any], names: Names) -> RawLog | None:
    """A trainer's state, or columns of values side by side."""
    if isinstance(found.get("log_history"), list):
        limit = found.get("max_steps")
        planned = limit if isinstance(limit, int) and limit > 0 else None
        return RawLog(numbers_of(found["log_history"], names), "transformers trainer_state.json", planned)
    columns = {name: list(_values(column)) for name, column in found.items() if isinstance(column, (list, dict))}
    if not columns or len(columns) < len(found) or len({len(column) for column in columns.values()}) > 1:
        return None
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return _with_words(numbers_of(rows, names), "JSON columns", rows)


def _list(found: list[Any], names: Names) -> RawLog:
    if found and all(isinstance(row, list) and len(row) == _POINT for row in found):
        points = [dict(zip(("wall_time", "step", "value"), row, strict=True)) for row in found]
        return RawLog(numbers_of(points, names), "TensorBoard JSON export", reward_column="value")
    return _with_words(numbers_of(found, names), "JSON list of rows", found)


def _with_words(rows: list[dict[str, float]], source: str, found: list[Any]) -> RawLog:
    """Rows with the words that tell them apart, where the first has such columns."""
    mappings = [row for row in found if isinstance(row, dict)]
    words = _words_like(mappings[0] if mappings else {})
    for row in mappings:
        words.add(_word_in(row))
    return RawLog(rows, source, _planned(rows), runs=words.runs, splits=words.splits)


def read_json_lines(text: str, names: Names) -> RawLog | None:
    """Rows of one JSON object a line; other lines are left out and reported, except a half-written last one."""
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    if sum(line.lstrip().startswith("{") for line in lines) <= len(lines) / 2:
        return None
    rows: list[dict[str, float]] = []
    words = _words_like({})
    bad, verl = 0, True
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if isinstance(found, dict):
            words = words if rows else _words_like(found)
            row: dict[str, float] = {}
            _flatten(found, "", row, names=names)
            rows.append(row)
            words.add(_word_in(found))
            verl = verl and isinstance(found.get("data"), dict)
        elif number < len(lines):
            bad += 1
    if len(rows) <= bad:
        return None
    notes = [f"{bad} of {counted(len(lines), 'line', 'is|are')} no JSON objects and were left out"] if bad else []
    source = "verl JSON lines" if verl else "JSON lines"
    return RawLog(rows, source, _planned(rows), notes=notes, runs=words.runs, splits=words.splits)


def _values(column: Any) -> Iterable[Any]:
    return column.values() if isinstance(column, dict) else column


def _words_like(first: dict[str, Any]) -> RowWords[str]:
    """Columns as in the first row: names whose value is a word, or a whole number for a seed."""

    def find(known: tuple[str, ...]) -> str | None:
        kind = int if known is SEED_COLUMNS else str
        return next((name for name, value in first.items() if underscored(name) in known and isinstance(value, kind)), None)

    return RowWords(find)


def _word_in(row: dict[str, Any]) -> Callable[[str], str | None]:
    return lambda column: str(row[column]) if column in row else None


def _planned(rows: list[dict[str, float]]) -> int | None:
    """Planned steps, where the rows tell them beside their own; taken out of them."""
    told = [row.pop(_STEP_OF_ALL) for row in rows if _STEP_OF_ALL in row]
    return int(told[-1]) if told and told[-1] > 0 else None


def number(value: Any) -> float:
    """A JSON value as a number; NaN where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def numbers_of(objects: Iterable[Any], names: Names) -> list[dict[str, float]]:
    """JSON objects as rows; nested names are joined by "/", but those under "data", which are verl's own row.

    null and the word NaN become NaN; what is neither that nor a number is left out.
    """
    rows: list[dict[str, float]] = []
    for item in objects:
        if isinstance(item, dict):
            row: dict[str, float] = {}
            _flatten(item, "", row, names=names)
            rows.append(row)
    return rows


def _flatten(item: dict[str, Any], prefix: str, row: dict[str, float], *, names: Names) -> None:
    for name, value in item.items():
        whole = f"{prefix}{name}" if prefix else name
        if isinstance(value, float):
            if names.keeps(whole):
                row[whole] = value
        elif isinstance(value, dict):
            _flatten(value, "" if whole == "data" else f"{whole}/", row, names=names)
        elif whole == _STEP_OF_ALL and isinstance(value, str):
            step, _, planned = value.partition("/")
            row["global_step"], row[_STEP_OF_ALL] = number(step), number(planned)
            names.keeps("global_step")
        elif not (isinstance(value, (list, bool)) or (isinstance(value, str) and _is_text(value))) and names.keeps(whole):
            row[whole] = number(value)


def _is_text(value: str) -> bool:
    return math.isnan(number(value)) and value.strip().lower() not in _NOT_NUMBERS
