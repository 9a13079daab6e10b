"""Every task of reasoning-gym by its name: generated problems, scored by the task's own verifier.

Needs the extra ``reasoning-gym``. A row carries its whole entry, so that a reward worker can score it without generating it
again; tuples and integer keys, which some verifiers insist on, survive the way through JSON.

Source: Stojanovski et al., Reasoning Gym (arXiv:2505.24760).
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from grpo_fast.config import ConfigError
from grpo_fast.rewards.functions import completion_text
from grpo_fast.tasks.task import Task
from grpo_fast.tasks.wording import ANSWER_TAGS, ask, tagged_answer

_log = logging.getLogger(__name__)

# It mixes other tasks and generates nothing without their list.
_NOT_ALONE = frozenset({"composite"})
# An item's seed is the data set's seed plus its index: splits keep apart by lying in different halves of 32 bits.
_SEED_HALF = 2**31
_SEED_STEP = 2**20
_DRAWS_PER_EVAL_ROW = 4
_TUPLE, _MAPPING = "__tuple__", "__mapping__"
# Verifiers that read formulas with sympy would compute towers like 9**9**9 to the last digit, out of reach of any signal.
_POWER_TOWER = re.compile(r"(?:\*\*|\^)[\s({]*[-+]?(?:\d{4,}|\d+[\s)}]*(?:\*\*|\^))")


def reasoning_gym_task(name: str, *, size: int, eval_size: int, seed: int, chat: bool) -> Task:
    """Problems of one reasoning-gym task in its default configuration.

    Args:
        name: as reasoning-gym registers it (``gcd``, ``sudoku``, ...).
        size: rows trained on.
        eval_size: rows held out at most. They are drawn from other seeds, and questions that training holds are left out, so
            a task with few different questions has fewer.
        seed: decides the problems, 0 or more.
        chat: whether prompts are messages.

    Returns:
        Rows of ``prompt``, ``task`` and ``entry`` (JSON of reasoning-gym's entry with question, answer and metadata).

    Raises:
        ConfigError: reasoning-gym is not installed, has no such task, or cannot generate it.
        ValueError: ``size`` below 1 or ``eval_size`` below 0.
    """
    if size < 1 or eval_size < 0:
        raise ValueError(f"size={size} must be at least 1 and eval_size={eval_size} at least 0")
    known = task_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are: {', '.join(known)}"
        raise ConfigError(f"reasoning_gym has no task {name!r} (dataset 'reasoning_gym:{name}'); {hint}")
    base = random.Random(seed).randrange(_SEED_HALF // _SEED_STEP - 1) * _SEED_STEP
    try:
        train = list(_entries(name, size=size, seed=base))
        drawn = _entries(name, size=_DRAWS_PER_EVAL_ROW * eval_size, seed=_SEED_HALF + base)
        held_out = _unseen(drawn, {entry["question"] for entry in train}, count=eval_size)
    except Exception as error:
        raise ConfigError(
            f"reasoning_gym cannot generate {name!r} ({type(error).__name__}: {error}); choose another task"
        ) from error
    reward = "grpo_fast.tasks.reasoning_gym:reasoning_gym_reward"
    return Task(
        name=f"reasoning_gym:{name}",
        train=[_row(name, entry=entry, chat=chat) for entry in train],
        eval=[_row(name, entry=entry, chat=chat) for entry in held_out],
        reward_funcs=(reward,),
        eval_reward=reward,
    )


def reasoning_gym_reward(completions: Sequence[Any], task: Sequence[str], entry: Sequence[str], **columns: Any) -> list[float]:
    """The score of the task's own verifier: 1.0 for a right answer, and for some tasks a part of it for a close one.

    The answer is what stands in the last ``<answer>...</answer>``, or else the whole completion, stripped. An answer on which
    the verifier fails (several raise on text they cannot parse) is worth 0.0, and so is one with a tower of powers. A verifier
    has no time limit of its own; the reward pool's deadline holds.

    Args:
        completions: N texts, or N message lists.
        task: N names of tasks.
        entry: N entries as JSON.
        columns: not read.

    Returns:
        N rewards.

    Raises:
        ConfigError: reasoning-gym is not installed.
    """
    return [
        _score(name, row, completion_text(completion)) for completion, name, row in zip(completions, task, entry, strict=True)
    ]


def task_names() -> list[str]:
    """The tasks that can be used, in alphabetical order.

    Raises:
        ConfigError: reasoning-gym is not installed.
    """
    return sorted(set(_library().factory.DATASETS) - _NOT_ALONE)


def to_json(entry: Any) -> str:
    """An entry as JSON that :func:`from_json` turns back into an equal one: tuples and keys that are no strings are marked."""
    return json.dumps(_marked(entry))


def from_json(text: str) -> Any:
    """The entry that :func:`to_json` wrote."""
    return json.loads(text, object_hook=_unmarked)


def _library() -> Any:
    try:
        import reasoning_gym  # noqa: PLC0415 (an optional dependency; this is its door)
    except ImportError as error:
        raise ConfigError(
            f"tasks of reasoning_gym need the package ({error}); install it with: pip install 'grpo-fast[reasoning-gym]'"
        ) from error
    return reasoning_gym


@functools.cache
def _verifier(name: str) -> Any:
    return _library().create_dataset(name, size=1, seed=0)


def _entries(name: str, *, size: int, seed: int) -> Iterator[dict[str, Any]]:
    if size:
        data = _library().create_dataset(name, size=size, seed=seed)
        # Not `iter(data)`: it would take an IndexError of a faulty generator for the end.
        yield from (data[index] for index in range(size))


def _unseen(entries: Iterator[dict[str, Any]], seen: set[str], *, count: int) -> list[dict[str, Any]]:
    """Up to ``count`` entries whose question is new."""
    found: list[dict[str, Any]] = []
    for entry in entries:
        if entry["question"] not in seen:
            seen.add(entry["question"])
            found.append(entry)
        if len(found) == count:
            break
    return found


def _row(name: str, *, entry: dict[str, Any], chat: bool) -> dict[str, Any]:
    prompt = ask(f"{entry['question'].strip()}\n\n{ANSWER_TAGS}", chat=chat)
    return {"prompt": prompt, "task": name, "entry": to_json(entry)}


def _score(name: str, entry: str, text: str) -> float:
    tagged = tagged_answer(text)
    answer = text.strip() if tagged is None else tagged
    verifier = _verifier(name)
    if _POWER_TOWER.search(answer):
        return 0.0
    try:
        return float(verifier.score_answer(answer, from_json(entry)))
    except Exception as error:  # whatever a third party's parser raises on a model's text
        _log.debug("reasoning_gym:%s cannot score %r: %s: %s", name, answer[:80], type(error).__name__, error)
        return 0.0


def _marked(value: Any) -> Any:
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _marked(item) for key, item in value.items()}
        return {_MAPPING: [[_marked(key), _marked(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_marked(item) for item in value]}
    return [_marked(item) for item in value] if isinstance(value, list) else value


def _unmarked(value: dict[str, Any]) -> Any:
    if _TUPLE in value:
        return tuple(value[_TUPLE])
    return dict(value[_MAPPING]) if _MAPPING in value else value
