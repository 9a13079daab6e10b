"""What is asked of vLLM and what comes back, in this process and over HTTP alike."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat
from typing import Any, NamedTuple

from grpo_fast.rollout.sync_probe import NUM_CHOICES

PROBE_PARAMS: dict[str, Any] = {
    "temperature": 0.0,
    "max_tokens": 1,
    "logprobs": NUM_CHOICES,
    "ignore_eos": True,
    "detokenize": False,
}
"""How a prompt of a sync's probe is answered."""
SCORE_PARAMS: dict[str, Any] = {"temperature": 1.0, "max_tokens": 1, "prompt_logprobs": NUM_CHOICES, "detokenize": False}
"""The same without the prefix cache, which a request for its prompt's log-probabilities does not read."""


class Sample(NamedTuple):
    """One completion as vLLM gives it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    versions: tuple[int, ...]
    """Version of the weights that sampled each token; empty where vLLM names one that no sync gave."""


def token_versions(spans: Iterable[tuple[str, int, int]]) -> tuple[int, ...]:
    """The version of each token from vLLM's spans (version, start, end)."""
    listed = list(spans)
    if not all(version.isdecimal() for version, _, _ in listed):
        return ()
    return tuple(chain.from_iterable(repeat(int(version), end - start) for version, start, end in listed))
