"""Which sequences carry gradient at all, and how they are cut into micro-batches.

Plain Python on a few thousand numbers: it runs on the host before the model does, so that dead sequences reach neither its
forward nor its backward pass and nothing has to be read back from the device.

A sequence's gradient is exactly zero when none of its tokens is scored, or when its advantage is 0 and no other term of the
loss reaches it (no KL term, no entropy bonus). Normalisers are computed before anything is left out, so gradients do not
change. A loss term outside the objective (a mixture of experts' load balance) is not known here; keep every sequence live
then.
"""

from __future__ import annotations

from collections.abc import Sequence


def live_sequences(
    num_scored_tokens: Sequence[int], advantages: Sequence[float], *, beta: float = 0.0, entropy_coef: float = 0.0
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
        ValueError: the two have different lengths.
    """
    if len(num_scored_tokens) != len(advantages):
        raise ValueError(f"{len(num_scored_tokens)} token counts for {len(advantages)} advantages; give one each a sequence")
    reaches_all = beta != 0 or entropy_coef != 0
    return [
        tokens > 0 and (reaches_all or advantage != 0) for tokens, advantage in zip(num_scored_tokens, advantages, strict=True)
    ]


def plan_microbatches(lengths: Sequence[int], *, live: Sequence[bool], token_budget: int) -> list[list[int]]:
    """Cuts live sequences into micro-batches whose padded size keeps to a budget.

    Sequences are taken from the longest to the shortest, ties by index, and a micro-batch is closed when one more would break
    the budget: neighbours in length share padding, and no other cut of that order needs fewer micro-batches. The largest come
    first, so that a budget too large for the memory shows at once.

    Args:
        lengths: [N] tokens of each sequence, prompt and completion together.
        live: [N]: the others are left out.
        token_budget: most tokens, padding included, of one micro-batch. A sequence longer than that stands alone.

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
    plan: list[list[int]] = []
    for index in order:
        if plan and (len(plan[-1]) + 1) * lengths[plan[-1][0]] <= token_budget:
            plan[-1].append(index)
        else:
            plan.append([index])
    return plan
