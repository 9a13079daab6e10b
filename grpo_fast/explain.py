"""Turns pydantic's errors into sentences that name key, value and fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from grpo_fast.trl_names import HERE, NOT_HERE, here, value_here

_UNITS = {"_hours": "hours", "_s": "seconds", "_kwh": "kWh", "_gib": "GiB"}


def explain(item: Any, *, known: Iterable[str]) -> str:
    """One of pydantic's errors as a sentence.

    Args:
        item: one element of ``ValidationError.errors()``.
        known: names of all fields; for an unknown key the nearest one is suggested.
    """
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        if told := here(key):
            return f"unknown configuration key {key!r}{told}"
        if isinstance(item["input"], dict):
            return f"unknown configuration key {key!r}: settings stand at the top of the file, in no table [{key}]"
        near = difflib.get_close_matches(key, list(known), n=1)
        return f"unknown configuration key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (got {item['input']!r}){_hint(item)}" if key else message


def meant(part: str, *, parts: Iterable[str], settings: Iterable[str]) -> str:
    """Suggests the intended name for an argument that the trainer does not have.

    Args:
        part: its name, as given.
        parts: all arguments that the trainer has.
        settings: names of the configuration's fields.

    Returns:
        A sentence with a trailing space; empty if nothing is similar.
    """
    if part in HERE:
        return f"it is a TRL name, which here corresponds to {HERE[part]}. "
    if part in NOT_HERE:
        return f"it is a TRL name; leave it out, it has no counterpart: {NOT_HERE[part]}. "
    if part in settings:
        return f"it is a setting, Config({part}=...). "
    near = difflib.get_close_matches(part, list(parts), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def _hint(item: Any) -> str:
    """Suggests the intended form of a malformed value."""
    given, field = item["input"], str(item["loc"][0])
    if told := value_here(field, given):
        return f"; {told}"
    if given is None and len(item["loc"]) == 1:
        return "; leave it out for the default"
    if not isinstance(given, str):
        return ""
    if item["type"] == "literal_error":
        near = difflib.get_close_matches(
            given.lower(), item["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        )
        if near:
            return f"; did you mean {near[0]!r}?"
    if len(item["loc"]) > 1 and "," in given:
        return "; separate several values by spaces"
    unit = next((unit for ending, unit in _UNITS.items() if field.endswith(ending)), None)
    return f"; give a plain number of {unit}" if unit is not None and item["type"] == "float_parsing" else ""
