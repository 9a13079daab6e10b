"""Which sequences and which of their rows carry gradient at all, and how they are cut into micro-batches.

Plain Python on a few thousand numbers: it runs on the host before the model does, so that dead sequences reach neither its
forward nor its backward pass and nothing has to be read back from the device.

A sequence's gradient is exactly zero when none of its tokens is scored, or when its surrogate is (its advantage is 0) and no
other term of the loss reaches it (no KL term, no entropy bonus). Normalisers are computed before anything is left out, so
gradients do not change. A loss term outside the objective (a mixture of experts' load balance) is not known here; keep every
sequence live then. Of a sequence that is live, the head sees the scored rows alone: not the prompt, not padding, not what a
tool answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

from grpo_fast.ops.packing import pack_sequences, pack_shared_prompts

Layout: TypeAlias = Literal["padded", "packed"]
"""How the model gets a micro-batch: every sequence as long as the longest, or one after the other without padding."""


class SharedPrompts(NamedTuple):
    """A layout: packed, with one copy of a prompt for all its completions of a micro-batch."""

    prompt_lengths: Sequence[int]
    """[P] tokens of each prompt."""
    prompt_of: Sequence[int]
    """[N] the prompt of each sequence."""

    def copies_saved(self, rows: Sequence[int]) -> list[int]:
        """Lengths of the prompts that sequences ``rows`` do not compute, since another one of them does."""
        seen: set[int] = set()
        saved = []
        for row in rows:
            prompt = self.prompt_of[row]
            if prompt in seen:
                saved.append(self.prompt_lengths[prompt])
            seen.add(prompt)
        return saved


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences that go through the model together."""

    sequences: tuple[int, ...]
    """Indices into the step's sequences."""
    num_tokens: int
    """Positions that the model computes, padding included."""
    num_rows: int
    """Those of them that enter the head."""
    carries_gradient: bool = True
    """Whether there is a backward pass; without one the rows are there for metrics only."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Everything that goes through the model in a step. Live micro-batches come first, the largest of them first."""

    micro_batches: tuple[MicroBatch, ...]
    dropped: tuple[int, ...]
    """Sequences that never enter the model, ascending."""

    @property
    def num_rows(self) -> int:
        """Rows that enter the head, with gradient or without."""
        return sum(batch.num_rows for batch in self.micro_batches)

    @property
    def num_tokens(self) -> int:
        """Positions that the model computes, padding included."""
        return sum(batch.num_tokens for batch in self.micro_batches)


def live_sequences(
    num_scored_tokens: Sequence[int],
    advantages: Sequence[float],
    *,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
) -> list[bool]:
    """Tells which sequences carry gradient.

    Args:
        num_scored_tokens: [N] tokens of each sequence that are in the loss; 0 for one that is masked.
        advantages: [N]. NaN counts as live, so that the loss shows it.
        beta: weight of the KL term of the loss.
        entropy_coef: weight of the entropy bonus.

    Returns:
        [N]: ``False`` where the gradient is exactly zero.

    Raises:
        ValueError: lengths differ.
    """
    if len(num_scored_tokens) != len(advantages):
        raise ValueError(f"{len(num_scored_tokens)} token counts for {len(advantages)} advantages; give one each a sequence")
    reaches_all = beta != 0 or entropy_coef != 0
    return [
        tokens > 0 and (reaches_all or advantage != 0) for tokens, advantage in zip(num_scored_tokens, advantages, strict=True)
    ]


def plan_rows(
    lengths: Sequence[int],
    num_scored_tokens: Sequence[int],
    *,
    live: Sequence[bool],
    token_budget: int,
    layout: Layout | SharedPrompts = "padded",
    keep_dead_rows_for_metrics: bool = False,
) -> RowPlan:
    """Plans a step: what goes through the model, in which micro-batches, and what is left out.

    Args:
        lengths: [N] tokens of each sequence, prompt and completion together.
        num_scored_tokens: [N] tokens of each sequence that are in the loss.
        live: [N] from :func:`live_sequences`.
        token_budget: most positions of one micro-batch, padding included. A sequence longer than that stands alone.
        layout: how the model gets its sequences.
        keep_dead_rows_for_metrics: let sequences that have scored tokens but no gradient through the forward pass, in
            micro-batches of their own: entropy, KL and clip fractions are then of every token of the step.

    Returns:
        The plan; every live sequence stands in exactly one micro-batch.

    Raises:
        ValueError: lengths of the lists differ, a planned sequence has no tokens, or the budget is not positive.
    """
    if len(num_scored_tokens) != len(lengths):
        raise ValueError(f"{len(num_scored_tokens)} token counts for {len(lengths)} lengths; give one each a sequence")
    idle = [keep_dead_rows_for_metrics and not alive and n > 0 for alive, n in zip(live, num_scored_tokens, strict=True)]
    micro_batches = [
        MicroBatch(
            tuple(rows),
            _positions(rows, lengths, layout),
            sum(num_scored_tokens[i] for i in rows),
            carries_gradient,
        )
        for chosen, carries_gradient in ((live, True), (idle, False))
        for rows in plan_microbatches(lengths, live=chosen, token_budget=token_budget, layout=layout)
    ]
    dropped = tuple(i for i in range(len(lengths)) if not live[i] and not idle[i])
    return RowPlan(tuple(micro_batches), dropped)


def _positions(rows: Sequence[int], lengths: Sequence[int], layout: Layout | SharedPrompts) -> int:
    chosen = [lengths[i] for i in rows]
    if isinstance(layout, SharedPrompts):
        return sum(chosen) - sum(layout.copies_saved(rows))
    return num_positions(chosen, layout=layout)


def num_positions(lengths: Sequence[int], *, layout: Layout) -> int:
    """Positions that the model computes for sequences of these lengths in one micro-batch."""
    return len(lengths) * max(lengths, default=0) if layout == "padded" else sum(lengths)


def plan_microbatches(
    lengths: Sequence[int], *, live: Sequence[bool], token_budget: int, layout: Layout | SharedPrompts = "padded"
) -> list[list[int]]:
    """Cuts live sequences into few micro-batches that keep to a budget.

    Sequences are taken from the longest to the shortest, ties by index, so the same step is always cut the same way. Padded,
    a micro-batch is closed when one more would break the budget: neighbours in length share padding, and no cut at all needs
    fewer micro-batches. Packed, each goes where it first fits, or where it fits best, whichever needs fewer: at most 11/9 of
    the fewest possible. The largest micro-batches come first, so that a budget too large for the memory shows at once.

    Args:
        lengths: [N] tokens of each sequence, prompt and completion together.
        live: [N]: the others are left out.
        token_budget: most tokens, padding included, of one micro-batch. A sequence longer than that stands alone.
        layout: how the model gets its sequences.

    Returns:
        Indices into ``lengths``; each live sequence stands in exactly one micro-batch, none is empty.

    Raises:
        ValueError: the two have different lengths, a live sequence has no tokens, or the budget is not positive.
    """
    if len(lengths) != len(live):
        raise ValueError(f"{len(lengths)} lengths for {len(live)} live flags; give one each a sequence")
    if token_budget < 1:
        raise ValueError(f"token_budget={token_budget}; it must be at least 1")
    order = sorted((i for i, alive in enumerate(live) if alive), key=lambda i: (-lengths[i], i))
    if order and lengths[order[-1]] < 1:
        raise ValueError(
            f"sequence {order[-1]} is live but has length {lengths[order[-1]]}; lengths count prompt and completion"
        )
    if layout == "padded":
        return _padded_bins(order, lengths, token_budget)
    chosen = sorted(order)
    if isinstance(layout, SharedPrompts):
        return _shared_bins(chosen, lengths, layout, token_budget)
    return [[chosen[i] for i in rows] for rows in pack_sequences([lengths[i] for i in chosen], token_budget).bins()]


def _padded_bins(order: Iterable[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    plan: list[list[int]] = []
    for index in order:
        if plan and (len(plan[-1]) + 1) * lengths[plan[-1][0]] <= budget:
            plan[-1].append(index)
        else:
            plan.append([index])
    return plan


def _shared_bins(chosen: Sequence[int], lengths: Sequence[int], layout: SharedPrompts, budget: int) -> list[list[int]]:
    prompt_of = [layout.prompt_of[i] for i in chosen]
    completions = [lengths[i] - layout.prompt_lengths[prompt] for i, prompt in zip(chosen, prompt_of, strict=True)]
    packed = pack_shared_prompts(layout.prompt_lengths, completions, prompt_of, token_budget=budget)
    ends = packed.segment_starts[packed.bin_starts].tolist()
    rows = [chosen[i] for i in packed.completions.tolist()]
    return [rows[low:high] for low, high in pairwise(ends)]


class ScoredRows(NamedTuple):
    """The T rows of a micro-batch that enter the head, sequence by sequence."""

    row_index: list[int]
    """[T] position, among all that the model computes, whose hidden state predicts the token."""
    sequence_index: list[int]
    """[T] which of the micro-batch's sequences it belongs to; ascends."""
    completion_index: list[int]
    """[T] which token of its completion it predicts."""


def scored_rows(prompt_lengths: Sequence[int], scored: Sequence[Sequence[bool]], *, layout: Layout = "padded") -> ScoredRows:
    """Finds the rows of a micro-batch that the head has to see.

    Args:
        prompt_lengths: [B], each at least 1: the first token of a completion is predicted by the last of its prompt.
        scored: [B] a flag for each token of the completion: ``False`` where it was not sampled, as what a tool answered.
        layout: ``padded`` on the right to the longest sequence, or ``packed``.

    Returns:
        Rows in the order of the sequences and, in each, of its tokens.

    Raises:
        ValueError: the two have different lengths, or a prompt is empty.
    """
    if len(prompt_lengths) != len(scored):
        raise ValueError(f"{len(prompt_lengths)} prompts for {len(scored)} completions; give one each a sequence")
    if min(prompt_lengths, default=1) < 1:
        raise ValueError("a prompt is empty, so nothing predicts the first token of its completion; give it at least one token")
    lengths = [prompt + len(flags) for prompt, flags in zip(prompt_lengths, scored, strict=True)]
    width = max(lengths, default=0)
    result = ScoredRows([], [], [])
    start = 0
    for sequence, (prompt, flags) in enumerate(zip(prompt_lengths, scored, strict=True)):
        tokens = [token for token, counts in enumerate(flags) if counts]
        result.row_index.extend(start + prompt - 1 + token for token in tokens)
        result.sequence_index.extend([sequence] * len(tokens))
        result.completion_index.extend(tokens)
        start += width if layout == "padded" else lengths[sequence]
    return result
