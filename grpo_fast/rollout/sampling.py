"""Sampling as pure tensor functions: which tokens stay, which one is drawn, and its log-probability.

With logits ``z`` [n, V], temperature ``t`` and kept support ``K``,

    log q(v) = z_v / t - logsumexp_{w in K}(z_w / t)   for v in K, and minus infinity outside,

and the token drawn for a uniform number ``u`` is the first whose cumulative probability exceeds ``u``. Everything is
float32 except the cumulative sum, which is float64: in float32, tokens rarer than 6e-8 vanish next to 1.

Uniform numbers come from a stateless hash of (seed, prompt, generation, position), not from a generator: a sequence
meets the same draws however the batch is cut, ordered or shrunk, on every device, and no global random state is read or
changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from grpo_fast.ops.draw_tokens import draw_tokens, runs_on

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from grpo_fast.rollout.engine import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

_NUCLEUS_WIDTH = 512
"""Tokens a nucleus search on a CPU sorts first; sorting a whole large vocabulary costs more than the model's step."""


class Draw(NamedTuple):
    """Tokens drawn for n rows."""

    tokens: torch.Tensor
    """int64 [n]."""
    logprobs: torch.Tensor
    """float32 [n], nats."""
    kept: torch.Tensor | None = None
    """bool [n, V]: what a cut support kept, not counted yet, for which the host would wait; ``None`` where it is whole."""


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def uniforms(seed: int, prompts: Sequence[int], generations: Sequence[int], num_positions: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), each a function of its own four coordinates alone.

    Args:
        seed: any integer; its low 64 bits count.
        prompts: n positions of a prompt in the call, counted from 0.
        generations: n generation indices, counted from 0.
        num_positions: token positions, counted from 0.

    Returns:
        float64 [num_positions, n], multiples of 2**-52, so that ``u * total < total`` holds in float64 for every total.

    Source:
        The mixer is splitmix64's (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    state = np.array([[seed & 0xFFFF_FFFF_FFFF_FFFF]], dtype=np.uint64)
    for coordinate in (
        np.array(prompts, dtype=np.uint64)[None, :],
        np.array(generations, dtype=np.uint64)[None, :],
        np.arange(num_positions, dtype=np.uint64)[:, None],
    ):
        state = _mix(state + (coordinate + np.uint64(1)) * _GOLDEN)
    return (state >> np.uint64(12)).astype(np.float64) * 2.0**-52


def truncate(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Sets logits outside the kept support to minus infinity: first ``min_p``, then ``top_k``, then ``top_p``, as in vLLM.

    Each filter sees the distribution that the one before it left, renormalised. Tokens that tie with the k-th stay.

    Args:
        logits: float32 [n, V], already divided by the temperature.
        sampling: which filters are on.

    Returns:
        float32 [n, V]; ``logits`` itself where no filter is on. At least the most probable token of a row stays.
    """
    if sampling.min_p > 0:
        floor = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < floor, -math.inf)
    if 0 < sampling.top_k < logits.shape[-1]:
        floor = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -math.inf)
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    return logits


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keeps the fewest most probable tokens whose mass reaches ``top_p``."""
    vocabulary = logits.shape[-1]
    probs = logits.softmax(-1)
    # On a GPU a full sort is cheaper than asking the host whether a part was enough.
    width = vocabulary if logits.is_cuda else min(vocabulary, _NUCLEUS_WIDTH)
    while True:
        top, index = probs.topk(width)
        reached = top.cumsum(-1, dtype=torch.float64)
        if width == vocabulary or bool((reached[:, -1] >= top_p).all()):
            break
        width = min(vocabulary, width * 8)
    kept = (reached - top < top_p) & (top > 0)
    cut = torch.full_like(logits, -math.inf)
    return cut.scatter_(-1, index, logits.gather(-1, index).masked_fill_(~kept, -math.inf))


def penalise(logits: torch.Tensor, present: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits with those of some tokens divided by ``penalty``, or, if negative, multiplied by it, as in transformers and vLLM.

    Args:
        logits: float32 [n, V], not yet divided by the temperature.
        present: bool [n, V], the tokens that prompt or completion hold already.
        penalty: above 0; 1 changes nothing.

    Source:
        CTRL, arXiv 1909.05858.
    """
    return torch.where(present, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: torch.Tensor, sampling: SamplingParams, draws: torch.Tensor, present: torch.Tensor | None = None) -> Draw:
    """Draws one token a row.

    At temperature 0 it is the most probable token, and its log-probability is that of the plain softmax (temperature 1, no
    filter): the point mass actually sampled from would give 0 for every token. Otherwise the log-probability is that of
    the distribution sampled from: at the temperature, renormalised over the support that the filters keep. Either is of the
    penalised logits, where repetition is.

    Args:
        logits: [n, V], any float type.
        sampling: how to sample.
        draws: float64 [n], uniform in [0, 1); not read at temperature 0.
        present: bool [n, V], for ``repetition_penalty``.

    Returns:
        Tokens, log-probabilities, and above temperature 0 what a cut support kept. A row of non-finite logits gives a NaN
        log-probability.
    """
    scaled = logits.float()
    if present is not None:
        scaled = penalise(scaled, present, sampling.repetition_penalty)
    if sampling.temperature == 0:
        chosen = scaled.argmax(-1, keepdim=True)
        return Draw(chosen[:, 0], scaled.log_softmax(-1).gather(-1, chosen)[:, 0])
    if not sampling.truncates_support and runs_on(scaled):
        return Draw(*draw_tokens(scaled, draws, sampling.temperature))
    if sampling.temperature != 1:
        scaled = scaled / sampling.temperature
    logprobs = truncate(scaled, sampling).log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    # The target stays strictly below the total, so the token found has a probability above 0. NaN rows find none: clamp.
    target = draws[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[-1] - 1)
    kept = logprobs > -math.inf if sampling.truncates_support else None
    return Draw(chosen[:, 0], logprobs.gather(-1, chosen)[:, 0], kept)
