"""What is asked of vLLM and what comes back, in this process and over HTTP alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from grpo_fast.kept_tokens import KeptTokens
from grpo_fast.rollout.sync_probe import NUM_CHOICES

if TYPE_CHECKING:
    from grpo_fast.rollout.engine import SamplingParams

PROBE_PARAMS: dict[str, Any] = {
    "temperature": 0.0,
    "max_tokens": 1,
    "logprobs": NUM_CHOICES,
    "ignore_eos": True,
    "detokenize": False,
}
"""How a prompt of a sync's probe is answered."""
NUM_TOLD = 256
"""Likeliest tokens that are asked for first where ``top_k`` does not bound how many are kept."""
_MORE = 8
"""So many times as many are asked for where that was too few."""
_OUTSIDE = -9999.0
"""What a server says for minus infinity, which JSON does not know."""
SCORE_PARAMS: dict[str, Any] = {"temperature": 1.0, "max_tokens": 1, "prompt_logprobs": NUM_CHOICES, "detokenize": False}
"""The same without the prefix cache, which a request for its prompt's log-probabilities does not read."""


class Sample(NamedTuple):
    """One completion as vLLM gives it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    versions: tuple[int, ...]
    """Version of the weights that sampled each token; empty where vLLM names one that no sync gave."""
    kept: KeptTokens | None = None
    """Of what vLLM told, what it kept; where likeliest tokens were asked for."""
    kept_is_whole: bool = True
    """Whether nothing that it kept was left untold."""


def num_likeliest(sampling: SamplingParams, vocabulary: int) -> int:
    """How many likeliest tokens to ask for, so that all that is kept are most likely among them; 0 for a whole support.

    Tokens that tie with the k-th of ``top_k`` are kept too, as neighbours in bfloat16 do: half of k and 16 more are asked for.
    """
    if not sampling.truncates_support or sampling.temperature == 0:
        return 0
    return min(vocabulary, sampling.top_k + sampling.top_k // 2 + 16 if sampling.top_k else NUM_TOLD)


def kept_tokens(
    token_ids: Sequence[int], logprobs: Sequence[float], firsts: Sequence[int], sizes: Sequence[int]
) -> tuple[KeptTokens, bool]:
    """What the tokens of a completion were drawn from.

    Args:
        token_ids: [M], told of n positions; of each the drawn token, and the likeliest, which may be the drawn one again.
        logprobs: [M], theirs; minus infinity for what was not kept.
        firsts: [n], where each position begins.
        sizes: [n], how many were told of it.

    Returns:
        What was kept, and whether it is all: of every position a token was told that was not kept.
    """
    tokens, begins = np.array(token_ids, dtype=np.int32), np.array(firsts, dtype=np.int64)
    kept = np.array(logprobs) > _OUTSIDE
    is_first = np.zeros(len(tokens), dtype=bool)
    is_first[begins] = True
    owner = np.repeat(np.arange(len(begins)), sizes)
    chosen = is_first | (kept & (tokens != tokens[begins][owner]))
    counts = np.bincount(owner[chosen], minlength=len(begins)).astype(np.int32)
    left_out = np.bincount(owner[~kept], minlength=len(begins))
    return KeptTokens(tokens[chosen], counts), bool((left_out > 0).all())


def sample_whole(
    sample: Callable[[list[Sequence[int]], list[dict[str, Any]]], list[list[Sample]]],
    prompts: Sequence[Sequence[int]],
    params: Sequence[dict[str, Any]],
    vocabulary: int,
) -> list[list[Sample]]:
    """Runs requests, and again those completions of which vLLM did not tell all that it kept, until it has.

    They run again from the same seed, with more tokens told. So the same tokens are drawn, up to the rounding of another batch:
    which completions are seen does not depend on how wide their supports are, and each has the support of its own draws.

    Args:
        sample: runs requests to their end.
        prompts: token ids.
        params: of vLLM's ``SamplingParams``, one each, with ``n`` and ``seed``.
        vocabulary: how many tokens there are.
    """
    answers = sample(list(prompts), list(params))
    told = max(each.get("logprobs", 0) for each in params)
    while 0 < told < vocabulary:
        partial = [
            (prompt, place)
            for prompt, group in enumerate(answers)
            for place, completion in enumerate(group)
            if not completion.kept_is_whole
        ]
        if not partial:
            break
        told = min(vocabulary, told * _MORE)
        again = sample(
            [prompts[prompt] for prompt, _ in partial],
            [params[prompt] | {"n": 1, "seed": params[prompt]["seed"] + place, "logprobs": told} for prompt, place in partial],
        )
        for (prompt, place), [completion] in zip(partial, again, strict=True):
            answers[prompt][place] = completion
    return answers


def token_versions(spans: Iterable[tuple[str, int, int]]) -> tuple[int, ...]:
    """The version of each token from vLLM's spans (version, start, end)."""
    listed = list(spans)
    if not all(version.isdecimal() for version, _, _ in listed):
        return ()
    if len(listed) == 1:
        [(version, start, end)] = listed
        return (int(version),) * (end - start)
    return tuple(chain.from_iterable(repeat(int(version), end - start) for version, start, end in listed))
