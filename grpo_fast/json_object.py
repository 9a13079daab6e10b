"""Settings that are objects: a dict in Python, a table in TOML, JSON on the command line."""

from __future__ import annotations

import json
import math
import tomllib
from datetime import date, time
from typing import Annotated, Any

import tomli_w
from pydantic import BeforeValidator


def read_object(value: Any) -> Any:
    """An object as TOML would give it back, so that a run can be resumed with the same.

    Args:
        value: a dict, or its JSON.

    Raises:
        ValueError: text that is no JSON; values that TOML has no form for, as null, or JSON has none for, as dates; or a number
            that is not finite.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"""is no JSON object such as '{{"name": true}}' ({error})""") from None
    if not isinstance(value, dict):
        return value
    try:
        found = tomllib.loads(tomli_w.dumps(value))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"holds what a run's TOML cannot ({error}); take text, numbers, switches, lists and objects") from None

    _check_values(found)
    return found


def _check_values(value: Any) -> None:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            _check_values(each)
    elif isinstance(value, date | time):
        raise ValueError(  # noqa: TRY004 (pydantic tells ValueError alone)
            f'holds the date or time {value}, for which JSON has no form; put it in quotes: "{value}"'
        )
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"holds {value}; give a finite number, or text")


JsonObject = Annotated[dict[str, Any], BeforeValidator(read_object)]
"""A field's type: an object of plain values, by name."""
