from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_fast.ops.fused_grpo import fused_grpo
from grpo_fast.ops.lm_head import LMHead
from grpo_fast.ops.loss_spec import LossBatch, LossSpec
from grpo_fast.ops.row_plan import (
    Layout,
    SharedPrompts,
    live_sequences,
    num_positions,
    plan_microbatches,
    plan_rows,
    scored_rows,
)

SEQUENCES = st.lists(st.tuples(st.integers(1, 300), st.booleans()), max_size=60)
LAYOUTS = st.sampled_from(["padded", "packed"])


def first_fit_decreasing(lengths: list[int], budget: int, layout: Layout) -> int:
    """Micro-batches of the plain heuristic, for either layout."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        home = next((b for b in bins if num_positions([*b, length], layout=layout) <= budget), None)
        if home is None:
            bins.append([length])
        else:
            home.append(length)
    return len(bins)


@given(SEQUENCES, st.integers(1, 2000), LAYOUTS)
def test_each_live_sequence_once_and_the_budget_kept(sequences: list[tuple[int, bool]], budget: int, layout: Layout) -> None:
    lengths, live = [n for n, _ in sequences], [alive for _, alive in sequences]
    plan = plan_microbatches(lengths, live=live, token_budget=budget, layout=layout)
    assert sorted(i for batch in plan for i in batch) == [i for i, alive in enumerate(live) if alive]
    sizes = [num_positions([lengths[i] for i in batch], layout=layout) for batch in plan]
    for batch, size in zip(plan, sizes, strict=True):
        assert batch
        assert len(batch) == 1 or size <= budget
    assert plan == plan_microbatches(lengths, live=live, token_budget=budget, layout=layout)
    if layout == "packed":
        assert sizes == sorted(sizes, reverse=True)


@given(SEQUENCES, st.integers(1, 2000), LAYOUTS)
def test_never_more_micro_batches_than_first_fit_decreasing(
    sequences: list[tuple[int, bool]], budget: int, layout: Layout
) -> None:
    lengths = [n for n, _ in sequences]
    plan = plan_microbatches(lengths, live=[True] * len(lengths), token_budget=budget, layout=layout)
    assert len(plan) <= first_fit_decreasing(lengths, budget, layout)
    if layout == "packed":
        fits = [n for n in lengths if n <= budget]
        assert len(plan) >= len(lengths) - len(fits) + math.ceil(sum(fits) / budget)


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


def test_packed_plans_by_hand() -> None:
    lengths = [3, 10, 4, 4, 25, 2]
    live = [True, True, True, False, True, True]
    assert plan_microbatches(lengths, live=live, token_budget=20, layout="packed") == [[4], [1, 2, 0, 5]]
    assert plan_microbatches([], live=[], token_budget=20, layout="packed") == []
    lengths = [26, 15, 15, 9, 6, 6]
    assert first_fit_decreasing(lengths, 40, "packed") == 3
    assert plan_microbatches(lengths, live=[True] * 6, token_budget=40, layout="packed") == [[1, 2, 3], [0, 4, 5]]


def test_ties_are_broken_by_index() -> None:
    assert plan_microbatches([5] * 6, live=[True] * 6, token_budget=10) == [[0, 1], [2, 3], [4, 5]]
    assert plan_microbatches([5] * 6, live=[True] * 6, token_budget=10, layout="packed") == [[0, 1], [2, 3], [4, 5]]


def test_unusable_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="2 lengths for 1"):
        plan_microbatches([1, 2], live=[True], token_budget=5)
    with pytest.raises(ValueError, match="token_budget=0"):
        plan_microbatches([1], live=[True], token_budget=0)
    with pytest.raises(ValueError, match="sequence 1 is live but has length 0"):
        plan_microbatches([4, 0], live=[True, True], token_budget=5)
    with pytest.raises(ValueError, match="1 token counts for 2 lengths"):
        plan_rows([4, 1], [3], live=[True, True], token_budget=5)


def test_what_carries_gradient() -> None:
    tokens, advantages = [5, 5, 0, 1, 3], [0.0, -1.0, 2.0, -0.0, math.nan]
    assert live_sequences(tokens, advantages) == [False, True, False, False, True]
    assert live_sequences(tokens, advantages, beta=0.1) == [True, True, False, True, True]
    assert live_sequences(tokens, advantages, entropy_coef=0.1) == [True, True, False, True, True]
    with pytest.raises(ValueError, match="5 token counts for 1"):
        live_sequences(tokens, [0.0])


def test_a_whole_plan() -> None:
    lengths, scored = [9, 5, 7, 8, 4], [6, 0, 3, 5, 1]
    given_ = {"live": [True, False, False, True, False], "token_budget": 16}
    plan = plan_rows(lengths, scored, **given_)
    assert [(b.sequences, b.num_tokens, b.num_rows, b.carries_gradient) for b in plan.micro_batches] == [
        ((0,), 9, 6, True),
        ((3,), 8, 5, True),
    ]
    assert plan.dropped == (1, 2, 4)
    assert (plan.num_rows, plan.num_tokens) == (11, 17)
    kept = plan_rows(lengths, scored, **given_, keep_dead_rows_for_metrics=True)
    assert [(b.sequences, b.num_tokens, b.num_rows, b.carries_gradient) for b in kept.micro_batches[2:]] == [
        ((2, 4), 14, 4, False)
    ]
    assert kept.dropped == (1,)
    packed = plan_rows(lengths, scored, **(given_ | {"token_budget": 17}), layout="packed")
    assert [(b.sequences, b.num_tokens) for b in packed.micro_batches] == [((0, 3), 17)]
    assert plan_rows([], [], live=[], token_budget=1).micro_batches == ()


def test_scored_rows_predict_the_next_token() -> None:
    prompts, flags = [2, 1, 3], [[True, False, True], [], [True]]
    padded = scored_rows(prompts, flags)
    assert padded == ([1, 3, 12], [0, 0, 2], [0, 2, 0])
    packed = scored_rows(prompts, flags, layout="packed")
    assert packed == ([1, 3, 8], [0, 0, 2], [0, 2, 0])
    assert scored_rows([], []) == ([], [], [])
    with pytest.raises(ValueError, match="2 prompts for 1"):
        scored_rows([1, 1], [[True]])
    with pytest.raises(ValueError, match="a prompt is empty"):
        scored_rows([1, 0], [[True], [True]])


STEPS = st.lists(
    st.tuples(st.integers(1, 4), st.lists(st.booleans(), max_size=6), st.sampled_from([0.0, 0.0, 1.0, -0.5]), st.booleans()),
    min_size=1,
    max_size=8,
)
LOSSES = st.sampled_from(
    [
        LossSpec(),
        LossSpec(importance_sampling_level="sequence"),
        LossSpec(surrogate="cispo", epsilon_high=1.3),
        LossSpec(beta=0.1),
        LossSpec(entropy_coef=0.05),
    ]
)


@given(STEPS, LOSSES, st.integers(1, 40), LAYOUTS, st.booleans())
@settings(max_examples=60)
def test_gradients_are_equal_with_and_without_what_is_dropped(
    step: list[tuple[int, list[bool], float, bool]], spec: LossSpec, budget: int, layout: Layout, keep: bool
) -> None:
    """A layer of a model stands for all of it: each position's hidden state is a product of its input and one weight."""
    generator = torch.Generator().manual_seed(3)
    prompts, flags, advantages, masked = (list(column) for column in zip(*step, strict=True))
    lengths = [prompt + len(f) for prompt, f in zip(prompts, flags, strict=True)]
    counts = [sum(f) for f in flags]
    inputs = [torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in lengths]
    tokens = [torch.randint(0, 11, (len(f),), generator=generator) for f in flags]
    olds = [-2 + 0.3 * torch.randn(len(f), generator=generator, dtype=torch.float64) for f in flags]
    weights = [0.0 if n == 0 else 1.0 / (n * len(step)) for n in counts]
    layer = torch.randn(5, 5, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(11, 5, generator=generator, dtype=torch.float64).requires_grad_()

    def gradients(micro_batches: list[tuple[int, ...]]) -> tuple[list[torch.Tensor], int]:
        total = [torch.zeros_like(layer), torch.zeros_like(head)]
        num_rows = 0
        for chosen in micro_batches:
            width = max(lengths[i] for i in chosen)
            pad = [width - lengths[i] if layout == "padded" else 0 for i in chosen]
            x = torch.cat([torch.nn.functional.pad(inputs[i], (0, 0, 0, p)) for i, p in zip(chosen, pad, strict=True)])
            rows = scored_rows([prompts[i] for i in chosen], [flags[i] for i in chosen], layout=layout)
            places = list(zip(rows.sequence_index, rows.completion_index, strict=True))

            def gathered(values: list[torch.Tensor], places=places, chosen=chosen) -> torch.Tensor:
                return torch.stack([values[chosen[s]][t] for s, t in places]) if places else values[0][:0]

            out = torch.tensor([masked[chosen[s]] for s, _ in places], dtype=torch.bool)
            batch = LossBatch(
                torch.tensor(rows.sequence_index, dtype=torch.long),
                torch.tensor([advantages[i] for i in chosen], dtype=torch.float64),
                torch.tensor([weights[i] for i in chosen], dtype=torch.float64),
                old_logprobs=gathered(olds),
                ref_logprobs=gathered(olds) - 0.1,
                num_items_in_batch=float(sum(counts)),
                importance_weights=(~out).double(),
            )
            hidden = (x @ layer)[torch.tensor(rows.row_index, dtype=torch.long)]
            loss = fused_grpo(hidden, LMHead(head), targets=gathered(tokens), batch=batch, spec=spec).loss
            total = [t + g for t, g in zip(total, torch.autograd.grad(loss, [layer, head]), strict=True)]
            num_rows += len(places)
        return total, num_rows

    live = live_sequences(counts, advantages, beta=spec.beta, entropy_coef=spec.entropy_coef)
    plan = plan_rows(lengths, counts, live=live, token_budget=budget, layout=layout, keep_dead_rows_for_metrics=keep)
    whole, every_row = gradients([tuple(range(len(step)))])
    planned, some_rows = gradients([batch.sequences for batch in plan.micro_batches if batch.carries_gradient])
    for found, wanted in zip(planned, whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert some_rows == sum(batch.num_rows for batch in plan.micro_batches if batch.carries_gradient)
    assert every_row == sum(counts)
    assert plan.num_rows == (every_row if keep else some_rows)
    planned_sequences = [i for batch in plan.micro_batches for i in batch.sequences]
    assert sorted([*planned_sequences, *plan.dropped]) == list(range(len(step)))


def test_completions_of_a_prompt_go_together_and_its_copies_are_not_counted() -> None:
    layout = SharedPrompts(prompt_lengths=[10, 4], prompt_of=[0, 1, 0, 1, 0])
    lengths = [12, 6, 13, 5, 11]
    plan = plan_rows(lengths, [2, 2, 3, 1, 1], live=[True, True, True, False, True], token_budget=16, layout=layout)
    assert [(sorted(batch.sequences), batch.num_tokens) for batch in plan.micro_batches] == [([0, 2, 4], 16), ([1], 6)]
    assert layout.copies_saved([0, 2, 4]) == [10, 10]
    assert layout.copies_saved([1]) == []
    # apart, the same budget takes a micro-batch for each
    assert len(plan_microbatches(lengths, live=[True] * 5, token_budget=16, layout="packed")) == 4
