"""From groups to the keyword arguments of a reward call."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from grpo_fast.rewards.call import BATCH_ARGUMENTS
from grpo_fast.types import Completion, Group, Message


def column_names(groups: Sequence[Group]) -> list[str]:
    """The dataset columns that any of the groups' prompts has.

    Raises:
        ValueError: a column has the name of an argument that every reward call is given.
    """
    columns = list(dict.fromkeys(name for group in groups for name in group.prompt.columns))
    for name in BATCH_ARGUMENTS:
        if name in columns:
            raise ValueError(f"the dataset column {name!r} has the name of something every reward function is given; rename it")
    return columns


def call_arguments(groups: Sequence[Group], columns: Sequence[str]) -> dict[str, list[Any]]:
    """What a reward function is given for some groups: one entry a completion, in order.

    Args:
        groups: P groups.
        columns: names of the dataset columns.

    Returns:
        ``prompts`` (as in the dataset), ``completions`` (a text, or for a chat prompt a list with the assistant's message, in
        an episode with all messages that followed), ``completion_ids`` (lists of token ids), ``completion_openings`` (how the
        prompt began the answer, as with ``<think>``; mostly empty), ``environment_rewards`` (the environment's own, or
        ``None``), and each dataset column; a row without the column gives ``None``.
    """
    arguments: dict[str, list[Any]] = {name: [] for name in (*BATCH_ARGUMENTS, *columns)}
    for group in groups:
        for completion in group.completions:
            arguments["prompts"].append(group.prompt.prompt)
            arguments["completions"].append(_as_asked(completion, chat=not isinstance(group.prompt.prompt, str)))
            arguments["completion_ids"].append(list(completion.token_ids))
            arguments["completion_openings"].append(group.prompt.opening)
            arguments["environment_rewards"].append(None if completion.episode is None else completion.episode.reward)
        for name in columns:
            arguments[name] += [group.prompt.columns.get(name)] * len(group.completions)
    return arguments


def _as_asked(completion: Completion, *, chat: bool) -> str | list[Message]:
    """Text to text; to messages the assistant's, or in an episode all that followed."""
    if not chat:
        return completion.text
    if completion.episode is not None:
        return list(completion.episode.messages)
    return [{"role": "assistant", "content": completion.text}]


def pickled(arguments: dict[str, list[Any]]) -> bytes:
    """The arguments as bytes for a worker.

    Raises:
        TypeError: a column holds something that cannot be sent to another process.
    """
    try:
        return pickle.dumps(arguments, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        columns = ", ".join(repr(name) for name, values in arguments.items() if not _can_be_pickled(values))
        raise TypeError(
            f"the dataset column {columns} cannot be sent to a reward worker ({error}); drop it, or set reward_workers to 0"
        ) from None


def _can_be_pickled(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True
