from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_fast.ops.row_plan import live_sequences, plan_microbatches

SEQUENCES = st.lists(st.tuples(st.integers(1, 300), st.booleans()), max_size=60)


@given(SEQUENCES, st.integers(1, 2000))
def test_each_live_sequence_once_and_the_budget_kept(sequences: list[tuple[int, bool]], budget: int) -> None:
    lengths, live = [n for n, _ in sequences], [alive for _, alive in sequences]
    plan = plan_microbatches(lengths, live=live, token_budget=budget)
    assert sorted(i for batch in plan for i in batch) == [i for i, alive in enumerate(live) if alive]
    for batch in plan:
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


@given(SEQUENCES, st.integers(1, 2000))
def test_no_two_neighbours_would_fit_together(sequences: list[tuple[int, bool]], budget: int) -> None:
    lengths = [n for n, _ in sequences]
    plan = plan_microbatches(lengths, live=[True] * len(lengths), token_budget=budget)
    for first, second in pairwise(plan):
        assert (len(first) + 1) * max(lengths[i] for i in first) > budget
        assert min(lengths[i] for i in first) >= max(lengths[i] for i in second)


def test_a_plan_by_hand() -> None:
    lengths = [3, 10, 4, 4, 25, 2]
    live = [True, True, True, False, True, True]
    assert plan_microbatches(lengths, live=live, token_budget=20) == [[4], [1, 2], [0, 5]]
    assert plan_microbatches(lengths, live=live, token_budget=10**9) == [[4, 1, 2, 0, 5]]
    assert plan_microbatches(lengths, live=live, token_budget=1) == [[4], [1], [2], [0], [5]]
    assert plan_microbatches([], live=[], token_budget=5) == []
    assert plan_microbatches([0, 3], live=[False, True], token_budget=5) == [[1]]


def test_ties_are_broken_by_index() -> None:
    assert plan_microbatches([5] * 6, live=[True] * 6, token_budget=10) == [[0, 1], [2, 3], [4, 5]]


def test_unusable_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="2 lengths for 1"):
        plan_microbatches([1, 2], live=[True], token_budget=5)
    with pytest.raises(ValueError, match="token_budget=0"):
        plan_microbatches([1], live=[True], token_budget=0)
    with pytest.raises(ValueError, match="sequence 1 is live but has length 0"):
        plan_microbatches([4, 0], live=[True, True], token_budget=5)


def test_what_carries_gradient() -> None:
    tokens, advantages = [5, 5, 0, 1, 3], [0.0, -1.0, 2.0, -0.0, math.nan]
    assert live_sequences(tokens, advantages) == [False, True, False, False, True]
    assert live_sequences(tokens, advantages, beta=0.1) == [True, True, False, True, True]
    assert live_sequences(tokens, advantages, entropy_coef=0.1) == [True, True, False, True, True]
    with pytest.raises(ValueError, match="5 token counts for 1"):
        live_sequences(tokens, [0.0])
