"""Held-out evaluation: greedy answers, scored by the task's own measure."""

from __future__ import annotations

import math

from grpo_fast.config import Config
from grpo_fast.metrics import mean_known
from grpo_fast.rollout.engine import SamplingParams
from grpo_fast.train.parts import Parts
from grpo_fast.types import Group


def evaluate(config: Config, parts: Parts) -> float:
    """Mean reward of one greedy completion for each held-out prompt; NaN where none has a reward.

    Args:
        config: the run's configuration.
        parts: engine, held-out prompts and the evaluation's reward pool.
    """
    if not parts.eval_prompts:
        return math.nan
    sampling = SamplingParams(max_tokens=config.max_completion_length, temperature=0.0, stop=config.stop)
    answers = parts.engine.generate(
        [prompt.token_ids for prompt in parts.eval_prompts], sampling, num_generations=1, seed=config.seed
    )
    groups = [Group(prompt, completions) for prompt, completions in zip(parts.eval_prompts, answers, strict=True)]
    parts.eval_rewards.score(groups)
    return mean_known(value for group in groups for value in group.reward)
