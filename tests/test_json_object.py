from __future__ import annotations

from datetime import date, time
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from grpo_fast.json_object import JsonObject, read_object


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"a": False, "b": (1, 2), "c": {"d": ["x"]}}, {"a": False, "b": [1, 2], "c": {"d": ["x"]}}),
        ('{"a": false, "b": [1, 2.5], "c": {"d e": "x"}}', {"a": False, "b": [1, 2.5], "c": {"d e": "x"}}),
    ],
)
def test_an_object_is_what_toml_would_give_back(given: Any, expected: dict[str, Any]) -> None:
    assert TypeAdapter(JsonObject).validate_python(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("x", r"no JSON object such as '{\"name\": true}' \(Expecting value"),
        ("{'a': 1}", "no JSON object"),
        ({"a": None}, "holds what a run's TOML cannot .*NoneType"),
        ('{"a": [null]}', "holds what a run's TOML cannot"),
        ({"a": object()}, "holds what a run's TOML cannot"),
        ({1: 2}, "holds what a run's TOML cannot"),
        (
            {"a": date(2024, 7, 26)},
            'holds the date or time 2024-07-26, for which JSON has no form; put it in quotes: "2024-07-26"',
        ),
        ({"a": [{"b": time(7, 30)}]}, 'put it in quotes: "07:30:00"'),
        ('{"a": NaN}', "holds nan; give a finite number, or text"),
        ({"a": {"b": [1.0, float("inf")]}}, "holds inf; give a finite number"),
    ],
)
def test_what_could_not_be_written_into_a_run_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_object(given)


@pytest.mark.parametrize("given", ["[1]", 3, [1]])
def test_what_is_no_object_is_refused(given: Any) -> None:
    with pytest.raises(ValidationError, match="valid dictionary"):
        TypeAdapter(JsonObject).validate_python(given)
