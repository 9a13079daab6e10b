from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from grpo_fast.kept_tokens import KeptTokens


def test_the_drawn_token_stands_first_and_nothing_is_lost() -> None:
    kept = KeptTokens.of([7, 3, 5], [[1, 7, 9], np.array([3], dtype=np.int32), [5, 2]])
    assert kept.to_lists() == [[7, 1, 9], [3], [5, 2]]
    assert kept.sizes.tolist() == [3, 1, 2]
    assert kept.drawn.tolist() == [7, 3, 5]
    assert len(kept) == 3
    assert kept.token_ids.dtype == np.int32


def test_it_survives_json_and_is_compared_by_value() -> None:
    kept = KeptTokens.of([7, 3], [[1, 7], [3, 4, 8]])
    again = KeptTokens.from_lists(json.loads(json.dumps(kept.to_lists())))
    assert again == kept == copy.deepcopy(kept)
    assert hash(again) == hash(kept)
    for other in (KeptTokens.of([7, 3], [[1, 7], [3, 4, 9]]), KeptTokens.of([7, 4], [[1, 7, 3], [4, 8]]), "kept"):
        assert other != kept


def test_several_are_joined() -> None:
    first, second = KeptTokens.of([7, 3], [[1, 7], [3, 4, 8]]), KeptTokens.of([5], [[2, 5]])
    assert KeptTokens.joined([first, second]).to_lists() == [[7, 1], [3, 4, 8], [5, 2]]
    assert KeptTokens.joined([first]) == first


def test_nothing_of_nothing() -> None:
    none = KeptTokens.of([], [])
    assert len(none) == 0
    assert none.to_lists() == []
    assert none == KeptTokens.from_lists([])


@pytest.mark.parametrize(
    ("drawn", "supports", "told"),
    [
        ([7, 3], [[7], [4, 5]], "token 3 at position 1 is 0 times in its kept support"),
        ([7, 3], [[7, 2, 7], [3]], "token 7 at position 0 is 2 times in its kept support"),
        ([7, 3], [[7], []], "token 3 at position 1 is 0 times"),
        ([7, 3], [[7]], "1 supports for 2 tokens"),
    ],
)
def test_a_support_without_its_token_is_refused(drawn: list[int], supports: list[list[int]], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        KeptTokens.of(drawn, supports)
