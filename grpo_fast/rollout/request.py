"""Checks of a request that every engine makes before it computes anything."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_fast.rollout.engine import SamplingParams


def check_request(
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    num_generations: int,
    context_length: int | None,
    vocabulary: int,
    max_tokens: Sequence[int] | None = None,
) -> list[int]:
    """Checks a call of ``generate``.

    Args:
        prompts: P token-id sequences.
        sampling: gives the longest completion.
        num_generations: G.
        context_length: longest sequence that the engine takes, in tokens; ``None`` where it has no limit.
        vocabulary: V.
        max_tokens: [P], longest completion of each prompt where they differ.

    Returns:
        [P], longest completion of each prompt.

    Raises:
        ValueError: no prompts, an empty prompt, a token the model does not know, a prompt and ``max_tokens`` that exceed the
            context together, or a limit that is not from 1 to that of ``sampling``.
    """
    if not prompts:
        raise ValueError("prompts is empty; give at least one prompt")
    if num_generations < 1:
        raise ValueError(f"num_generations must be at least 1, got {num_generations}")
    limits = [sampling.max_tokens] * len(prompts) if max_tokens is None else list(max_tokens)
    if len(limits) != len(prompts) or not all(1 <= limit <= sampling.max_tokens for limit in limits):
        raise ValueError(
            f"max_tokens={limits} for {len(prompts)} prompts; give one each, from 1 to sampling's {sampling.max_tokens}"
        )
    for position, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not len(prompt):
            raise ValueError(f"prompt {position} is empty; a model needs at least one token to start from")
        if context_length is not None and len(prompt) + limit > context_length:
            raise ValueError(
                f"prompt {position} has {len(prompt)} tokens, which with max_tokens={limit} exceeds the "
                f"model's context of {context_length}; shorten the prompt or lower max_tokens"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ValueError(
                f"prompt {position} has token ids from {min(prompt)} to {max(prompt)}; the model's are 0 to {vocabulary - 1}"
            )
    return limits
