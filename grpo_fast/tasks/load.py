"""From the name in ``config.dataset`` to a task."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from grpo_fast.config import Config, ConfigError
from grpo_fast.given_values import BUILT_IN_DATASETS
from grpo_fast.tasks.arithmetic import arithmetic_task
from grpo_fast.tasks.countdown import countdown_task
from grpo_fast.tasks.reasoning_gym import reasoning_gym_task
from grpo_fast.tasks.task import FILE_BUILDERS, Task

_ACCEPTED = (
    "A dataset is arithmetic, countdown, gsm8k, gsm8k:DIRECTORY, reasoning_gym:TASK, a directory, a .parquet, .jsonl, "
    ".json, .csv or .tsv file, or a hub id written OWNER/NAME"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_task(config: Config, *, chat: bool, needs_reward: bool = True) -> Task:
    """Makes or reads the task that ``config.dataset`` names.

    Args:
        config: the run's configuration; its data fields, ``eval_size``, ``seed`` and ``reward_funcs`` are read.
        chat: whether the tokeniser has a chat template; built-in tasks then ask in messages, except arithmetic.
        needs_reward: whether an answer column or ``config.reward_funcs`` must say how to reward; False where reward functions
            are handed over in Python.

    Returns:
        The task, its rows neither tokenised nor shuffled.

    Raises:
        ConfigError: a name that stands for nothing (what is accepted and the nearest match are named), or data that cannot be
            used.
    """
    kind, colon, argument = config.dataset.partition(":")
    if kind not in BUILT_IN_DATASETS:
        from grpo_fast.tasks.files import table_task  # noqa: PLC0415 (it imports datasets, which takes half a second)

        return table_task(config, path=_find(config.dataset), needs_reward=needs_reward)
    wants_argument = {"gsm8k": bool(colon), "reasoning_gym": True}.get(kind, False)
    if bool(argument) != wants_argument or bool(colon) != wants_argument:
        raise ConfigError(f"dataset {config.dataset!r} is not understood. {_ACCEPTED}")
    return _built_in(config, kind, argument=argument, chat=chat)


def _built_in(config: Config, kind: str, *, argument: str, chat: bool) -> Task:
    _refuse_idle(config, ("prompt_column", "answer_column"), task="the built-in task")
    if kind == "gsm8k":
        _refuse_idle(config, ("dataset_size",), task="the dataset")
        from grpo_fast.tasks.gsm8k import gsm8k_task  # noqa: PLC0415 (as above)

        return gsm8k_task(config, chat=chat, directory=_directory(argument) if argument else None)
    _refuse_idle(config, ("dataset_config", "dataset_split", "eval_split"), task="the generated task")
    size, eval_size, seed = config.dataset_size, config.eval_size, config.seed
    if kind == "arithmetic":
        return arithmetic_task(size=size, eval_size=eval_size, seed=seed)
    if kind == "countdown":
        return countdown_task(size=size, eval_size=eval_size, seed=seed, chat=chat)
    return reasoning_gym_task(argument, size=size, eval_size=eval_size, seed=seed, chat=chat)


def _refuse_idle(config: Config, fields: tuple[str, ...], *, task: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if value != Config.model_fields[field].default:
            raise ConfigError(f"{field}={value!r} has no effect on {task} {config.dataset!r}; leave it out")


def _find(dataset: str) -> Path | None:
    """The file or directory that a name means; ``None`` for a hub id."""
    path = Path(dataset).expanduser()
    if dataset and (path.exists() or path.suffix in FILE_BUILDERS):
        return path
    if _HUB_ID.fullmatch(dataset):
        return None
    if "/" in dataset:
        raise ConfigError(f"dataset {dataset!r}: there is no such file or directory. {_ACCEPTED}")
    near = difflib.get_close_matches(dataset.partition(":")[0], BUILT_IN_DATASETS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown dataset {dataset!r}; {hint}{_ACCEPTED}")


def _directory(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise ConfigError(f"dataset 'gsm8k:{text}': there is no directory {path}; give one with train.jsonl and test.jsonl")
    return path
