"""Rewards of a policy outside training: on held-out prompts, and before its first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from grpo_fast.config import Config
from grpo_fast.metrics import PhaseTimer, mean_known
from grpo_fast.train.collect import charge_rollout, sampling_params, trainer_state
from grpo_fast.train.episodes import Sampler
from grpo_fast.train.logged import named_apart
from grpo_fast.train.parts import Parts
from grpo_fast.train.rng import derive_seed
from grpo_fast.types import Group, Prompt, TrainerState

Tell: TypeAlias = Callable[[str, str], None]
"""Takes an event's name and its words."""


def evaluate(config: Config, parts: Parts, state: TrainerState | None = None, *, tell: Tell) -> dict[str, float]:
    """Answers the held-out prompts, by default once each and greedily, and measures the rewards.

    The same draws are made each time, so that what changes is the policy's doing.

    Args:
        config: the run's configuration.
        parts: engine, held-out prompts and the evaluation's reward pool.
        state: how far the run is, for reward functions that ask; without one, nothing is done yet.
        tell: takes a warning for each call that failed and was only counted.

    Returns:
        ``eval_reward``, the mean over the answers; NaN where none has a reward. Of several reward functions it is that of their
        weighted sum, as in training, and ``eval_rewards/NAME/mean`` is that of each. What they log is ``eval_METRIC``.
    """
    if not parts.eval_prompts:
        return {"eval_reward": math.nan}
    groups = answers(config, parts.sampler, parts.eval_prompts, state)
    report = parts.eval_rewards.score(groups, state)
    for problem in report.problems:
        tell("warn", problem)
    each = {f"eval_rewards/{name}/mean": mean for name, mean in report.mean.items()} if len(report.mean) > 1 else {}
    own = {"eval_reward": mean_known(value for group in groups for value in group.reward)} | each
    names = [name.removeprefix("eval_") for name in own]
    return own | {f"eval_{name}": mean for name, mean in named_apart(report.logged, [*names, "rewards"]).items()}


def answers(config: Config, sampler: Sampler, prompts: Sequence[Prompt], state: TrainerState | None = None) -> list[Group]:
    """Answers to held-out prompts, sampled as the configuration says for evaluations, not yet scored."""
    if config.eval_temperature:
        sampling = replace(sampling_params(config), temperature=config.eval_temperature)
    else:
        sampling = replace(sampling_params(config), temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
    seed = derive_seed(config.seed, 0, 1)  # the probe has (0, 0), and training its steps from 1 on
    return sampler.sample(prompts, sampling, num_generations=config.num_generations_eval, seed=seed, state=state)


@dataclass(frozen=True, slots=True)
class Baseline:
    """Rewards of the untrained policy."""

    reward: float
    """Mean reward by the training rewards; NaN where no answer has one."""
    error: float
    """Its standard error, from the answers' own spread; NaN below two answers."""
    num_prompts: int
    """Prompts that were asked, one answer each: prompts differ more than answers do, so that is the surest for its price."""

    @property
    def event(self) -> tuple[str, str]:
        """The event's name and words."""
        if math.isnan(self.reward):
            told = f"before training no answer to {self.num_prompts} prompts got a reward: reward functions gave None or NaN"
            return "warn", f"{told} for each, or failed"
        return "probe", f"reward before training: {self.reward:.3f} over {self.num_prompts} prompts"


def probe(config: Config, parts: Parts, timer: PhaseTimer, *, tell: Tell) -> Baseline:
    """Asks ``baseline_probe`` training prompts, sampled as in training, and charges the meter for it.

    The prompts are drawn apart from the stream that training reads, so a run is the same with and without a probe.

    Args:
        config: the run's configuration.
        parts: engine, prompts, rewards and meter.
        timer: charged with ``rollout`` and ``reward``.
        tell: takes a warning for each call that failed and was only counted.

    Raises:
        RewardError: a reward function failed and ``reward_on_error`` is ``raise``.
    """
    seed = derive_seed(config.seed, 0)
    rows = np.random.default_rng(seed).permutation(len(parts.prompts))[: config.baseline_probe]
    prompts = [parts.prompts[row] for row in rows]
    state = trainer_state(config, 0, parts.stream.state_dict())
    with timer.phase("rollout"):
        groups = parts.sampler.sample(prompts, sampling_params(config), num_generations=1, seed=seed, state=state)
    with timer.phase("reward"):
        report = parts.rewards.score(groups, state)
    for problem in report.problems:
        tell("warn", problem)
    charge_rollout(parts.meter, groups)
    rewards = np.array([value for group in groups for value in group.reward], dtype=np.float64)
    known = rewards[np.isfinite(rewards)]
    error = float(known.std(ddof=1)) / math.sqrt(known.size) if known.size > 1 else math.nan
    return Baseline(mean_known(rewards.tolist()), error, len(groups))
