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


def test_prompts_may_have_limits_of_their_own() -> None:
    def limits(*given: int) -> list[int]:
        return check_request(
            [[0, 19], [1] * 8],
            SamplingParams(max_tokens=4),
            num_generations=1,
            context_length=10,
            vocabulary=20,
            max_tokens=given or None,
        )

    assert limits(4, 2) == [4, 2]
    with pytest.raises(ValueError, match="prompt 1 has 8 tokens, which with max_tokens=3 exceeds"):
        limits(4, 3)
    for wrong in ((4,), (4, 0), (5, 1)):
        with pytest.raises(ValueError, match=r"for 2 prompts; give one each, from 1 to sampling's 4"):
            limits(*wrong)


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "prompts is empty"),
        ([[1]], {"num_generations": 0}, "num_generations must be at least 1, got 0"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 7], {}, "prompt 0 has 7 tokens, which with max_tokens=4 exceeds the model's context of 10"),
        ([[1, 20]], {}, "prompt 0 has token ids from 1 to 20; the model's are 0 to 19"),
        ([[-1, 3]], {}, "prompt 0 has token ids from -1 to 3"),
    ],
)
def test_what_does_not_fit_is_named(prompts: list[list[int]], changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(prompts, **changes)
