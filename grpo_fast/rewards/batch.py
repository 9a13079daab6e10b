"""From groups to the keyword arguments of a reward call."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from grpo_fast.rewards.call import BATCH_ARGUMENTS, GIVEN
from grpo_fast.types import Completion, Group, Message, TrainerState


def column_names(groups: Sequence[Group]) -> list[str]:
    """The dataset columns that any of the groups' prompts has.

    Raises:
        ValueError: a column has the name of an argument that every reward call is given.
    """
    columns = list(dict.fromkeys(name for group in groups for name in group.prompt.columns))
    check_names(columns)
    return columns


def check_names(columns: Sequence[str]) -> None:
    """Refuses dataset columns that reward calls could not be given.

    Raises:
        ValueError: a column has the name of an argument that every reward call is given.
    """
    for name in GIVEN:
        if name in columns:
            raise ValueError(
                f"the dataset column {name!r} has the name of an argument that every reward function receives; rename it"
            )


def call_arguments(groups: Sequence[Group], columns: Sequence[str], state: TrainerState) -> dict[str, Any]:
    """Arguments of a reward call for some groups: lists with one entry per completion, in order, and the trainer's state.

    Args:
        groups: P groups.
        columns: names of the dataset columns.
        state: how far the run is.

    Returns:
        ``prompts`` (as in the dataset), ``completions`` (a text, or for a chat prompt a list with the assistant's message, in
        an episode with all messages that followed), ``completion_ids`` (lists of token ids), ``completion_openings`` (how the
        prompt began the answer, as with ``<think>``; mostly empty), ``environment_rewards`` (the environment's own, or
        ``None``), each dataset column, where a row without the column gives ``None``, and ``trainer_state``.
    """
    arguments: dict[str, Any] = {name: [] for name in (*BATCH_ARGUMENTS, *columns)}
    for group in groups:
        for completion in group.completions:
            episode = completion.episode
            arguments["prompts"].append(group.asked(completion))
            arguments["completions"].append(_as_asked(completion, chat=not isinstance(group.prompt.prompt, str)))
            arguments["completion_ids"].append(list(completion.token_ids))
            arguments["completion_openings"].append(group.prompt.opening)
            arguments["environment_rewards"].append(None if episode is None else episode.reward)
        for name in columns:
            arguments[name] += [group.prompt.columns.get(name)] * len(group.completions)
    return arguments | {"trainer_state": state}


def _as_asked(completion: Completion, *, chat: bool) -> str | list[Message]:
    """Text to text; to messages the assistant's, or in an episode all that followed."""
    if not chat:
        return completion.text
    if completion.episode is not None:
        return list(completion.episode.messages)
    return [{"role": "assistant", "content": completion.text}]


def pickled(arguments: dict[str, Any]) -> bytes:
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
