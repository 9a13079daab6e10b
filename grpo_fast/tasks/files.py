"""Your own datasets: a hub dataset, a directory, a parquet, JSONL or CSV file, or rows in Python, with a column of prompts."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from grpo_fast.config import Config, ConfigError
from grpo_fast.tasks.tables import evenly, read_directory, read_files, read_hub
from grpo_fast.tasks.task import Task
from grpo_fast.user_code import shown

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
        by ``accuracy`` where there is an ``answer`` column, and measured by whatever rewards training.

    Raises:
        ConfigError: the data cannot be read or lacks a column, a setting is for generated tasks alone, or nothing says how to
            reward answers.
    """
    if config.dataset_size != Config.model_fields["dataset_size"].default:
        raise ConfigError(
            f"dataset_size={config.dataset_size} is for generated tasks, and {config.dataset!r} is none; take a part of its "
            f"rows by dataset_split='{config.dataset_split}[:{config.dataset_size}]'"
        )
    told = f"dataset {config.dataset!r}"
    train = _named(config, _read(config, path, split=config.dataset_split), told)
    held_out = None if config.eval_split is None else _named(config, _read(config, path, split=config.eval_split), told)
    _check_reward(config, train, told, needs_reward=needs_reward)
    return _task(config, config.dataset, train, held_out)


def task_of(config: Config, train_dataset: Any, eval_dataset: Any = None, *, needs_reward: bool) -> Task:
    """The task of rows given in Python.

    Args:
        config: ``eval_size``, ``prompt_column``, ``answer_column``, ``seed`` and ``reward_funcs`` are read.
        train_dataset: a ``datasets.Dataset``, or a list of rows as mappings of plain values.
        eval_dataset: rows held out, alike; without them some of ``train_dataset`` are.
        needs_reward: whether ``config`` or the dataset must say how answers are rewarded.

    Returns:
        As :func:`table_task` does.

    Raises:
        ConfigError: no table, no rows, a column that is missing, or nothing says how to reward answers.
    """
    train = _named(config, _table(train_dataset, "train_dataset"), "train_dataset")
    held_out = None if eval_dataset is None else _named(config, _table(eval_dataset, "eval_dataset"), "eval_dataset")
    _check_reward(config, train, "train_dataset", needs_reward=needs_reward)
    return _task(config, "train_dataset", train, held_out)


def _check_reward(config: Config, table: Dataset, told: str, *, needs_reward: bool) -> None:
    if needs_reward and "answer" not in table.column_names and not config.reward_funcs:
        raise ConfigError(
            f"{told} has no 'answer' column to check completions against (it has {', '.join(table.column_names)}); name the "
            "column by answer_column, or set reward_funcs"
        )


def _task(config: Config, name: str, train: Dataset, held_out: Dataset | None) -> Task:
    kept: Sequence[int] | None = None
    if held_out is None:
        kept, chosen = hold_out(len(train), config.eval_size, seed=config.seed)
        train, held_out = train.select(kept), train.select(chosen)
    else:
        chosen = evenly(len(held_out), config.eval_size)
        held_out = held_out.select(chosen)
    default = ("accuracy",) if "answer" in train.column_names else ()
    return Task(
        name=name,
        train=train,
        eval=held_out,
        reward_funcs=default,
        eval_reward="",
        train_numbers=kept,
        eval_numbers=chosen,
    )


def hold_out(size: int, count: int, *, seed: int) -> tuple[Sequence[int], Sequence[int]]:
    """Splits rows off, the same ones for the same seed and number of rows.

    Args:
        size: number of all rows.
        count: rows to split off; a fifth of all at most.
        seed: decides which.

    Returns:
        The numbers of the rows that stay and of those split off, both in order.
    """
    count = min(count, size // _LARGEST_EVAL_SHARE)
    chosen = np.zeros(size, dtype=bool)
    chosen[np.random.default_rng([seed, size]).permutation(size)[:count]] = True
    return array("q", np.flatnonzero(~chosen).tobytes()), array("q", np.flatnonzero(chosen).tobytes())


def _read(config: Config, path: Path | None, *, split: str) -> Dataset:
    if path is None:
        instead = "give the path of a local directory, .parquet, .jsonl or .csv file; there is none of that name"
        table = read_hub(config.dataset, name=config.dataset_config, split=split, instead=instead)
    elif path.is_dir():
        table = read_directory(path, name=config.dataset_config, split=split)
    else:
        table = read_files({"train": path}, split=split)
    return table


def _table(given: Any, name: str) -> Dataset:
    """Rows given in Python as a table; ``name`` is the argument's."""
    if isinstance(given, Mapping) and all(isinstance(split, Dataset) for split in given.values()):
        first = next(iter(given), "train")
        raise ConfigError(f"{name} holds splits ({', '.join(map(str, given))}); give one of them, as {name}=data[{first!r}]")
    if not isinstance(given, Dataset | list | tuple):
        raise ConfigError(
            f"{name} is of type {type(given).__name__}; give a datasets.Dataset or a list of rows (Dataset.from_pandas and "
            "Dataset.from_dict make one of other tables; of a dataset that streams, take rows: list(data.take(1000))). A file, "
            "or one of the hub, is named by the configuration's dataset"
        )
    try:
        table = given if isinstance(given, Dataset) else _of_rows(given)
    except OverflowError as error:
        raise ConfigError(f"{name} holds a whole number of more than 64 bits ({error}); give such numbers as text") from error
    except Exception as error:
        raise ConfigError(f"{name} is no table: {error}; give rows with the same columns, of plain values") from error
    if not len(table):
        raise ConfigError(f"{name} has no rows; leave it out, or give some")
    return table


def _of_rows(rows: Sequence[Any]) -> Dataset:
    """A table with the columns of all rows; ``Dataset.from_list`` would take those of the first one."""
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"row {number} is {shown(row)}, and a row is a mapping like {{'prompt': '...', 'answer': '...'}}")
    columns = dict.fromkeys(column for row in rows for column in row)
    return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})


def _named(config: Config, table: Dataset, told: str) -> Dataset:
    """The table with its columns of prompts and answers under the names that they go by here; ``told`` is its own."""
    for field, name in (("prompt_column", "prompt"), ("answer_column", "answer")):
        column = getattr(config, field)
        if column not in table.column_names:
            if column == "answer":  # rewards of one's own may need none
                continue
            raise ConfigError(
                f"{told} has no {column!r} column; it has {', '.join(table.column_names)}. Name the one "
                f"that holds the {name}s by {field}"
            )
        if column != name:
            table = table.remove_columns(name) if name in table.column_names else table
            table = table.rename_column(column, name)
    return table
