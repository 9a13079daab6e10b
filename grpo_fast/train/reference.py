"""The reference policy of the KL term: the policy as it began, or one that follows it.

A reference that follows is another model with weights of its own. Every ``ref_model_sync_steps`` steps each of them moves the
share ``ref_model_mixup_alpha`` of the way to the trained one, computed in float32; of a sharded policy each rank moves its own
shards. Checkpoints hold its weights as ``torch.distributed.checkpoint`` writes them, for any number of ranks to read.

Source: TR-DPO, arXiv 2404.09656; TRL 1.16 ``sync_ref_model``.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from grpo_fast.config import Config
from grpo_fast.train.distributed import World
from grpo_fast.train.head_part import Head
from grpo_fast.train.policy import BasePolicy, Policy, Scorer
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.train.shard_files import load_shards, save_shards
from grpo_fast.train.sharding import ShardedPolicy, load_reference
from grpo_fast.types import TokenBatch


class MovingReference:
    """A reference policy that follows the trained one.

    Args:
        reference: a copy of the policy's start, sharded if it is.
        policy: the trained one.
        alpha: share of the way that a move takes.
        steps: from one move to the next.
    """

    def __init__(self, reference: Policy, policy: Policy, *, alpha: float, steps: int) -> None:
        self._reference = reference
        self._policy = policy
        self._alpha = alpha
        self._steps = steps

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of it."""
        return isinstance(self._reference, ShardedPolicy)

    def scored_hidden_states(self, batch: TokenBatch) -> torch.Tensor:
        """Hidden states [T, H] that predict the batch's targets."""
        return self._reference.scored_hidden_states(batch)

    def head(self, temperature: float) -> Head:
        """The head that turns them into logits."""
        return self._reference.head(temperature)

    def whole_head(self, *, trains: bool) -> contextlib.AbstractContextManager[None]:
        """Context in which the head may be read."""
        return self._reference.whole_head(trains=trains)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Moves after a step whose number is a multiple of ``steps``."""
        if step % self._steps:
            return
        own, trained = weights_of(self._reference), weights_of(self._policy)
        for name, weight in own.items():
            here, there = (part.to_local() if isinstance(part, DTensor) else part for part in (weight, trained[name]))
            here.copy_(torch.lerp(here.float(), there.float(), self._alpha))

    def save(self, directory: Path) -> None:
        """Writes its weights; of a sharded one every rank writes its part, otherwise one rank writes all."""
        save_shards(weights_of(self._reference), directory, alone=not self.is_sharded)

    def load(self, directory: Path) -> None:
        """Puts back what any number of ranks wrote, bit for bit; all ranks of a run have to."""
        load_shards(weights_of(self._reference), directory)


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    """A policy's weights by name, as it keeps them; of a sharded one its shards."""
    if isinstance(policy, ShardedPolicy):
        policy.reshard()  # what forward passes have left gathered hides the shards
    return {name: weight.detach() for name, weight in policy.model.named_parameters()}


def build_reference(source: PolicySource, policy: Policy, *, config: Config, world: World) -> Scorer:
    """The reference of a policy that has just been loaded from ``source``; one that follows becomes the policy's follower."""
    if policy.adapters is not None and not (policy.adapters.begun and policy.sums_gradients):
        return BasePolicy(policy, policy.adapters)
    if policy.sums_gradients:
        reference: Policy = load_reference(source, config=config, world=world)
    else:
        reference = world.each(source.load)
    if not config.sync_ref_model:
        return reference
    moving = MovingReference(reference, policy, alpha=config.ref_model_mixup_alpha, steps=config.ref_model_sync_steps)
    policy.follower = moving
    return moving
