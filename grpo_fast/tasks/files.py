"""Datasets of one's own: a hub dataset, a directory, or a parquet or JSONL file, with a ``prompt`` column."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import Dataset

from grpo_fast.config import Config, ConfigError
from grpo_fast.tasks.tables import evenly, read_directory, read_files, read_hub
from grpo_fast.tasks.task import Task

_LARGEST_EVAL_SHARE = 5


def table_task(config: Config, *, path: Path | None, needs_reward: bool) -> Task:
    """The rows of a dataset as they are; columns beside ``prompt`` go to the reward functions.

    Args:
        config: ``dataset``, ``dataset_config``, ``dataset_split``, ``eval_split``, ``eval_size``, ``seed`` and ``reward_funcs``
            are read.
        path: the file or directory; ``None`` asks the hub for ``config.dataset``.
        needs_reward: whether ``config`` or the dataset must say how answers are rewarded.

    Returns:
        The task. Without ``eval_split``, ``eval_size`` rows chosen by the seed (a fifth of all at most) are held out. Rewarded
        by ``accuracy`` where there is an ``answer`` column; without one, and without ``reward_funcs``, both rewards are empty.

    Raises:
        ConfigError: the data cannot be read, has no ``prompt`` column, or nothing says how to reward it.
    """
    train = _read(config, path, split=config.dataset_split)
    if config.eval_split is not None:
        held_out = evenly(_read(config, path, split=config.eval_split), config.eval_size)
    else:
        train, held_out = hold_out(train, config.eval_size, seed=config.seed)
    has_answer = "answer" in train.column_names
    if needs_reward and not has_answer and not config.reward_funcs:
        raise ConfigError(
            f"dataset {config.dataset!r} has no 'answer' column to check completions against (it has "
            f"{', '.join(train.column_names)}); set reward_funcs to a built-in or 'module:function'"
        )
    default = ("accuracy",) if has_answer else ()
    return Task(
        name=config.dataset,
        train=train,
        eval=held_out,
        reward_funcs=default,
        eval_reward=(*config.reward_funcs, *default, "")[0],
    )


def hold_out(table: Dataset, count: int, *, seed: int) -> tuple[Dataset, Dataset]:
    """Splits rows off, the same ones for the same seed and number of rows.

    Args:
        table: all rows.
        count: rows to split off; a fifth of the table at most.
        seed: decides which.

    Returns:
        The rows that stay and those split off, both in the table's order.
    """
    size = len(table)
    count = min(count, size // _LARGEST_EVAL_SHARE)
    chosen = np.zeros(size, dtype=bool)
    chosen[np.random.default_rng([seed, size]).permutation(size)[:count]] = True
    return table.select(np.flatnonzero(~chosen)), table.select(np.flatnonzero(chosen))


def _read(config: Config, path: Path | None, *, split: str) -> Dataset:
    if path is None:
        instead = "give the path of a local directory, .parquet or .jsonl file; there is none of that name"
        table = read_hub(config.dataset, name=config.dataset_config, split=split, instead=instead)
    elif path.is_dir():
        table = read_directory(path, name=config.dataset_config, split=split)
    else:
        table = read_files({"train": path}, split=split)
    if "prompt" not in table.column_names:
        raise ConfigError(
            f"dataset {config.dataset!r} has no 'prompt' column; it has {', '.join(table.column_names)}. Rename the one that "
            "holds the prompts"
        )
    return table
