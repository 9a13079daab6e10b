from __future__ import annotations

import pytest

from grpo_fast.rollout import SamplingParams
from grpo_fast.rollout.request import check_request


def check(prompts: list[list[int]], *, max_tokens: int = 4, num_generations: int = 1, context: int | None = 10) -> None:
    check_request(
        prompts, SamplingParams(max_tokens=max_tokens), num_generations=num_generations, context_length=context, vocabulary=20
    )


def test_what_fits_passes() -> None:
    check([[0, 19], [1] * 6])
    check([[1] * 600], context=None)


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "prompts is empty"),
        ([[1]], {"num_generations": 0}, "num_generations must be at least 1, got 0"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 7], {}, "prompt 0 has 7 tokens, which with max_tokens=4 exceeds the model's context of 10"),
        ([[1, 20]], {}, "prompt 0 holds token ids from 1 to 20; the model knows 0 to 19"),
        ([[-1, 3]], {}, "prompt 0 holds token ids from -1 to 3"),
    ],
)
def test_what_does_not_fit_is_named(prompts: list[list[int]], changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(prompts, **changes)
