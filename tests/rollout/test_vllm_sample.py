from __future__ import annotations

import pytest

from grpo_fast.rollout import RolloutError, SamplingParams
from grpo_fast.rollout.vllm_sample import Sample, kept_tokens, num_likeliest, token_versions


def test_spans_become_one_version_a_token() -> None:
    assert token_versions([("3", 0, 2), ("11", 2, 3)]) == (3, 3, 11)
    assert token_versions([]) == ()


def test_a_version_that_no_sync_gave_is_none() -> None:
    assert token_versions([("default", 0, 2)]) == ()
    assert token_versions([("3", 0, 1), ("default", 1, 2)]) == ()


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({}, 0),
        ({"top_k": 20}, 46),
        ({"top_k": 20, "top_p": 0.9, "min_p": 0.1}, 46),
        ({"top_k": 80}, 100),
        ({"top_k": 20, "temperature": 0.0}, 0),
    ],
)
def test_more_are_asked_for_than_top_k_by_what_may_tie(cut: dict[str, float], expected: int) -> None:
    assert num_likeliest(SamplingParams(max_tokens=1, **cut), 100) == expected


def test_a_nucleus_alone_has_no_bound() -> None:
    with pytest.raises(ValueError, match=r"top_p=0.9, top_k=0, min_p=0: .*set top_k too \(top_k=20, or .* top_k=100\)"):
        num_likeliest(SamplingParams(max_tokens=1, top_p=0.9), 100)


def test_what_is_at_minus_infinity_was_not_kept() -> None:
    """A server says -9999 for it; the drawn token may stand beside the likeliest that were asked for."""
    told = ({4: -0.1, 9: -2.0, 3: float("-inf")}, {5: -0.7, 2: -0.7, 1: -9999.0})
    sample = Sample((9, 5), (-2.0, -0.7), "stop", (1, 1), told)
    assert kept_tokens(sample, asked=2, vocabulary=50).to_lists() == [[9, 4], [5, 2]]
    whole = Sample((1,), (-0.7,), "stop", (1,), ({0: -0.7, 1: -0.7},))
    assert kept_tokens(whole, asked=2, vocabulary=2).to_lists() == [[1, 0]]


def test_what_was_kept_and_not_told_ends_the_run() -> None:
    sample = Sample((9,), (-0.7,), "stop", (1,), ({9: -0.7, 2: -0.7},))
    with pytest.raises(RolloutError, match="vLLM kept more than 2 tokens beside 9, for ties with the last of top_k"):
        kept_tokens(sample, asked=2, vocabulary=50)
    with pytest.raises(RolloutError, match="vLLM told the likeliest of 0 of 1 tokens"):
        kept_tokens(sample._replace(likeliest=()), asked=2, vocabulary=50)
