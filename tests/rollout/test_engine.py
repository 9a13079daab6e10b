from __future__ import annotations

import pytest

from grpo_fast.rollout import RolloutEngine, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 1.0),
        ("min_p", -0.5),
        ("repetition_penalty", 0.0),
    ],
)
def test_refuses_a_value_out_of_range_and_names_field_and_value(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must .*{value}"):
        SamplingParams(**({"max_tokens": 8} | {field: value}))


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_p": 1.0, "top_k": 0, "min_p": 0.0}])
def test_whole_softmax_is_not_truncated(changes: dict[str, float]) -> None:
    assert not SamplingParams(max_tokens=1, **changes).truncates_support


@pytest.mark.parametrize("changes", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_each_filter_truncates(changes: dict[str, float]) -> None:
    assert SamplingParams(max_tokens=1, **changes).truncates_support


def test_an_object_without_the_methods_is_no_engine() -> None:
    assert not isinstance(object(), RolloutEngine)
