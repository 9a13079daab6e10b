"""A log of any known format as rows of numbers, in the order in which they were written."""

from __future__ import annotations

import codecs
import gzip
import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_fast.integrations.logs.console_lines import read_console
from grpo_fast.integrations.logs.event_files import has_events, read_events
from grpo_fast.integrations.logs.json_rows import read_json, read_json_lines
from grpo_fast.integrations.logs.raw_log import LogError, Names, RawLog, RunSettings, counted
from grpo_fast.integrations.logs.text_tables import is_header_alone, read_table
from grpo_fast.run_dir import CONFIG_FILE
from grpo_fast.sinks.jsonl import FACTS, METRICS, TRAINER_STATE

LOGS = (METRICS, TRAINER_STATE)
"""Files that make a directory a run, the better one first."""
_CHECKPOINTS = "checkpoint-*"
_HISTORY = "wandb-history.jsonl"
_OUTPUT = "output.log"
OWN_RUN = "grpo_fast run"
_SETTINGS = {
    "num_prompts": "prompts_per_step",
    "num_generations": "num_generations",
    "reward_range": "reward_range",
    "epsilon": "forecast_epsilon",
    "confidence": "forecast_confidence",
    "patience": "forecast_patience",
    "min_steps": "forecast_min_steps",
    "reward_value": "forecast_reward_value",
    "prior": "forecast_prior",
}
_TEXT_SAMPLE = 4096
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_WHITE = "\t\n\r\f\b\x1b"


def read_rows(path: Path, names: Names) -> RawLog:
    """Reads a file, a run's directory or a directory of TensorBoard events.

    Raises:
        LogError: there is no such path, or its content is of no known format.
    """
    if path.is_dir():
        return _directory(path, names)
    if not path.is_file():
        raise LogError(f"{path} does not exist; give a log file or the directory of a run")
    if ".tfevents." in path.name:
        return _events(path, names)
    if path.suffix == ".wandb":
        raise LogError(f"{path} is W&B's own binary format; export the run's history as CSV, or give its output.log")
    notes: list[str] = []
    text = _text(path, notes)
    if not text.strip():
        raise LogError(f"{path} is empty")
    found = read_json(text, names) or read_json_lines(text, names)
    if found is None and path.suffix == ".json":
        raise LogError(f"{path} is not complete JSON with rows; was it cut off?")
    found = found or read_console(text, names) or read_table(text, names)
    if found is None:
        raise LogError(_unknown(path, text))
    found.notes[:0] = notes
    if path.name == METRICS and (path.parent / CONFIG_FILE).is_file():
        planned, settings = _configured(path.parent / CONFIG_FILE, found.notes)
        return replace(found, source=OWN_RUN, max_steps=planned, reward_column="reward", settings=settings)
    return found


def _text(path: Path, notes: list[str]) -> str:
    """A file's text, whatever the bytes between its lines are."""
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise LogError(f"{path} cannot be unpacked: {error}") from error
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    zeros = 0 if encoding == "utf-16" else data.count(b"\0")
    if zeros:  # a file system may leave a block of zeros where the machine died
        data = data.replace(b"\0", b"")
    text = data.decode(encoding, errors="replace").removeprefix("\ufeff")
    sample = text[:_TEXT_SAMPLE]
    odd = sum(char == "\ufffd" or (char < " " and char not in _WHITE) for char in sample)
    if odd > 0.15 * len(sample) or zeros > len(data):
        raise LogError(f"{path} is a binary file; logs are JSON, JSON lines, CSV, console text or TensorBoard events")
    if zeros:
        notes.append(counted(zeros, "zero byte", "was|were left out"))
    if "\ufffd" in text:
        notes.append("some bytes are not UTF-8; they were skipped, and names of columns may be damaged")
    return text


def _unknown(path: Path, text: str) -> str:
    if is_header_alone(text):
        return f"{path} has a header but no rows"
    return (
        f"{path} has an unknown format; known are trainer_state.json, JSON lines, CSV with a header, verl and OpenRLHF "
        "console logs and TensorBoard event directories"
    )


def _directory(path: Path, names: Names) -> RawLog:
    for name in LOGS:
        if (path / name).is_file():
            return read_rows(path / name, names)
    if has_events(path):
        return _events(path, names)
    states = [place for place in path.glob(f"{_CHECKPOINTS}/{TRAINER_STATE}") if place.parent.name.split("-")[-1].isdigit()]
    if states:
        return read_rows(max(states, key=lambda place: int(place.parent.name.split("-")[-1])), names)
    for name in (_HISTORY, _OUTPUT):
        if (path / name).is_file():
            return read_rows(path / name, names)
    inner = sorted({str(found.parent) for name in (*LOGS, _HISTORY, "*.tfevents.*") for found in path.rglob(name)})
    if not inner:
        raise LogError(f"{path} contains no log: no {METRICS}, no {TRAINER_STATE}, no TensorBoard events; name the file itself")
    if len(inner) == 1:
        return read_rows(Path(inner[0]), names)
    raise LogError(f"{path} contains {len(inner)} runs; name one of them: {', '.join(inner[:8])}{', ...' if inner[8:] else ''}")


def _events(path: Path, names: Names) -> RawLog:
    try:
        rows = read_events(path)
    except ModuleNotFoundError as error:
        raise LogError(f"reading TensorBoard events needs {error.name}; `pip install 'grpo-fast[tracking]'`") from error
    for name in dict.fromkeys(name for row in rows for name in row):
        names.keeps(name)
    return RawLog(rows, "TensorBoard events")


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
    facts = _facts(path.parent / FACTS, notes)
    return config.get("max_steps"), RunSettings(warmup_steps=_warmup(config), facts=facts, **values)


def _warmup(config: dict[str, Any]) -> int:
    """Steps of warm-up, as the configuration counts them: below 1 they are a share of all steps."""
    steps = config.get("warmup_steps", 0)
    return math.ceil(steps * config["max_steps"]) if 0 < steps < 1 and "max_steps" in config else int(steps)


def _facts(path: Path, notes: list[str]) -> dict[str, Any]:
    """Facts that a run's forecasts had before the first step; empty if it wrote no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    notes.append(f"{path.name} cannot be read; the forecast does without the facts in it")
    return {}
