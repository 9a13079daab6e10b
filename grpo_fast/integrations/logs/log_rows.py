"""A log of any known format as rows of numbers, in the order in which they were written."""

from __future__ import annotations

import csv
import io
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_fast.integrations.logs.console_lines import planned_steps, read_console
from grpo_fast.integrations.logs.event_files import has_events, read_events

_STATE = "trainer_state.json"
_METRICS = "metrics.jsonl"
_CONFIG = "config.toml"
_CHECKPOINTS = "checkpoint-*"
OWN_RUN = "grpo_fast run"
_SETTINGS = {
    "num_prompts": "prompts_per_step",
    "num_generations": "num_generations",
    "reward_range": "reward_range",
    "epsilon": "forecast_epsilon",
    "confidence": "forecast_confidence",
    "patience": "forecast_patience",
    "min_steps": "forecast_min_steps",
}
_TEXT_SAMPLE = 4096


class LogError(ValueError):
    """A file that holds no reward curve that could be read; the message says what was looked for."""


@dataclass(frozen=True)
class RunSettings:
    """What a run's own configuration says of its rewards and its stop; the defaults where the log has no configuration.

    Attributes:
        num_prompts: prompts a step.
        num_generations: completions per prompt.
        reward_range: least and greatest mean reward that is possible, where that is known.
        epsilon: gain that is not worth having; None where nothing says so.
        confidence: probability of so small a gain that stops the run.
        patience: forecasts in a row that must say so.
        min_steps: steps before which nothing stops the run.
    """

    num_prompts: int = 1
    num_generations: int = 1
    reward_range: tuple[float, float] | None = None
    epsilon: float | None = None
    confidence: float = 0.9
    patience: int = 3
    min_steps: int = 20


@dataclass(frozen=True)
class LogRows:
    """What a log holds before a column is chosen.

    Attributes:
        rows: numbers by column name, one mapping a logged step; NaN where the log says so.
        source: the format, in words.
        max_steps: planned steps, where the log tells them.
        reward_column: the column that the format itself names, where it does.
        notes: what could not be read.
        settings: what the run's configuration says.
    """

    rows: list[dict[str, float]]
    source: str
    max_steps: int | None = None
    reward_column: str | None = None
    notes: list[str] = field(default_factory=list)
    settings: RunSettings = RunSettings()


def read_rows(path: Path) -> LogRows:
    """Reads a file, a run's directory or a directory of TensorBoard events.

    Raises:
        LogError: there is no such path, or its content is of no known format.
    """
    if path.is_dir():
        return _directory(path)
    if not path.is_file():
        raise LogError(f"{path} does not exist; give a log file or the directory of a run")
    if ".tfevents." in path.name:
        return _events(path)
    if path.suffix == ".wandb":
        raise LogError(f"{path} is W&B's own binary format; export the run's history as CSV, or give its output.log")
    data = path.read_bytes()
    if b"\0" in data[:_TEXT_SAMPLE]:
        raise LogError(f"{path} is a binary file; logs are JSON, JSON lines, CSV, console text or TensorBoard events")
    text = data.decode("utf-8-sig", errors="replace")
    if not text.strip():
        raise LogError(f"{path} is empty")
    found = _json(text) or _json_lines(path, text) or _console(text) or _table(text)
    if found is None:
        raise LogError(
            f"{path} is of no known format; known are trainer_state.json, JSON lines, CSV with a header, verl and OpenRLHF "
            "console logs and TensorBoard event directories"
        )
    return found


def _directory(path: Path) -> LogRows:
    if (path / _METRICS).is_file():
        return read_rows(path / _METRICS)
    if (path / _STATE).is_file():
        return read_rows(path / _STATE)
    if has_events(path):
        return _events(path)
    states = [place for place in path.glob(f"{_CHECKPOINTS}/{_STATE}") if place.parent.name.split("-")[-1].isdigit()]
    if states:
        return read_rows(max(states, key=lambda place: int(place.parent.name.split("-")[-1])))
    inner = sorted({str(found.parent) for name in (_METRICS, _STATE, "*.tfevents.*") for found in path.rglob(name)})
    if not inner:
        raise LogError(f"{path} holds no log: no {_METRICS}, no {_STATE}, no TensorBoard events; name the file itself")
    if len(inner) == 1:
        return read_rows(Path(inner[0]))
    raise LogError(f"{path} holds {len(inner)} runs; name one of them: {', '.join(inner[:8])}{', ...' if inner[8:] else ''}")


def _events(path: Path) -> LogRows:
    try:
        return LogRows(read_events(path), "TensorBoard events")
    except ModuleNotFoundError as error:
        raise LogError(f"reading TensorBoard events needs {error.name}; `pip install grpo-fast[tracking]`") from error


def _json(text: str) -> LogRows | None:
    """One JSON document: a trainer's state or a list of rows."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if isinstance(found, dict) and isinstance(found.get("log_history"), list):
        limit = found.get("max_steps")
        planned = limit if isinstance(limit, int) and limit > 0 else None
        return LogRows(numbers_of(found["log_history"]), "transformers trainer_state.json", planned)
    if isinstance(found, list):
        return LogRows(numbers_of(found), "JSON list of rows")
    return None


def _json_lines(path: Path, text: str) -> LogRows | None:
    """One JSON object a line; a line that is none is left out and told, but for a half-written last one."""
    lines = [line for line in text.splitlines() if line.strip()]
    objects, bad = [], 0
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if isinstance(found, dict):
            objects.append(found)
        elif number < len(lines):
            bad += 1
    if len(objects) <= bad:
        return None
    notes = [f"{bad} of {len(lines)} lines are no JSON objects and were left out"] if bad else []
    if path.name == _METRICS and (path.parent / _CONFIG).is_file():
        planned, settings = _configured(path.parent / _CONFIG, notes)
        return LogRows(numbers_of(objects), OWN_RUN, planned, "reward", notes, settings)
    verl = all(isinstance(row.get("data"), dict) for row in objects)
    return LogRows(numbers_of(objects), "verl JSON lines" if verl else "JSON lines", notes=notes)


def _configured(path: Path, notes: list[str]) -> tuple[int | None, RunSettings]:
    """Planned steps and settings of a run of grpo_fast."""
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        notes.append(f"{path.name} cannot be read")
        return None, RunSettings()
    values = {name: config[key] for name, key in _SETTINGS.items() if key in config}
    if "reward_range" in values:
        values["reward_range"] = tuple(values["reward_range"])
    return config.get("max_steps"), RunSettings(**values)


def _console(text: str) -> LogRows | None:
    lines = text.replace("\r", "\n").splitlines()
    rows, source = read_console(lines)
    return LogRows(rows, source, planned_steps(lines)) if rows else None


def _table(text: str) -> LogRows | None:
    """CSV, with commas, semicolons or tabs."""
    first = text.lstrip().splitlines()[0]
    mark = max(",;\t", key=first.count)
    table = [row for row in csv.reader(io.StringIO(text), delimiter=mark) if any(cell.strip() for cell in row)]
    if len(table) < 2 or not any(math.isfinite(number(cell)) for row in table[1:] for cell in row):
        return None
    header = [cell.strip() for cell in table[0]]
    notes = []
    if all(math.isfinite(number(cell)) for cell in header):
        if len(header) > 2:
            return None
        header = ["step", "reward"][-len(header) :]
        notes.append(f"the file has no header; its columns are taken as {' and '.join(header)}")
        table.insert(0, header)
    wandb = any(name.endswith("__MAX") for name in header)
    rows = [
        {
            name: number(cell)
            for name, cell in zip(header, row, strict=False)
            if cell.strip() and (cell.strip().lower() in _NOT_NUMBERS or not math.isnan(number(cell)))
        }
        for row in table[1:]
    ]
    return LogRows(rows, "W&B CSV export" if wandb else "CSV", notes=notes)


_NOT_NUMBERS = ("nan", "null", "none", "-nan")


def number(value: Any) -> float:
    """A JSON or CSV value as a number; NaN where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def numbers_of(objects: Iterable[Any]) -> list[dict[str, float]]:
    """JSON objects as rows; nested names are joined by "/", but those under "data", which are verl's own row.

    null and the word NaN become NaN; what is neither that nor a number is left out.
    """
    rows: list[dict[str, float]] = []
    for item in objects:
        if isinstance(item, Mapping):
            row: dict[str, float] = {}
            _flatten(item, "", row)
            rows.append(row)
    return rows


def _flatten(item: Mapping[str, Any], prefix: str, row: dict[str, float]) -> None:
    for name, value in item.items():
        if isinstance(value, Mapping):
            _flatten(value, "" if name == "data" and not prefix else f"{prefix}{name}/", row)
        elif value is None or (isinstance(value, str) and value.strip().lower() in _NOT_NUMBERS):
            row[f"{prefix}{name}"] = math.nan
        elif isinstance(value, (int, float, str)) and not math.isnan(number(value)):
            row[f"{prefix}{name}"] = number(value)
        elif isinstance(value, float):
            row[f"{prefix}{name}"] = math.nan
