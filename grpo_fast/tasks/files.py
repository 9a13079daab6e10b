"""Datasets of one's own: a hub dataset, a directory, or a parquet, JSONL or CSV file, with a column of prompts."""

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
        config: ``dataset``, ``dataset_config``, ``dataset_split``, ``eval_split``, ``eval_size``, ``prompt_column``,
            ``answer_column``, ``seed`` and ``reward_funcs`` are read.
        path: the file or directory; ``None`` asks the hub for ``config.dataset``.
        needs_reward: whether ``config`` or the dataset must say how answers are rewarded.

    Returns:
        The task. Without ``eval_split``, ``eval_size`` rows chosen by the seed (a fifth of all at most) are held out. Rewarded
        by ``accuracy`` where there is an ``answer`` column; without one, and without ``reward_funcs``, both rewards are empty.

    Raises:
        ConfigError: the data cannot be read or lacks a column, a setting is for generated tasks alone, or nothing says how to
            reward answers.
    """
    if config.dataset_size != Config.model_fields["dataset_size"].default:
        raise ConfigError(
            f"dataset_size={config.dataset_size} is for generated tasks, and {config.dataset!r} is none; take a part of its "
            f"rows by dataset_split='{config.dataset_split}[:{config.dataset_size}]'"
        )
    train = _read(config, path, split=config.dataset_split)
    if config.eval_split is not None:
        held_out = evenly(_read(config, path, split=config.eval_split), config.eval_size)
    else:
        train, held_out = hold_out(train, config.eval_size, seed=config.seed)
    has_answer = "answer" in train.column_names
    if needs_reward and not has_answer and not config.reward_funcs:
        raise ConfigError(
            f"dataset {config.dataset!r} has no 'answer' column to check completions against (it has "
            f"{', '.join(train.column_names)}); name the column by answer_column, or set reward_funcs"
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
        instead = "give the path of a local directory, .parquet, .jsonl or .csv file; there is none of that name"
        table = read_hub(config.dataset, name=config.dataset_config, split=split, instead=instead)
    elif path.is_dir():
        table = read_directory(path, name=config.dataset_config, split=split)
    else:
        table = read_files({"train": path}, split=split)
    return _named(config, table)


def _named(config: Config, table: Dataset) -> Dataset:
    """The table with its columns of prompts and answers under the names that they go by here."""
    for field, name in (("prompt_column", "prompt"), ("answer_column", "answer")):
        column = getattr(config, field)
        if column not in table.column_names:
            if column == "answer":  # rewards of one's own may need none
                continue
            raise ConfigError(
                f"dataset {config.dataset!r} has no {column!r} column; it has {', '.join(table.column_names)}. Name the one "
                f"that holds the {name}s by {field}"
            )
        if column != name:
            table = table.remove_columns(name) if name in table.column_names else table
            table = table.rename_column(column, name)
    return table
