"""Reward functions that read the environments themselves, as ``environments``: they are called where those are.

The pool's processes have no environments, so that such a function is called when episodes end, by who plays them, and the pool
reads what it said.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from grpo_fast.async_code import AsyncCode
from grpo_fast.rewards.batch import call_arguments, column_names
from grpo_fast.rewards.call import TRAINER_ARGUMENTS, RewardFunction, call_reward, resolve_reward
from grpo_fast.types import Group, TrainerState

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

    def __call__(self, environment_judgements: Sequence[Sequence[float | None]], **columns: Any) -> list[float | None]:
        """What the function said, of N completions."""
        return [said[self.place] for said in environment_judgements]


def set_apart(
    reward_funcs: Sequence[str | Callable[..., Any]],
) -> tuple[Sequence[str | Callable[..., Any]], Sequence[RewardFunction]]:
    """Finds the functions whose signature names ``environments``.

    Args:
        reward_funcs: names or functions.

    Returns:
        The same with a :class:`Judged` in place of each of those, and those. What cannot be found stays, for the pool to tell.

    Raises:
        ValueError: one of those also names something of the trainer's, which only functions in the pool are given.
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
    if ARGUMENT not in parameters:
        return None
    for name in TRAINER_ARGUMENTS:
        if name in parameters:
            raise ValueError(
                f"reward function {reward.name!r} names {ARGUMENT!r} and {name!r}; one that reads environments is not given "
                f"{', '.join(TRAINER_ARGUMENTS)}: log in another function, of weight 0"
            )
    return reward


def judge(reward: RewardFunction, groups: Sequence[Group], environments: Sequence[Any]) -> list[float | None]:
    """What such a function says of completions.

    Args:
        reward: the function.
        groups: with N completions.
        environments: [N], those that the completions were played with.

    Raises:
        InvalidRewardError: it returned the wrong number or kind of values.
        Exception: whatever it raises.
    """
    arguments = call_arguments(groups, column_names(groups), TrainerState())
    for name in ("environment_judgements", "trainer_state"):
        del arguments[name]
    with contextlib.closing(AsyncCode()) as loop:
        return call_reward(reward, arguments | {ARGUMENT: list(environments)}, loop).values
