"""Every task of the ``reasoning-gym`` package by its name (arXiv 2505.24760)."""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from grpo_fast.config import ConfigError
from grpo_fast.tasks.task import Task
from grpo_fast.types import PromptText

INSTRUCTION = "Reason first, then give the final answer alone in <answer> </answer>."
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_HELD_OUT_SEED = 1_000_003
REWARD = "grpo_fast.tasks.reasoning_gym:reasoning_gym_reward"


def reasoning_gym_task(name: str, *, size: int, eval_size: int, seed: int, chat: bool) -> Task:
    """A task with its default settings; held-out rows come from another seed, and no question of theirs is trained on.

    Args:
        name: as reasoning-gym registers it, such as ``gcd``.
        size: rows trained on, at most: questions that are held out too are left out.
        eval_size: rows held out.
        seed: decides the questions.
        chat: whether prompts are chat messages.

    Raises:
        ConfigError: the package is missing, or no task has that name; the nearest one is named.
    """
    held_out = _entries(name, eval_size, seed + _HELD_OUT_SEED)
    questions = {entry["question"] for entry in held_out}
    train = [entry for entry in _entries(name, size, seed) if entry["question"] not in questions]
    rows = [[_row(name, entry, chat=chat) for entry in entries] for entries in (train, held_out)]
    return Task(f"reasoning_gym:{name}", rows[0], rows[1], reward_funcs=(REWARD,), eval_reward=REWARD)


def reasoning_gym_reward(
    prompts: Sequence[Any], completions: Sequence[Any], *, task: Sequence[str], entry: Sequence[str], **columns: Any
) -> list[float]:
    """The task's own score of the answer, in [0, 1] (TRL's reward signature).

    Args:
        prompts: N prompts; not read.
        completions: N completions, text or chat messages; what the last ``<answer>`` holds counts, or the whole text without one.
        task: N names of tasks.
        entry: N entries as JSON.
        columns: further columns; not read.

    Returns:
        N rewards.
    """
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [
        float(_scorer(name).score_answer(answer=given_answer(text), entry=json.loads(row)))
        for text, name, row in zip(texts, task, entry, strict=True)
    ]


def given_answer(completion: str) -> str:
    """What stands in the last ``<answer>``, or the whole completion."""
    found = _ANSWER.findall(completion)
    return (found[-1] if found else completion).strip()


def _entries(name: str, size: int, seed: int) -> list[dict[str, Any]]:
    if size == 0:
        return []
    dataset = _package().create_dataset(_known(name), size=size, seed=seed)
    return [dataset[index] for index in range(size)]


@cache
def _scorer(name: str) -> Any:
    return _package().create_dataset(name, size=1, seed=0)


def _package() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ModuleNotFoundError:
        raise ConfigError('reasoning_gym tasks need the package: pip install "grpo-fast[reasoning-gym]"') from None


def _known(name: str) -> str:
    _package()
    names = sorted(importlib.import_module("reasoning_gym.factory").DATASETS)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"; did you mean {', '.join(map(repr, near))}?" if near else f"; there are {len(names)}, such as 'gcd'"
        raise ConfigError(f"reasoning-gym has no task {name!r}{hint}")
    return name


def _row(name: str, entry: dict[str, Any], *, chat: bool) -> dict[str, Any]:
    text = f"{entry['question']}\n\n{INSTRUCTION}"
    prompt: PromptText = [{"role": "user", "content": text}] if chat else f"{text}\n"
    return {"prompt": prompt, "answer": entry["answer"], "task": name, "entry": json.dumps(entry, default=str)}
