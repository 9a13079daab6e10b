from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from grpo_fast.kept_tokens import KeptTokens
from grpo_fast.rollout import SamplingParams
from grpo_fast.rollout.vllm_sample import Sample, kept_tokens, num_likeliest, sample_whole, token_versions


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
        ({"top_k": 80}, 136),
        ({"top_p": 0.9}, 256),
        ({"min_p": 0.1, "top_k": 900}, 1000),
        ({"top_k": 20, "temperature": 0.0}, 0),
    ],
)
def test_more_are_asked_for_than_top_k_by_what_may_tie(cut: dict[str, float], expected: int) -> None:
    assert num_likeliest(SamplingParams(max_tokens=1, **cut), 1000) == expected


def test_what_is_at_minus_infinity_was_not_kept() -> None:
    """A server says -9999 for it; the drawn token stands first, and again among the likeliest where it is one of them."""
    tokens, logprobs = [9, 4, 9, 3, 5, 5, 2, 1], [-2.0, -0.1, -2.0, float("-inf"), -0.7, -0.7, -0.7, -9999.0]
    kept, is_whole = kept_tokens(tokens, logprobs, [0, 4], [4, 4])
    assert kept == KeptTokens.of([9, 5], [[9, 4], [5, 2]])
    assert is_whole


def test_a_position_of_which_all_that_was_told_was_kept_may_have_kept_more() -> None:
    kept, is_whole = kept_tokens([9, 4, 3, 5, 2, 1], [-2.0, -0.1, -9999.0, -3.0, -0.7, -0.8], [0, 3], [3, 3])
    assert kept.to_lists() == [[9, 4], [5, 2, 1]]
    assert not is_whole


def test_nothing_is_kept_of_no_tokens() -> None:
    assert kept_tokens([], [], [], []) == (KeptTokens.of([], []), True)


class Widths:
    """Answers requests with completions that kept so many tokens each, by their seeds; counts what it was asked."""

    def __init__(self, widths: dict[int, int]) -> None:
        self.widths = widths
        self.asked: list[list[tuple[list[int], int, int, int]]] = []

    def __call__(self, prompts: list[Sequence[int]], params: list[dict[str, Any]]) -> list[list[Sample]]:
        self.asked.append(
            [(list(prompt), each["n"], each["seed"], each["logprobs"]) for prompt, each in zip(prompts, params, strict=True)]
        )
        return [[self._sample(each["seed"] + place, each["logprobs"]) for place in range(each["n"])] for each in params]

    def _sample(self, seed: int, told: int) -> Sample:
        width = self.widths[seed]
        logprobs = [-1.0] * width + [float("-inf")] * (100 - width)
        return Sample(
            (0,), (-1.0,), "stop", (seed,), *kept_tokens([0, *range(told)], [-1.0, *logprobs[:told]], [0], [told + 1])
        )


def test_completions_that_kept_more_than_was_told_run_again_from_their_seeds() -> None:
    """Until all is told; a support of the whole vocabulary needs no token beyond it."""
    sample = Widths({100: 2, 101: 3, 102: 99, 200: 30, 201: 1, 202: 100})
    params = [{"n": 3, "seed": 100, "logprobs": 3}, {"n": 3, "seed": 200, "logprobs": 3}]
    answers = sample_whole(sample, [[7, 8], [6]], params, vocabulary=100)
    assert [[each.versions[0] for each in group] for group in answers] == [[100, 101, 102], [200, 201, 202]]
    assert [[each.kept.sizes.tolist() for each in group if each.kept] for group in answers] == [
        [[2], [3], [99]],
        [[30], [1], [100]],
    ]
    assert sample.asked == [
        [([7, 8], 3, 100, 3), ([6], 3, 200, 3)],
        [([7, 8], 1, 101, 24), ([7, 8], 1, 102, 24), ([6], 1, 200, 24), ([6], 1, 202, 24)],
        [([7, 8], 1, 102, 100), ([6], 1, 200, 100), ([6], 1, 202, 100)],
    ]
