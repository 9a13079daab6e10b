"""The loss over a head that is whole on this rank, or of which it holds a part of the vocabulary.

A whole head goes through the one pass of :func:`~grpo_fast.ops.fused_grpo`. Of one in parts, ranks bring their hidden rows
together, and each makes the logits of its own part: what is exchanged grows with the tokens, not with the vocabulary. Tokens of
a cut support need a whole head, and few of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.distributed as dist

from grpo_fast.config import ConfigError
from grpo_fast.ops import (
    FusedLoss,
    Kept,
    LMHead,
    LossBatch,
    LossSpec,
    fused_grpo,
    gathered_token_logprob,
    kept_logprob,
    policy_loss,
    token_logprob,
)


@dataclass(frozen=True, slots=True, eq=False)
class HeadPart:
    """A rank's part of a head."""

    part: LMHead
    """Its rows of weight and bias."""
    first_token: int
    """Token of the first of them."""
    group: dist.ProcessGroup | None = None
    """Ranks that hold the others; each has to take part in every call."""

    def score(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies, each [T], of this rank's rows."""
        return gathered_token_logprob(hidden, self.part, targets=targets, first_token=self.first_token, group=self.group)


Head: TypeAlias = LMHead | HeadPart


def first_token_of(vocabulary: int, *, num_ranks: int, rank: int) -> int:
    """First token of a rank's part of the vocabulary, cut as FSDP cuts rows: all parts but the last are equally long.

    Raises:
        ConfigError: a rank has none.
    """
    each = -(-vocabulary // num_ranks)
    if each * (num_ranks - 1) >= vocabulary:
        raise ConfigError(
            f"fsdp_parallel_head=True: a vocabulary of {vocabulary} leaves one of {num_ranks} ranks without a part of it; set "
            "fsdp_parallel_head=False"
        )
    return each * rank


def head_loss(
    hidden: torch.Tensor, head: Head, *, targets: torch.Tensor, batch: LossBatch, spec: LossSpec, kept: Kept | None = None
) -> FusedLoss:
    """Loss of this rank's rows, over the tokens that were kept where some were not; see :func:`~grpo_fast.ops.fused_grpo`."""
    if isinstance(head, LMHead) and kept is None:
        return fused_grpo(hidden, head, targets=targets, batch=batch, spec=spec)
    logprobs, entropy = _score(hidden, head, targets, kept)
    result = policy_loss(logprobs, batch, spec=spec, entropy=entropy)
    return FusedLoss(result.loss, result.metrics, logprobs.detach(), entropy.detach())


def head_scores(
    hidden: torch.Tensor, head: Head, *, targets: torch.Tensor, kept: Kept | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies, each [T], of this rank's rows, as :func:`head_logprobs`."""
    if isinstance(head, LMHead) and kept is None:
        logprobs, entropy = token_logprob(hidden, head, targets=targets)
        assert entropy is not None
        return logprobs, entropy
    return _score(hidden, head, targets, kept)


def head_logprobs(hidden: torch.Tensor, head: Head, *, targets: torch.Tensor, kept: Kept | None = None) -> torch.Tensor:
    """Log-probabilities [T] of this rank's rows, among the kept tokens where some were not."""
    if isinstance(head, LMHead) and kept is None:
        return token_logprob(hidden, head, targets=targets, want_entropy=False)[0]
    return _score(hidden, head, targets, kept)[0]


def _score(hidden: torch.Tensor, head: Head, targets: torch.Tensor, kept: Kept | None) -> tuple[torch.Tensor, torch.Tensor]:
    if kept is None:
        assert isinstance(head, HeadPart)
        return head.score(hidden, targets)
    if isinstance(head, HeadPart):
        raise ConfigError("top_p, top_k and min_p need the whole output head on every rank; set fsdp_parallel_head=False")
    return kept_logprob(hidden, head, kept=kept)
