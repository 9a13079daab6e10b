r"""Proof that an engine samples from the policy: both score the same sampled tokens after the same fixed prompt.

With the engine's log-probabilities q and the policy's p of tokens that the engine sampled, the estimate of the divergence is

.. math:: KL(q \| p) \approx \frac{1}{n} \sum_t e^{p_t - q_t} - 1 - (p_t - q_t)

which is 0 only where all agree. The prompt is the same every time and longer than two blocks of the engine's prefix cache, so
that keys and values left over from older weights would be used, and seen.

Source: the estimator is k3 of Schulman, "Approximating KL divergence" (2020).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

NUM_SAMPLES = 2
"""Completions of the probe's prompt."""
NUM_TOKENS = 8
"""Tokens of each."""

_MAX_KL = {torch.float32: 1e-8, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Nats a token: differences of 1.4e-4, 0.1 and 0.045 (root mean square) by rounding are allowed, depending on the type."""


class Mismatch(NamedTuple):
    """How far two scorings of the same tokens are apart."""

    kl: float
    """Nats a token."""
    largest: float
    """Largest difference of a token's log-probabilities, in nats."""


@dataclass(frozen=True, slots=True)
class SyncProbe:
    """A fixed prompt with the gate that the engine's answer must pass."""

    prompt: tuple[int, ...]
    max_kl: float
    """Largest divergence that rounding explains."""
    autocast_dtype: torch.dtype | None = None
    """What the policy computes in under autocast; ``None`` is the type of its weights."""

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
        """Chooses the prompt: two blocks and a half, of tokens from the whole vocabulary.

        Args:
            vocabulary: V.
            block_size: tokens of a block of the engine's prefix cache.
            context_length: longest sequence of the engine, in tokens.
            engine_dtype: what the engine computes in; decides the gate.
            autocast_dtype: what the policy computes in.

        Raises:
            ValueError: no such prompt fits the context.
        """
        length = 2 * block_size + block_size // 2
        if length + NUM_TOKENS > context_length:
            raise ValueError(
                f"a sequence longer than two cache blocks of {block_size} tokens does not fit the context of {context_length}; "
                "choose a smaller block size"
            )
        generator = torch.Generator().manual_seed(20)
        prompt = torch.randint(vocabulary, (length,), generator=generator).tolist()
        return cls(tuple(prompt), _MAX_KL[engine_dtype], autocast_dtype)

    @torch.no_grad()
    def score(self, policy: torch.nn.Module, completions: Sequence[Sequence[int]]) -> torch.Tensor:
        """The policy's log-probabilities, float64 [n, tokens], of equally long completions of the prompt."""
        device = next(policy.parameters()).device
        ids = torch.tensor([[*self.prompt, *tokens] for tokens in completions], device=device)
        forward = getattr(policy, "module", policy).forward
        last = {"logits_to_keep": ids.shape[1] - len(self.prompt) + 1}  # the head is dear, and most positions need none
        kept = last if "logits_to_keep" in inspect.signature(forward).parameters else {}
        with torch.autocast(device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            logits = policy(input_ids=ids, use_cache=False, **kept).logits[:, -last["logits_to_keep"] : -1]
        chosen: torch.Tensor = logits.double().log_softmax(-1).gather(-1, ids[:, len(self.prompt) :, None])
        return chosen[..., 0].cpu()

    def compare(
        self, policy: torch.nn.Module, completions: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]
    ) -> Mismatch:
        """How far the engine's ``logprobs`` of its ``completions`` are from the policy's."""
        difference = self.score(policy, completions) - torch.tensor(logprobs, dtype=torch.float64)
        kl = (difference.expm1() - difference).mean()
        return Mismatch(kl.item(), difference.abs().max().item())
