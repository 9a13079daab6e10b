"""What is asked of vLLM and what comes back, in this process and over HTTP alike."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo_fast.kept_tokens import KeptTokens
from grpo_fast.rollout.engine import RolloutError
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
    likeliest: tuple[dict[int, float], ...] = ()
    """Of each token, the log-probabilities of as many likeliest as were asked for, and its own; empty where none were."""


def num_likeliest(sampling: SamplingParams, vocabulary: int) -> int:
    """How many likeliest tokens to ask for, so that all that ``top_k`` keeps are among them; 0 for a whole support.

    Tokens that tie with the k-th are kept too, as neighbours in bfloat16 do: half of k and 16 more are asked for.

    Raises:
        ValueError: a support without bound.
    """
    if not sampling.truncates_support or sampling.temperature == 0:
        return 0
    if not sampling.top_k:
        raise ValueError(
            f"top_p={sampling.top_p:g}, top_k=0, min_p={sampling.min_p:g}: vLLM tells which tokens it kept only of so many "
            "likeliest, and nothing bounds how many these are; set top_k too (top_k=20, or in a small vocabulary "
            f"top_k={vocabulary})"
        )
    return min(vocabulary, sampling.top_k + sampling.top_k // 2 + 16)


def kept_tokens(sample: Sample, *, asked: int, vocabulary: int) -> KeptTokens:
    """What the tokens of a completion were drawn from.

    Args:
        sample: with its likeliest tokens.
        asked: how many of them.
        vocabulary: how many there are.

    Raises:
        RolloutError: vLLM kept more than were asked for, so that some are not known; or it did not tell of every token.
    """
    if len(sample.likeliest) != len(sample.token_ids):
        raise RolloutError(f"vLLM told the likeliest of {len(sample.likeliest)} of {len(sample.token_ids)} tokens")
    supports = []
    for token, likeliest in zip(sample.token_ids, sample.likeliest, strict=True):
        kept = [other for other, logprob in likeliest.items() if logprob > _OUTSIDE]
        if len(kept) == len(likeliest) < vocabulary:
            raise RolloutError(
                f"vLLM kept more than {asked} tokens beside {token}, for ties with the last of top_k: which ones is not known; "
                "take a larger top_k, or dtype='float32'"
            )
        supports.append(kept)
    return KeptTokens.of(sample.token_ids, supports)


def token_versions(spans: Iterable[tuple[str, int, int]]) -> tuple[int, ...]:
    """The version of each token from vLLM's spans (version, start, end)."""
    listed = list(spans)
    if not all(version.isdecimal() for version, _, _ in listed):
        return ()
    return tuple(chain.from_iterable(repeat(int(version), end - start) for version, start, end in listed))
