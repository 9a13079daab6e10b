"""Settings that are objects: a dict in Python, a table in TOML, JSON on the command line."""

from __future__ import annotations

import json
import tomllib
from typing import Annotated, Any

import tomli_w
from pydantic import BeforeValidator


def read_object(value: Any) -> Any:
    """An object as TOML would give it back, so that a run can be resumed with the same.

    Args:
        value: a dict, or its JSON.

    Raises:
        ValueError: text that is no JSON, or values that TOML has no form for, as null.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"""is no JSON object such as '{{"name": true}}' ({error})""") from None
    if not isinstance(value, dict):
        return value
    try:
        return tomllib.loads(tomli_w.dumps(value))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"holds what a run's TOML cannot ({error}); take text, numbers, switches, lists and objects") from None


JsonObject = Annotated[dict[str, Any], BeforeValidator(read_object)]
"""A field's type: an object of plain values, by name."""
