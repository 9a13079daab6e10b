"""GSM8K: 7,473 grade-school word problems to train on, 1,319 for evaluation.

Source: Cobbe et al., Training Verifiers to Solve Math Word Problems (arXiv:2110.14168); hub dataset ``openai/gsm8k``.
"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from grpo_fast.config import Config, ConfigError
from grpo_fast.tasks.tables import evenly, read_files, read_hub
from grpo_fast.tasks.task import Rows, Task
from grpo_fast.tasks.wording import ask

INSTRUCTION = r"Reason step by step, and put the final answer, a number, in \boxed{}."
"""Follows the question, unless the configuration gives a ``system_prompt``, which then says what is wanted."""

_HUB_ID = "openai/gsm8k"
_HUB_CONFIG = "main"
_EVAL_SPLIT = "test"


def gsm8k_task(config: Config, *, chat: bool, directory: Path | None) -> Task:
    """GSM8K from the hub or from a directory, rewarded by whether the final number is right.

    Args:
        config: ``dataset_config``, ``dataset_split``, ``eval_split`` (without one, ``test``), ``eval_size`` and
            ``system_prompt`` are read.
        chat: whether prompts are messages.
        directory: where ``train.jsonl`` and ``test.jsonl`` with ``question`` and ``answer`` are; ``None`` asks the hub.

    Returns:
        Rows of ``prompt``, ``question`` and ``answer`` (the solution, whose last line is like ``#### 72``).

    Raises:
        ConfigError: the data cannot be read or has other columns.
    """
    instruction = INSTRUCTION if config.system_prompt is None else ""
    held_out = _read(config, directory, split=config.eval_split or _EVAL_SPLIT)
    held_out = held_out.select(evenly(len(held_out), config.eval_size))
    return Task(
        name="gsm8k",
        train=_rows(_read(config, directory, split=config.dataset_split), instruction=instruction, chat=chat),
        eval=_rows(held_out, instruction=instruction, chat=chat),
        reward_funcs=("accuracy",),
        eval_reward="accuracy",
    )


def _read(config: Config, directory: Path | None, *, split: str) -> Dataset:
    if directory is None:
        instead = "give dataset 'gsm8k:DIRECTORY' with the directory of its train.jsonl and test.jsonl"
        return read_hub(_HUB_ID, name=config.dataset_config or _HUB_CONFIG, split=split, instead=instead)
    table = read_files({name: directory / f"{name}.jsonl" for name in ("train", "test")}, split=split)
    missing = {"question", "answer"} - set(table.column_names)
    if missing:
        raise ConfigError(
            f"{directory} is not in GSM8K's form: no column {', '.join(sorted(missing))}; it has "
            f"{', '.join(table.column_names)}"
        )
    return table


def _rows(table: Dataset, *, instruction: str, chat: bool) -> Rows:
    return [
        {"prompt": ask(f"{row['question']}\n\n{instruction}".strip(), chat=chat), **row}
        for row in table.select_columns(["question", "answer"])
    ]
