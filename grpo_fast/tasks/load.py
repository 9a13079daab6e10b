"""From the name of a dataset to a task."""

from __future__ import annotations

from grpo_fast.config import Config
from grpo_fast.tasks.arithmetic import arithmetic_task
from grpo_fast.tasks.countdown import countdown_task
from grpo_fast.tasks.files import file_task
from grpo_fast.tasks.gsm8k import gsm8k_task
from grpo_fast.tasks.reasoning_gym import reasoning_gym_task
from grpo_fast.tasks.task import Task


def load_task(config: Config, *, chat: bool) -> Task:
    """Loads what ``config.dataset`` names.

    Args:
        config: the run's configuration.
        chat: whether the model takes chat messages; the built-in tasks then phrase their prompts as such.

    Raises:
        ConfigError: nothing of that name, no rows, no prompts, or no reward to go with them.
    """
    kind, _, rest = config.dataset.partition(":")
    if config.dataset == "arithmetic":
        return arithmetic_task(size=config.dataset_size, eval_size=config.eval_size, seed=config.seed)
    if config.dataset == "countdown":
        return countdown_task(size=config.dataset_size, eval_size=config.eval_size, seed=config.seed, chat=chat)
    if kind == "gsm8k":
        return gsm8k_task(rest or None, chat=chat)
    if kind == "reasoning_gym":
        return reasoning_gym_task(rest, size=config.dataset_size, eval_size=config.eval_size, seed=config.seed, chat=chat)
    return file_task(config)
