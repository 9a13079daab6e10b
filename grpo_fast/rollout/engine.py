"""The protocol of rollout engines: all that the trainer needs of anything that samples completions.

The trainer knows this protocol and nothing else: transformers, vLLM in-process and vLLM servers all stand behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from grpo_fast.types import Completion, TrainingError

if TYPE_CHECKING:
    import torch


class RolloutError(TrainingError):
    """The engine cannot sample any more; the message says what happened to it."""


class WeightSyncError(RolloutError):
    """The engine does not have the policy's weights, or that cannot be proven; nothing was sampled from its weights."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are sampled; names as in vLLM.

    Raises:
        ValueError: a value outside its range, with the field named.
    """

    max_tokens: int
    """Longest completion, in tokens, end token included."""
    temperature: float = 1.0
    """Divides the logits; 0 means greedy."""
    top_p: float = 1.0
    """Nucleus mass kept; 1 keeps all."""
    top_k: int = 0
    """Most probable tokens kept; 0 keeps all."""
    min_p: float = 0.0
    """Tokens under this share of the top probability are dropped; 0 drops none."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that prompt or completion hold already, and multiplies the negative ones."""
    other: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that the engine's own sampler knows besides these."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; the text is cut before the string, the tokens are kept."""

    def __post_init__(self) -> None:
        checks = {
            "max_tokens must be at least 1": self.max_tokens >= 1,
            "temperature must be 0 (greedy) or more": self.temperature >= 0,
            "top_p must lie in (0, 1]": 0 < self.top_p <= 1,
            "top_k must be 0 (off) or more": self.top_k >= 0,
            "min_p must lie in [0, 1)": 0 <= self.min_p < 1,
            "repetition_penalty must be above 0": self.repetition_penalty > 0,
        }
        for message, holds in checks.items():
            if not holds:
                raise ValueError(f"{message}, got {getattr(self, message.split()[0])!r}")

    @property
    def changes_of_logits(self) -> dict[str, Any]:
        """What the sampler does to logits before the temperature and the filters, by vLLM's names."""
        return {"repetition_penalty": self.repetition_penalty, **self.other}

    @property
    def truncates_support(self) -> bool:
        """Whether sampling is from less than the whole softmax, so that log-probs are of a cut distribution."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions from the current policy."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        num_generations: int,
        seed: int,
        first_prompt: int = 0,
        max_tokens: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Samples ``num_generations`` completions for each prompt.

        Args:
            prompts: P token-id sequences, none empty.
            sampling: how to sample.
            num_generations: G.
            seed: decides every random draw of the call; the same call with the same weights gives the same answer.
            first_prompt: place of the first prompt in a larger call of which this is a part: draws are those that it has there.
            max_tokens: [P], longest completion of each prompt where they differ, none above ``sampling.max_tokens``.

        Returns:
            P lists of G completions, in the order of ``prompts``.

        Raises:
            RolloutError: the engine has died or does not answer.
        """
        ...

    def sync_weights(self, policy: torch.nn.Module, version: int) -> dict[str, float]:
        """Makes ``policy``'s weights the ones that the next ``generate`` samples from.

        Returns:
            ``sync/...`` metrics; empty where nothing had to move.

        Raises:
            WeightSyncError: the engine may hold other weights than ``policy``; it must not be sampled from.
        """
        ...

    def sleep(self) -> None:
        """Frees the memory that can be spared until the next :meth:`sync_weights`; before it :meth:`generate` may refuse.

        Raises:
            RolloutError: the engine failed.
        """
        ...

    def close(self) -> None:
        """Frees the engine's resources; calling it twice is harmless."""
        ...
