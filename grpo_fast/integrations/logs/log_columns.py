"""Finds the columns of the reward and the step by the names that trainers use; an ambiguous log is refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

REWARDS: tuple[str, ...] = (
    *("reward", "reward/mean", "reward_mean", "mean_reward", "avg_reward", "average_reward", "reward_avg", "rewards/mean"),
    *("critic/rewards/mean", "rollout/reward", "rollout/rewards", "rollout/reward_mean", "env/reward/total", "reward/total"),
    *("env/all/reward/total", "reward/avg_raw_reward", "reward/all/mean"),
    *("objective/rlhf_reward", "rewards", "total_reward"),
    *("critic/score/mean", "rollout/raw_reward", "objective/scores", "score/mean", "mean_score", "score"),
    *("accuracy", "correctness", "accuracy/mean", "acc", "success_rate", "pass_rate", "pass@1"),
)
"""Known names without their prefixes, the likeliest first."""

STEPS: tuple[str, ...] = (
    *("global_step", "step", "trainer/global_step", "training_step", "rollout/step", "steps", "_step"),
    *("iteration", "iter", "batch", "update"),
)
RATES: tuple[str, ...] = ("learning_rate", "actor/lr", "actor_lr", "lr", "optim/lr")
TOKEN_SUMS: tuple[str, ...] = (
    *("num_tokens", "num_input_tokens_seen", "progress/total_tokens", "tokens_seen", "consumed_tokens"),
    *("total_tokens", "tokens"),
)
"""Names of tokens since the first step; a column of the last two may as well hold those of one step."""
DEVICE_SECONDS = "gpu_seconds"
SECOND_SUMS: tuple[str, ...] = (DEVICE_SECONDS, "wall_s", "elapsed_s", "elapsed_seconds", "_runtime")
"""Names of seconds since the first step: of all devices together, or by the clock on the wall."""
OWN: tuple[str, ...] = ("progress", "money", "frac_reward_all_wrong", "steps_without_variance")
"""Further columns that are read in runs of grpo_fast."""
_KNOWN = {*REWARDS, *STEPS, *RATES, *TOKEN_SUMS, *SECOND_SUMS, *OWN, "value"}
_PREFIX = re.compile(r"^(?:train|training|metrics)[/_](?!step)")
_RUN = re.compile(r"^.+ - (?=\S+$)")
_ONE_REWARD = re.compile(r"^rewards?/[^/]+(?:/mean)?$")
_NOT_TRAINING = re.compile(r"(?:^|[/_.\- ])(?:eval|evaluation|val|valid|validation|test|val-core|val-aux)(?:$|[/_.\- ])")
_NOT_A_MEAN = re.compile(r"(?:__min|__max|__step|[/_](?:std|min|max|median|var|sem))$")


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read.

    Attributes:
        reward: the reward.
        step: the step; None where the log has none and rows are counted.
        reward_std: spread of rewards beside it, where the log has that.
        learning_rate: learning rate, where the log has one.
        tokens: tokens since the first step, likewise.
        seconds: seconds since the first step, likewise.
        others: further columns that could have been the reward.
    """

    reward: str
    step: str | None
    reward_std: str | None
    learning_rate: str | None
    tokens: str | None = None
    seconds: str | None = None
    others: tuple[str, ...] = ()


def choose_columns(names: Iterable[str], *, reward_column: str | None = None) -> Columns:
    """Chooses among a log's columns.

    Args:
        names: columns that hold numbers.
        reward_column: the reward's, in full or without the run's name before it.

    Raises:
        ValueError: no column, or more than one, can be meant; the candidates are listed.
    """
    names = list(names)
    reward, others = _named(names, reward_column) if reward_column is not None else _guessed(names)
    run = _run_of(reward)
    beside = [name for name in names if _run_of(name) in {"", run}]
    spread = [name for name in beside if plain(name) == "reward_std" and plain(reward) == "reward"]
    return Columns(
        reward,
        _first(beside, STEPS, but=reward),
        spread[0] if spread else None,
        _first(beside, RATES, but=reward),
        _first(beside, TOKEN_SUMS, but=reward),
        _first(beside, SECOND_SUMS, but=reward),
        tuple(others),
    )


def may_matter(name: str, reward_column: str | None) -> bool:
    """Whether a column may be chosen, or makes the choice ambiguous."""
    if reward_column is not None and reward_column in {name, _RUN.sub("", name)}:
        return True
    short = plain(name)
    known = {short, underscored(name)}
    if known & _KNOWN or short == "reward_std":
        return True
    return _ONE_REWARD.match(short) is not None


def plain(name: str) -> str:
    """A column's name, :func:`underscored`, without a W&B run's name and without ``train/`` before it."""
    return _PREFIX.sub("", underscored(_RUN.sub("", name.strip())))


def underscored(name: str) -> str:
    """A name in small letters, its words joined by underscores: ``Global Step`` is ``global_step``."""
    return "_".join(name.lower().split())


def _named(names: list[str], wanted: str) -> tuple[str, list[str]]:
    found = [name for name in names if name == wanted] or [name for name in names if _RUN.sub("", name) == wanted]
    if not found:
        near = difflib.get_close_matches(wanted, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"the log has no column {wanted!r}{hint} It has {_listed(names)}")
    if len(found) > 1:
        raise ValueError(f"{wanted!r} is the name of {len(found)} columns; give one in full: {_listed(found)}")
    return found[0], []


def _guessed(names: list[str]) -> tuple[str, list[str]]:
    usable = [name for name in names if not _NOT_TRAINING.search(name.lower()) and not _NOT_A_MEAN.search(underscored(name))]
    for known in REWARDS:
        found = [name for name in usable if plain(name) == known]
        if len(found) > 1:
            raise ValueError(f"more than one column may be the reward; name one with --reward-column: {_listed(found)}")
        if found:
            return found[0], [name for name in usable if plain(name) in REWARDS and name != found[0]]
    parts = [name for name in usable if _ONE_REWARD.match(plain(name))]
    if len(parts) == 1:
        return parts[0], []
    if parts:
        raise ValueError(f"the log has parts of a reward but no whole; name one with --reward-column: {_listed(parts)}")
    listed = f"It has {_listed(names)}" if names else "It has no columns of numbers"
    raise ValueError(f"no column is known to be a reward; name one with --reward-column. {listed}")


def _first(names: list[str], known: tuple[str, ...], *, but: str) -> str | None:
    for wanted in known:
        for name in names:
            if name != but and wanted in {plain(name), underscored(name)}:
                return name
    return None


def _run_of(name: str) -> str:
    found = _RUN.match(name.strip())
    return found[0] if found else ""


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if names[12:] else "")
