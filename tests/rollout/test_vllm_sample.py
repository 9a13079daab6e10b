from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from grpo_fast.kept_tokens import KeptTokens
from grpo_fast.rollout import SamplingParams, vllm_sample
from grpo_fast.rollout.vllm_sample import (
    IN_PROCESS,
    OVER_HTTP,
    Sample,
    kept_tokens,
    num_likeliest,
    sample_whole,
    token_versions,
    version_name,
    version_number,
)


def test_spans_become_one_version_a_token() -> None:
    assert token_versions([(version_name(3, "a"), 0, 2), (version_name(11, "a"), 2, 3)], "a") == (3, 3, 11)
    assert token_versions([], "a") == ()


@pytest.mark.parametrize("other", ["default", "3", "@a", "x@a", "-1@a", version_name(3, "b")])
def test_a_version_that_no_sync_of_the_run_gave_is_none(other: str) -> None:
    assert version_number(other, "a") is None
    assert token_versions([(other, 0, 2)], "a") == ()
    assert token_versions([(version_name(3, "a"), 0, 1), (other, 1, 2)], "a") == ()


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({}, 0),
        ({"top_k": 20}, 46),
        ({"top_k": 20, "top_p": 0.9, "min_p": 0.1}, 46),
        ({"top_k": 80}, 136),
        ({"top_p": 0.9}, 1000),
        ({"min_p": 0.1}, 40),
        ({"min_p": 0.03, "top_p": 0.9}, 134),
        ({"min_p": 0.001}, 1000),
        ({"min_p": 0.1, "top_k": 900}, 1000),
        ({"top_k": 20, "temperature": 0.0}, 0),
    ],
)
def test_more_are_asked_for_than_top_k_by_what_may_tie(cut: dict[str, float], expected: int) -> None:
    assert num_likeliest(SamplingParams(max_tokens=1, **cut), 1000, IN_PROCESS) == expected


def test_what_is_told_at_first_leaves_room_for_what_else_is_told() -> None:
    """Of 256 completions of 512 tokens, 1,024 told of each token would take 12.9 GB."""
    sampling = SamplingParams(max_tokens=512, top_p=0.9)
    assert num_likeliest(sampling, 50_000, IN_PROCESS, 16) == 1024
    told = num_likeliest(sampling, 50_000, IN_PROCESS, 256)
    assert told * 256 * 512 * IN_PROCESS.entry_bytes <= 4 * 2**30 < (told + 1) * 256 * 512 * IN_PROCESS.entry_bytes
    assert num_likeliest(sampling, 50_000, OVER_HTTP, 16) == 256
    assert num_likeliest(sampling, 50_000, IN_PROCESS, 100_000) == 64


def test_what_is_at_minus_infinity_was_not_kept() -> None:
    """A server says -9999 for it; the drawn token stands first, and again among the likeliest where it is one of them."""
    tokens, logprobs = [9, 4, 9, 3, 5, 5, 2, 1], [-2.0, -0.1, -2.0, float("-inf"), -0.7, -0.7, -0.7, -9999.0]
    kept, short = kept_tokens(tokens, logprobs, [0, 4], [4, 4])
    assert kept == KeptTokens.of([9, 5], [[9, 4], [5, 2]])
    assert short == ()


def test_a_position_of_which_all_that_was_told_was_kept_may_have_kept_more() -> None:
    kept, short = kept_tokens([9, 4, 3, 5, 2, 1], [-2.0, -0.1, -9999.0, -3.0, -0.7, -0.8], [0, 3], [3, 3])
    assert kept.to_lists() == [[9, 4], [5, 2, 1]]
    assert short == (1,)


def test_nothing_is_kept_of_no_tokens() -> None:
    assert kept_tokens([], [], [], []) == (KeptTokens.of([], []), ())


class Sampler:
    """Keeps the first tokens after each context, one where nothing is said, and draws by seed; keeps what it was asked."""

    def __init__(self, widths: dict[tuple[int, ...], int], drawn: dict[int, list[int]]) -> None:
        self.widths = widths
        self.drawn = drawn
        self.versions = [4]
        """Of the weights in force, call by call; the last stays."""
        self.asked: list[list[tuple[list[int], int, int, int]]] = []

    def __call__(self, prompts: list[Sequence[int]], params: list[dict[str, Any]]) -> list[list[Sample]]:
        both = list(zip(prompts, params, strict=True))
        self.asked.append([(list(prompt), each["n"], each["max_tokens"], each["logprobs"]) for prompt, each in both])
        version = self.versions.pop(0) if len(self.versions) > 1 else self.versions[0]
        return [
            [self._sample(prompt, each, each["seed"] + place, version) for place in range(each["n"])] for prompt, each in both
        ]

    def _sample(self, prompt: Sequence[int], params: dict[str, Any], seed: int, version: int) -> Sample:
        drawn, told = self.drawn[seed] if params["max_tokens"] > 1 else [0], params["logprobs"]
        listed: list[int] = []
        logprobs: list[float] = []
        for place, token in enumerate(drawn):
            width = self.widths.get((*prompt, *drawn[:place]), 1)
            listed += [token, *range(told)]
            logprobs += [-1.0, *([-1.0] * width + [float("-inf")] * 100)[:told]]
        firsts = [place * (told + 1) for place in range(len(drawn))]
        kept, short = kept_tokens(listed, logprobs, firsts, [told + 1] * len(drawn))
        return Sample(tuple(drawn), (-1.0,) * len(drawn), "stop", (version,) * len(drawn), kept, short)


WIDTHS = {(7,): 2, (7, 1): 99, (6,): 30, (6, 29): 2, (6, 29, 1): 3, (6, 0): 100}
DRAWN = {100: [0, 0], 101: [1, 98, 0], 200: [29, 0], 201: [29, 1, 2], 202: [0, 77]}
PARAMS = [{"n": 2, "seed": 100, "logprobs": 3, "max_tokens": 9}, {"n": 3, "seed": 200, "logprobs": 3, "max_tokens": 9}]


def check(answers: list[list[Sample]]) -> None:
    for prompt, seed, group in zip((7, 6), (100, 200), answers, strict=True):
        for place, each in enumerate(group):
            drawn = DRAWN[seed + place]
            supports = [list(range(WIDTHS.get((prompt, *drawn[:position]), 1))) for position in range(len(drawn))]
            assert each.token_ids == tuple(drawn)
            assert each.kept is not None
            assert [sorted(tokens) for tokens in each.kept.to_lists()] == supports
            assert each.kept.drawn.tolist() == drawn


def test_positions_that_kept_more_than_was_told_are_asked_for_again() -> None:
    """Until all is told; a support of the whole vocabulary needs no token beyond it."""
    sampler = Sampler(WIDTHS, DRAWN)
    check(sample_whole(sampler, [[7], [6]], PARAMS, vocabulary=100))
    assert sampler.asked == [
        [([7], 2, 9, 3), ([6], 3, 9, 3)],
        [
            ([7, 1], 1, 1, 24),
            ([6], 1, 1, 24),
            ([6], 1, 1, 24),
            ([6, 29, 1], 1, 1, 24),
            ([6], 1, 1, 24),
            ([6, 0], 1, 1, 24),
        ],
        [([7, 1], 1, 1, 100), ([6], 1, 1, 100), ([6], 1, 1, 100), ([6], 1, 1, 100), ([6, 0], 1, 1, 100)],
    ]


def test_where_all_is_told_at_first_nothing_is_asked_again() -> None:
    sampler = Sampler(WIDTHS, DRAWN)
    check(sample_whole(sampler, [[7], [6]], [each | {"logprobs": 100} for each in PARAMS], vocabulary=100))
    assert len(sampler.asked) == 1


def test_a_few_positions_are_asked_for_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_sample, "_AT_ONCE", 2)
    sampler = Sampler(WIDTHS, DRAWN)
    check(sample_whole(sampler, [[7], [6]], PARAMS, vocabulary=100))
    assert [len(asked) for asked in sampler.asked] == [2, 2, 2, 2, 2, 2, 1]


def test_completions_of_weights_that_are_gone_run_again_whole() -> None:
    """Those alone of which something is missing; what the new weights keep is then told of all their tokens."""
    sampler = Sampler(WIDTHS, DRAWN)
    sampler.versions = [4, 4, 5]
    answers = sample_whole(sampler, [[7], [6]], PARAMS, vocabulary=100)
    check(answers)
    assert [[set(each.versions) for each in group] for group in answers] == [[{4}, {5}], [{5}, {5}, {5}]]
    assert sampler.asked[3] == [([7], 1, 9, 3), ([6], 1, 9, 3), ([6], 1, 9, 3), ([6], 1, 9, 3)]


def test_the_drawn_token_is_kept_where_rounding_says_otherwise() -> None:
    sampler = Sampler({(7,): 9}, {100: [30]})
    [[answer]] = sample_whole(sampler, [[7]], [{"n": 1, "seed": 100, "logprobs": 3, "max_tokens": 9}], vocabulary=100)
    assert answer.kept == KeptTokens(np.array([30, *range(9)], np.int32), np.array([10], np.int32))
