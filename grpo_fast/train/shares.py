"""Rollouts and rewards of a step, shared out over the ranks and then known to all.

To the loop both look as in one process. A sequence's draws depend on its prompt's place in the whole step, so that the number
of ranks changes nothing that is sampled but ties that the last bit of a logit decides. A reward function sees the groups of its
own rank in a call, as it sees those of one worker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from grpo_fast.config import Config
from grpo_fast.rewards import RewardPool, RewardReport
from grpo_fast.rewards.report import Tally
from grpo_fast.rollout.engine import RolloutEngine, SamplingParams
from grpo_fast.rollout.vllm_sleep import free_unused
from grpo_fast.train.distributed import World
from grpo_fast.train.streaming import Once
from grpo_fast.types import Completion, Group, TrainerState

if TYPE_CHECKING:
    import torch


def idle_ranks(config: Config, num_ranks: int) -> list[str]:
    """The warning that a step has fewer prompts than ranks, each of which samples for whole prompts."""
    idle = num_ranks - config.prompts_per_step
    if idle <= 0:
        return []
    told = f"prompts_per_step={config.prompts_per_step} with {num_ranks} ranks: in each step {idle} sample nothing, and wait"
    return [f"{told}; raise prompts_per_step, or start fewer"]


class SharedEngine:
    """Every rank's engine answers its share of the prompts; implements :class:`~grpo_fast.rollout.engine.RolloutEngine`.

    Args:
        engine: of this rank.
        world: the ranks.
    """

    def __init__(self, engine: RolloutEngine, world: World) -> None:
        self._engine = engine
        self._world = world

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
        """Samples all completions; see the protocol.

        Raises:
            RolloutError: the engine of any rank failed.
        """
        share = self._world.share(len(prompts))

        def own() -> list[list[Completion]]:
            if not prompts[share]:
                return []
            return self._engine.generate(
                prompts[share],
                sampling,
                num_generations=num_generations,
                seed=seed,
                first_prompt=first_prompt + share.start,
                max_tokens=None if max_tokens is None else max_tokens[share],
            )

        return [group for part in self._world.gather(own) for group in part]

    def sync_weights(self, policy: torch.nn.Module, version: int) -> dict[str, float]:
        """Gives every rank's engine its weights.

        Returns:
            Rank 0's metrics.

        Raises:
            WeightSyncError: any of them may hold other weights.
        """
        return self._world.gather(lambda: self._engine.sync_weights(policy, version))[0]

    def sleep(self) -> None:
        """Puts every rank's engine to sleep.

        Raises:
            RolloutError: that of any rank failed.
        """
        self._world.gather(self._engine.sleep)

    def close(self) -> None:
        """Closes this rank's engine."""
        self._engine.close()


class MainEngine:
    """Rank 0 speaks to the servers, for all; implements :class:`~grpo_fast.rollout.engine.RolloutEngine`.

    Args:
        build: makes rank 0's engine.
        world: the ranks.
        reading: makes them gather the weights that the engine reads; ``None`` where rank 0 has them whole.
    """

    def __init__(self, build: Callable[[], RolloutEngine], world: World, *, reading: Once | None = None) -> None:
        self._engine: RolloutEngine | None = None
        self._ranks = world
        self._reading = reading or world
        self._sleeps = False

        def keep() -> None:
            self._engine = build()

        self._reading.once(keep)

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
        """Samples all completions, however long that takes; see the protocol.

        Raises:
            RolloutError: the engine failed.
        """
        return self._ranks.patiently(
            lambda: self._main().generate(
                prompts,
                sampling,
                num_generations=num_generations,
                seed=seed,
                first_prompt=first_prompt,
                max_tokens=max_tokens,
            )
        )

    def sync_weights(self, policy: torch.nn.Module, version: int) -> dict[str, float]:
        """Sends the policy's weights; a server that sleeps wakes on the GPUs of several ranks, which make room first.

        Raises:
            WeightSyncError: the engine may hold other weights.
        """
        if self._sleeps:
            self._ranks.gather(free_unused)
        metrics = self._reading.once(lambda: self._main().sync_weights(policy, version))
        self._sleeps = False
        return metrics

    def sleep(self) -> None:
        """Puts rank 0's engine to sleep.

        Raises:
            RolloutError: it failed.
        """
        self._sleeps = True
        self._reading.once(lambda: self._main().sleep())

    def close(self) -> None:
        """Closes rank 0's engine."""
        if self._engine is not None:
            self._engine.close()

    def _main(self) -> RolloutEngine:
        assert self._engine is not None
        return self._engine


class SharedRewards:
    """Every rank's pool scores its share of the groups.

    Args:
        pool: of this rank.
        world: the ranks.
    """

    def __init__(self, pool: RewardPool, world: World) -> None:
        self._pool = pool
        self._world = world

    def start(self, columns: Sequence[str] | None = None) -> None:
        """Starts every rank's workers; see :meth:`~grpo_fast.rewards.RewardPool.start`.

        Raises:
            ValueError: a function cannot be found, imported or loaded.
            RewardError: a worker ends or hangs while it loads the functions.
        """
        self._world.gather(lambda: self._pool.start(columns))

    def score(self, groups: Sequence[Group], state: TrainerState | None = None) -> RewardReport:
        """Fills ``rewards``, ``reward`` and ``extra`` of every group; see :meth:`~grpo_fast.rewards.RewardPool.score`.

        Raises:
            RewardError: a call failed on any rank, and ``on_error`` is ``raise``.
        """
        own = groups[self._world.share(len(groups))]
        known = replace(state or TrainerState(), is_world_process_zero=self._world.is_main)
        tally = Tally.joined(self._world.gather(lambda: self._pool.tally(own, known)))
        tally.fill(groups, self._pool.weights)
        return tally.report()

    def close(self) -> None:
        """Ends this rank's workers."""
        self._pool.close()


Rewards = RewardPool | SharedRewards
"""Scores groups."""
