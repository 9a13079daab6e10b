r"""Proof that an engine samples from the policy: both score the same tokens after the same fixed prompt.

The prompt is the same every time and two tokens longer than two blocks of the engine's prefix cache. The engine is asked what
comes after it, and then, from its cache, what comes after all of it but the last token: keys and values left over from older
weights would be used, and seen, and both its ways of computing are met, of a whole prompt and of one token after many. At each
it tells its log-probabilities q of the tokens it finds likeliest. With the policy's p of the same tokens, the estimate of the
divergence is the mean over both places of

.. math:: KL(q \| p) \approx \frac{\sum_i q_i (p_i / q_i - 1 - \log p_i / q_i)}{\sum_i q_i}

which is 0 only where all agree. All that is asked is known beforehand, so the policy can compute its part, in one pass, while
the engine still loads.

An engine in a short type rounds its logits, whose spacing u grows with them: in bfloat16 it is 0.25 from 32 on. Rounding shifts
each by u / 2 at most, so p is q times a factor whose logarithm lies in a range of u, and by Hoeffding's lemma

.. math:: KL(q \| p) = \log E_q e^{\delta} - E_q \delta \le u^2 / 8

As much again is allowed for the layers before the head. The policy's own head is computed in float32 and rounds nothing; that
of a sharded policy does, and takes the second share.

Source: the summand is the k3 of Schulman, "Approximating KL divergence" (2020); the lemma is equation 4.16 of Hoeffding,
"Probability inequalities for sums of bounded random variables" (1963).
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

NUM_PLACES = 2
"""Places of the prompt, its last, at which log-probabilities are compared."""
NUM_CHOICES = 20
"""Tokens whose log-probabilities an engine reports at each place: as many as vLLM reports by default."""

_MAX_KL = {torch.float32: 1e-8, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Nats a token, where logits are small: differences of 1.4e-4, 0.1 and 0.045 (root mean square) by rounding are allowed,
depending on the type."""
_HEAD_ROWS = 16384
"""Rows of the head that are converted to float32 at a time."""

Choices = Mapping[int, float]
"""Tokens with their log-probabilities."""


class Scores(NamedTuple):
    """The policy's scores of the prompt."""

    logprobs: torch.Tensor
    """Float64 [:data:`NUM_PLACES`, V], in the order of :attr:`SyncProbe.prompts`."""
    largest_logit: float
    """Largest absolute logit of the likeliest tokens."""


class Mismatch(NamedTuple):
    """Distance between two scorings of the same tokens."""

    kl: float
    """Nats a token."""
    largest: float
    """Largest difference of a token's log-probabilities, in nats."""


@dataclass(frozen=True, slots=True)
class SyncProbe:
    """A fixed prompt with the gate that the engine's answer must pass."""

    prompt: tuple[int, ...]
    max_kl: float
    """Largest divergence that rounding explains where logits are small."""
    autocast_dtype: torch.dtype | None = None
    """Type that the policy computes in under autocast; ``None`` is the type of its weights."""
    engine_dtype: torch.dtype = torch.float32
    """Type that the engine computes in and rounds its logits to."""

    @classmethod
    def build(
        cls,
        *,
        vocabulary: int,
        block_size: int,
        context_length: int,
        engine_dtype: torch.dtype,
        autocast_dtype: torch.dtype | None,
    ) -> SyncProbe:
        """Chooses the prompt: two blocks and two tokens, from the whole vocabulary.

        Args:
            vocabulary: V.
            block_size: tokens of a block of the engine's prefix cache.
            context_length: longest sequence of the engine, in tokens.
            engine_dtype: what the engine computes in; decides the gate.
            autocast_dtype: what the policy computes in.

        Raises:
            ValueError: no such prompt fits the context.
        """
        length = 2 * block_size + NUM_PLACES
        if length + 1 > context_length:
            raise ValueError(
                f"a sequence longer than two cache blocks of {block_size} tokens does not fit the context of {context_length}; "
                "choose a smaller block size"
            )
        generator = torch.Generator().manual_seed(20)
        prompt = torch.randint(vocabulary, (length,), generator=generator).tolist()
        return cls(tuple(prompt), _MAX_KL[engine_dtype], autocast_dtype, engine_dtype)

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The prompts of the probe, asked one after the other."""
        return [self.prompt, self.prompt[:-1]]

    def allowed(self, scores: Scores) -> float:
        """Largest divergence that rounding explains, in nats a token; see above."""
        spacing = torch.finfo(self.engine_dtype).eps * 2.0 ** (math.frexp(scores.largest_logit)[1] - 1)
        return max(self.max_kl, spacing**2 / 4)

    @torch.no_grad()
    def score(self, policy: torch.nn.Module) -> Scores:
        """The policy's log-probabilities after each of :attr:`prompts`."""
        device = next(policy.parameters()).device
        ids = torch.tensor([self.prompt], device=device)
        model = getattr(policy, "module", policy)
        # The head is dear, and most positions need none. By index: a slice would lie in strides, for which the head is copied.
        last = torch.arange(len(self.prompt) - NUM_PLACES, len(self.prompt), device=device)
        kept = {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        enabled = self.autocast_dtype is not None
        # No cast is needed twice, and fresh memory for all would cost more than they do: 0.65 against 0.41 s (0.5B, AMD EPYC).
        autocast = torch.autocast(device.type, dtype=self.autocast_dtype, enabled=enabled, cache_enabled=False)
        with autocast, self._whole_head(model):
            logits = policy(input_ids=ids, use_cache=False, **kept).logits[0, -NUM_PLACES:].double().flip(0).cpu()
        largest = logits.topk(min(NUM_CHOICES, logits.shape[-1])).values.abs().max().item()
        return Scores(logits.log_softmax(-1), largest)

    @contextlib.contextmanager
    def _whole_head(self, model: torch.nn.Module) -> Iterator[None]:
        """Has a head of a short type multiply the same numbers in float32; one that is sharded or quantised stays as it is."""
        head = getattr(model, "get_output_embeddings", lambda: None)()
        short = self.engine_dtype
        if short == torch.float32 or not isinstance(head, torch.nn.Linear) or hasattr(head.weight, "full_tensor"):
            yield
            return

        def multiply(_: torch.nn.Module, given: tuple[torch.Tensor, ...], __: torch.Tensor) -> torch.Tensor:
            hidden = given[0].to(short).float()
            with torch.autocast(hidden.device.type, enabled=False):
                parts = [hidden @ rows.to(short).float().T for rows in head.weight.split(_HEAD_ROWS)]
            logits = torch.cat(parts, -1)
            return logits if head.bias is None else logits + head.bias.to(short)

        handle = head.register_forward_hook(multiply)
        try:
            yield
        finally:
            handle.remove()


def compare(own: torch.Tensor, theirs: Sequence[Choices]) -> Mismatch:
    """Distance of an engine's log-probabilities from the policy's.

    Args:
        own: the policy's [:data:`NUM_PLACES`, V].
        theirs: the engine's, of the same places.
    """
    kl, largest = 0.0, 0.0
    for logprobs, choices in zip(own, theirs, strict=True):
        told = torch.tensor(list(choices.values()), dtype=torch.float64)
        difference = logprobs[list(choices)] - told
        kl += (told.softmax(0) * (difference.expm1() - difference)).sum().item() / len(theirs)
        largest = torch.maximum(torch.tensor(largest), difference.abs().max()).item()  # NaN stays
    return Mismatch(kl, largest)
