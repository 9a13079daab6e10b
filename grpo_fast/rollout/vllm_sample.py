"""Requests to vLLM and its answers, in this process and over HTTP alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
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
"""Sampling parameters of the prompts of a sync's probe."""
_MORE = 8
"""So many times as many are asked for where that was too few."""
_AT_ONCE = 1024
"""Positions that are asked for again at a time: what is told of one may be the whole vocabulary."""
_FLATTEST = 0.25
"""Of ``min_p`` as many are asked for as are kept where the likeliest token has no less than this probability."""
_TOLD_BYTES = 4 * 2**30
_FEWEST_TOLD = 64
_OUTSIDE = -9999.0
"""A server's value for minus infinity, which JSON does not have."""
SCORE_PARAMS: dict[str, Any] = {"temperature": 1.0, "max_tokens": 1, "prompt_logprobs": NUM_CHOICES, "detokenize": False}
"""The same without the prefix cache, which a request for prompt log-probabilities does not read."""


class Telling(NamedTuple):
    """The costs of vLLM's answers with most likely tokens."""

    num_first: int
    """Number asked for first under ``top_p``, which does not limit how many are kept: the cheapest that was measured
    (``benchmarks/rollout/supports.py``)."""
    entry_bytes: int
    """Host memory of one, until its completion is whole."""


IN_PROCESS = Telling(1024, 96)
OVER_HTTP = Telling(256, 512)


class Sample(NamedTuple):
    """One completion as vLLM gives it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    versions: tuple[int, ...]
    """Version of the weights that sampled each token; empty where vLLM names one that no sync of the run gave."""
    kept: KeptTokens | None = None
    """The tokens that vLLM kept, if most likely tokens were asked for."""
    short: tuple[int, ...] = ()
    """Positions of which it may have kept more than it told."""


def num_likeliest(sampling: SamplingParams, vocabulary: int, telling: Telling, num_completions: int = 1) -> int:
    """How many likeliest tokens to ask for first; 0 for a whole support.

    Tokens that tie with the k-th of ``top_k`` are kept too, as neighbours in bfloat16 do: half of k and 16 more are asked for.
    ``min_p`` keeps no more than 1 / (min_p p) where the likeliest token has the probability p. Without ``top_k`` they take no
    more than 4 GiB together, or are 64: what is kept of other tokens is asked for again.

    Args:
        sampling: how to sample.
        vocabulary: how many tokens there are.
        telling: what one takes.
        num_completions: how many there will be at once.
    """
    if not sampling.truncates_support or sampling.temperature == 0:
        return 0
    if sampling.top_k:
        return min(vocabulary, sampling.top_k + sampling.top_k // 2 + 16)
    most = math.ceil(1 / (sampling.min_p * _FLATTEST)) if sampling.min_p else vocabulary
    room = _TOLD_BYTES // (telling.entry_bytes * num_completions * sampling.max_tokens)
    return min(vocabulary, telling.num_first, most, max(_FEWEST_TOLD, room))


def kept_tokens(
    token_ids: Sequence[int], logprobs: Sequence[float], firsts: Sequence[int], sizes: Sequence[int]
) -> tuple[KeptTokens, tuple[int, ...]]:
    """The tokens that each token of a completion was drawn from.

    Args:
        token_ids: [M], told of n positions; of each the drawn token, and the likeliest, which may be the drawn one again.
        logprobs: [M], theirs; minus infinity for what was not kept.
        firsts: [n], where each position begins.
        sizes: [n], how many were told of it.

    Returns:
        What was kept, and the positions of which it may not be all: every token that was told of them was kept.
    """
    tokens, begins = np.array(token_ids, dtype=np.int32), np.array(firsts, dtype=np.int64)
    kept = np.array(logprobs) > _OUTSIDE
    is_first = np.zeros(len(tokens), dtype=bool)
    is_first[begins] = True
    owner = np.repeat(np.arange(len(begins)), sizes)
    chosen = is_first | (kept & (tokens != tokens[begins][owner]))
    counts = np.bincount(owner[chosen], minlength=len(begins)).astype(np.int32)
    left_out = np.bincount(owner[~kept], minlength=len(begins))
    return KeptTokens(tokens[chosen], counts), tuple(np.flatnonzero(left_out == 0).tolist())


def sample_whole(
    sample: Callable[[list[Sequence[int]], list[dict[str, Any]]], list[list[Sample]]],
    prompts: Sequence[Sequence[int]],
    params: Sequence[dict[str, Any]],
    vocabulary: int,
) -> list[list[Sample]]:
    """Runs requests, and asks again for those positions of which vLLM did not tell all that it kept, until it has.

    What comes before such a position is a prompt then, most of it in vLLM's prefix cache, and one more token is drawn, for the
    sake of the support that is told with it. That support is up to rounding the one that the completion's token was drawn from:
    where two batches are rounded differently, a token at a filter's very edge may be on either side. Completions themselves do
    not depend on how much is told. Where other weights are in force meanwhile, they run again from the same seed.

    Args:
        sample: runs requests to their end.
        prompts: token ids.
        params: of vLLM's ``SamplingParams``, one each, with ``n`` and ``seed``.
        vocabulary: how many tokens there are.
    """
    answers = sample(list(prompts), list(params))
    told = max(each.get("logprobs", 0) for each in params)
    if told >= vocabulary:
        return answers
    while places := _short_places(answers):
        told = min(vocabulary, told * _MORE)
        outdated: set[_Completion] = set()
        for first in range(0, len(places), _AT_ONCE):
            part = places[first : first + _AT_ONCE]
            before: list[Sequence[int]] = [
                [*prompts[prompt], *answers[prompt][place].token_ids[:position]] for (prompt, place), position in part
            ]
            one_more = {"n": 1, "max_tokens": 1, "logprobs": told}
            again = sample(before, [params[prompt] | one_more for (prompt, _), _ in part])
            for (prompt, place), of_one in groupby(zip(part, again, strict=True), key=lambda pair: pair[0][0]):
                group, found = answers[prompt], {position: one for (_, position), [one] in of_one}
                group[place] = _with_supports(group[place], found, is_all=told == vocabulary)
                if any(one.versions != group[place].versions[at : at + 1] for at, one in found.items()):
                    outdated.add((prompt, place))
        if outdated:
            runs = sorted(outdated)
            seeded = [params[prompt] | {"n": 1, "seed": params[prompt]["seed"] + place} for prompt, place in runs]
            for (prompt, place), [whole] in zip(runs, sample([prompts[prompt] for prompt, _ in runs], seeded), strict=True):
                answers[prompt][place] = whole
    return answers


_Completion = tuple[int, int]
"""Its prompt, and its place among those of the prompt."""


def _short_places(answers: Sequence[Sequence[Sample]]) -> list[tuple[_Completion, int]]:
    return [
        ((prompt, place), position)
        for prompt, group in enumerate(answers)
        for place, completion in enumerate(group)
        for position in completion.short
    ]


def _with_supports(completion: Sample, found: dict[int, Sample], *, is_all: bool) -> Sample:
    """Puts what was told of single positions in place of what had been told of them."""
    assert completion.kept is not None
    supports = np.split(completion.kept.token_ids, np.cumsum(completion.kept.sizes)[:-1])
    for position, one in found.items():
        assert one.kept is not None
        drawn = completion.token_ids[position]
        rest = one.kept.token_ids[one.kept.token_ids != drawn]
        supports[position] = np.concatenate([np.array([drawn], dtype=np.int32), rest])
    sizes = np.array([len(support) for support in supports], dtype=np.int32)
    untold = set() if is_all else {position for position, one in found.items() if one.short}
    short = tuple(position for position in completion.short if position in untold or position not in found)
    return completion._replace(kept=KeptTokens(np.concatenate(supports), sizes), short=short)


def version_name(version: int, run: str) -> str:
    """What vLLM is told that weights are called: numbers alone would be the same of two runs that share a server.

    Args:
        version: counts a run's updates.
        run: a name that no other has.
    """
    return f"{version}@{run}"


def version_number(name: str, run: str) -> int | None:
    """The version that :func:`version_name` made a name of; ``None`` for weights of another run, or of none."""
    number, _, owner = name.partition("@")
    return int(number) if owner == run and number.isdecimal() else None


def token_versions(spans: Iterable[tuple[str, int, int]], run: str) -> tuple[int, ...]:
    """The version of each token from vLLM's spans (name of the weights, start, end); empty where any are not this run's."""
    found: list[int] = []
    for name, start, end in spans:
        version = version_number(name, run)
        if version is None:
            return ()
        found += [version] * (end - start)
    return tuple(found)
