"""Reward functions that read the environments themselves, as ``environments``: they are called where those are.

The pool's processes have no environments, so that such a function is called when episodes end, by who plays them, and the pool
reads what it said.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from grpo_fast.async_code import AsyncCode
from grpo_fast.rewards.batch import call_arguments, column_names
from grpo_fast.rewards.call import RewardFunction, call_reward, resolve_reward
from grpo_fast.types import Group, Scored, TrainerState

ARGUMENT = "environments"


class Judged:
    """Stands in a pool for a reward function that has been called.

    Args:
        name: of the function.
        place: among those that read environments.
    """

    def __init__(self, name: str, place: int) -> None:
        self.__name__ = name
        self.place = place

    def __call__(self, groups: Sequence[Group]) -> list[Scored]:
        """What the function said of each completion of some groups that were played."""
        episodes = [completion.episode for group in groups for completion in group.completions]
        return [episode.judgements[self.place] for episode in episodes if episode is not None]


def set_apart(
    reward_funcs: Sequence[str | Callable[..., Any]],
) -> tuple[Sequence[str | Callable[..., Any]], Sequence[RewardFunction]]:
    """Finds the functions whose signature names ``environments``.

    Args:
        reward_funcs: names or functions.

    Returns:
        The same with a :class:`Judged` in place of each of those, and those. What cannot be found stays, for the pool to tell.
    """
    kept: list[str | Callable[..., Any]] = []
    apart: list[RewardFunction] = []
    for spec in reward_funcs:
        reward = _found(spec)
        if reward is None:
            kept.append(spec)
        else:
            kept.append(Judged(reward.name, len(apart)))
            apart.append(reward)
    return tuple(kept), tuple(apart)


def _found(spec: str | Callable[..., Any]) -> RewardFunction | None:
    try:
        reward = resolve_reward(spec)
        parameters = inspect.signature(reward.function).parameters
    except (ValueError, TypeError):
        return None
    return reward if ARGUMENT in parameters else None


def judge(
    reward: RewardFunction, groups: Sequence[Group], environments: Sequence[Any], *, state: TrainerState, loop: AsyncCode
) -> list[Scored]:
    """What such a function says of completions.

    Args:
        reward: the function.
        groups: with N completions.
        environments: [N], those that the completions were played with.
        state: how far the run is.
        loop: that of the environments, whose connections are bound to it.

    Returns:
        [N], of each completion alone. What was logged as a metric stands with each, so that it weighs as many as were judged.

    Raises:
        InvalidRewardError: it returned the wrong number or kind of values, or logged what is no number.
        Exception: whatever it raises.
    """
    arguments = call_arguments(groups, column_names(groups), state)
    scored = call_reward(reward, arguments | {ARGUMENT: list(environments)}, loop)
    return [
        Scored([value], scored.metrics, {column: [values[place]] for column, values in scored.extra.items()})
        for place, value in enumerate(scored.values)
    ]
