"""The experience of one step: prompts drawn, answered, rewarded, and refilled where asked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np

from grpo_fast.compute import ComputeMeter
from grpo_fast.config import Config
from grpo_fast.kept_tokens import KeptTokens
from grpo_fast.metrics import PhaseTimer
from grpo_fast.rewards import RewardReport
from grpo_fast.rollout.engine import SamplingParams
from grpo_fast.tasks.stream import PromptStream
from grpo_fast.train.episodes import Sampler
from grpo_fast.train.rng import derive_seed
from grpo_fast.train.shares import Rewards
from grpo_fast.types import Completion, Episode, Group, Prompt, TrainerState


@dataclass(slots=True)
class Collected:
    """The data that a step trains on, and its metrics."""

    groups: list[Group]
    """P groups with rewards."""
    sampled: list[Group]
    """Every group that was sampled, those that refilling replaced included, for the meter."""
    metrics: dict[str, float]
    """Reward and length statistics of the *first* draw: refilling must not flatter the learning curve."""
    problems: list[str]
    """One line for each reward call that failed and was counted."""
    stream: dict[str, Any]
    """Position of the stream of prompts afterwards."""
    logged: dict[str, float] = field(default_factory=dict)
    """What reward functions logged as metrics, of the first draw too."""
    charged: bool = False
    """Whether the meter has counted the sampling."""

    @property
    def epoch(self) -> float:
        """Passes over the prompts until then."""
        return _epoch(self.stream)

    def charge(self, meter: ComputeMeter) -> None:
        """Meters the sampling, once."""
        if not self.charged:
            charge_rollout(meter, self.sampled)
            self.charged = True

    def samples(self, count: int) -> list[dict[str, Any]]:
        """The first ``count`` completions with what became of them and what reward functions logged of them, for people."""
        pairs = [(group, i) for group in self.groups for i in range(len(group.completions))]
        return [
            {
                "prompt": group.asked(group.completions[i]),
                "completion": group.completions[i].text,
                "reward": group.reward[i],
                "advantage": group.advantages[i],
            }
            | {name: values[i] for name, values in group.extra.items()}
            for group, i in pairs[:count]
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; prompts by their dataset row."""
        place = {id(group): number for number, group in enumerate(self.groups)}
        rows = [
            {
                "prompt": group.prompt.index,
                "prompt_length": len(group.prompt.token_ids),
                "place": place.get(id(group)),
                "completions": [_completion_to_dict(completion) for completion in group.completions],
                "rewards": group.rewards,
                "reward": group.reward,
                "extra": group.extra,
            }
            for group in self.sampled
        ]
        told = {"metrics": self.metrics, "logged": self.logged, "problems": self.problems, "charged": self.charged}
        return {"groups": rows, "stream": self.stream} | told

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], prompt_of_row: Callable[[int], Prompt]) -> Collected:
        """Rebuilds what :meth:`to_dict` wrote, from the same prompts."""
        sampled = [
            Group(
                prompt=_cut(prompt_of_row(row["prompt"]), row.get("prompt_length")),
                completions=[_completion_from_dict(item) for item in row["completions"]],
                rewards=row["rewards"],
                reward=row["reward"],
                extra=row.get("extra", {}),
            )
            for row in state["groups"]
        ]
        placed = [
            (row["place"], group) for group, row in zip(sampled, state["groups"], strict=True) if row["place"] is not None
        ]
        groups = [group for _, group in sorted(placed, key=lambda pair: pair[0])]
        metrics, logged = dict(state["metrics"]), dict(state.get("logged", {}))
        problems, stream = list(state["problems"]), dict(state["stream"])
        return cls(groups, sampled, metrics, problems, stream, logged, state.get("charged", False))


def _cut(prompt: Prompt, length: int | None) -> Prompt:
    """The prompt cut to the length that an environment left of it; ``None``, in older checkpoints, cuts nothing."""
    return prompt if length in (None, len(prompt.token_ids)) else replace(prompt, token_ids=prompt.token_ids[:length])


def _completion_to_dict(completion: Completion) -> dict[str, Any]:
    kept = None if completion.kept is None else completion.kept.to_lists()
    episode = None if completion.episode is None else _episode_to_dict(completion.episode)
    return {each.name: getattr(completion, each.name) for each in fields(completion)} | {"kept": kept, "episode": episode}


def _episode_to_dict(episode: Episode) -> dict[str, Any]:
    """JSON values: text stands for what an environment put into messages and is none; judgements are in the rewards."""
    told = {name: json.loads(json.dumps(getattr(episode, name), default=str, skipkeys=True)) for name in ("messages", "asked")}
    return {each.name: getattr(episode, each.name) for each in fields(episode)} | told | {"judgements": ()}


def _completion_from_dict(item: Mapping[str, Any]) -> Completion:
    tuples = {name: tuple(item.get(name, ())) for name in ("token_ids", "logprobs", "weight_versions")}
    kept, episode = item.get("kept"), item.get("episode")
    if episode is not None:
        tuples_of = {name: tuple(value) for name, value in episode.items() if isinstance(value, list)}
        episode = Episode(**{**episode, **tuples_of})
    return Completion(**{**item, **tuples, "kept": None if kept is None else KeptTokens.from_lists(kept), "episode": episode})


class Collector:
    """Draws prompts from the stream, answers from the engine, rewards from the pool."""

    def __init__(self, config: Config, sampler: Sampler, *, stream: PromptStream, rewards: Rewards) -> None:
        self._config = config
        self._sampler = sampler
        self._stream = stream
        self._rewards = rewards
        self._params = sampling_params(config)
        apart = config.multi_objective_aggregation == "normalize_then_sum"
        self._has_told = False
        self._lives = partial(has_variance, weights=config.reward_weights or repeat(1.0)) if apart else has_variance

    def collect(self, step: int, timer: PhaseTimer) -> Collected:
        """Samples a step's groups and gives them rewards; then the engine may sleep until its weights are renewed.

        Args:
            step: number of the step; with the run's seed it decides every draw.
            timer: charged with ``rollout`` and ``reward``.

        Raises:
            RolloutError: the engine failed.
            RewardError: a reward function failed and ``reward_on_error`` is ``raise``.
        """
        state = trainer_state(self._config, step - 1, self._stream.state_dict())
        groups, report = self._sample(self._config.prompts_per_step, step, round_=0, state=state, timer=timer)
        least = self._config.reward_range[0] if self._config.reward_range is not None else 0.0
        lives = self._lives
        metrics = describe(groups, least_reward=least, lives=lives) | report.metrics()
        problems, logged = list(report.problems), report.logged
        if math.isnan(metrics["reward"]) and not problems and not self._has_told:
            self._has_told = True
            problems.append(
                f"reward functions gave None or NaN for every completion of step {step}, so nothing is learnt from it"
            )
        sampled = list(groups)
        for round_ in range(1, self._config.refill_rounds + 1):
            dead = [group for group in groups if not lives(group)]
            if not dead:
                break
            fresh, report = self._sample(len(dead), step, round_=round_, state=state, timer=timer)
            sampled += fresh
            problems += report.problems
            useful = [group for group in fresh if lives(group)]
            groups = [group for group in groups if lives(group)] + useful + dead[: len(dead) - len(useful)]
        if self._config.refill_rounds:
            metrics["refilled_prompts"] = float(len(sampled) - self._config.prompts_per_step)
        if self._config.vllm_enable_sleep_mode:
            with timer.phase("rollout"):
                self._sampler.sleep()
        return Collected(groups, sampled, metrics, problems, self._stream.state_dict(), logged)

    def _sample(
        self, count: int, step: int, *, round_: int, state: TrainerState, timer: PhaseTimer
    ) -> tuple[list[Group], RewardReport]:
        config = self._config
        prompts = self._stream.take(count)
        with timer.phase("rollout"):
            groups = self._sampler.sample(
                prompts,
                self._params,
                num_generations=config.num_generations,
                seed=derive_seed(config.seed, step, round_),
                state=state,
            )
        with timer.phase("reward"):
            return groups, self._rewards.score(groups, state)


def trainer_state(config: Config, global_step: int, stream: Mapping[str, Any]) -> TrainerState:
    """The state of the run as reward functions get it.

    Args:
        config: the run's configuration.
        global_step: steps done.
        stream: where the stream of prompts stood then.
    """
    return TrainerState(
        epoch=_epoch(stream),
        global_step=global_step,
        max_steps=config.max_steps,
        num_train_epochs=math.ceil(config.max_steps * config.prompts_per_step / stream["num_prompts"]),
    )


def _epoch(stream: Mapping[str, Any]) -> float:
    return float(stream["pass"] + stream["position"] / stream["num_prompts"])


def charge_rollout(meter: ComputeMeter, groups: Sequence[Group]) -> None:
    """Meters the sampling of some groups."""
    meter.add_rollout(
        [len(group.prompt.token_ids) for group in groups],
        [[len(completion.token_ids) for completion in group.completions] for group in groups],
    )


def sampling_params(config: Config) -> SamplingParams:
    """Sampling parameters of training."""
    return SamplingParams(
        max_tokens=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        other=config.generation_kwargs,
        stop=config.stop,
    )


def has_variance(group: Group, *, weights: Iterable[float] | None = None) -> bool:
    """Whether the group's rewards differ, so that it carries a gradient.

    Args:
        group: with rewards.
        weights: of the reward functions, where each makes advantages by itself; ``None`` where their weighted sum does.
    """
    if weights is None:
        return _differ(group.reward)
    return any(weight and _differ(values) for values, weight in zip(zip(*group.rewards, strict=True), weights, strict=False))


def _differ(values: Iterable[float]) -> bool:
    return len({value for value in values if not math.isnan(value)}) > 1


def describe(
    groups: Sequence[Group], *, least_reward: float = 0.0, lives: Callable[[Group], bool] = has_variance
) -> dict[str, float]:
    """Reward and length statistics under TRL's names; rewards over the completions that have one.

    A group with fewer than two rewards carries no gradient, and so is in ``frac_reward_zero_std``, as it is not in TRL's.

    Args:
        groups: with rewards.
        least_reward: what a completion gets that earns nothing; ``frac_reward_all_wrong`` is the share of groups without a
            completion above it.
        lives: whether a group carries a gradient.
    """
    completions = [completion for group in groups for completion in group.completions]
    lengths = np.array([completion.num_sampled for completion in completions])
    ended = np.array([completion.num_sampled for completion in completions if not completion.truncated])
    metrics = {
        "reward": _mean(np.array([value for group in groups for value in group.reward])),
        "reward_std": _mean(np.array([_std(np.array(group.reward)) for group in groups])),
        "frac_reward_zero_std": 1.0 - sum(map(lives, groups)) / len(groups),
        "frac_reward_all_wrong": sum(_all_wrong(group, least_reward) for group in groups) / len(groups),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": 1.0 - len(ended) / len(lengths),
    }
    turns = np.array([completion.episode.num_turns for completion in completions if completion.episode is not None])
    if turns.size:
        metrics |= {"num_turns/mean": float(turns.mean()), "num_turns/max": float(turns.max())}
    metrics |= _tool_use(completions)
    if ended.size:
        terminated = {"mean": ended.mean(), "min": ended.min(), "max": ended.max()}
        metrics |= {f"completions/{name}_terminated_length": float(value) for name, value in terminated.items()}
    return metrics


def _tool_use(completions: Sequence[Completion]) -> dict[str, float]:
    """Calls of tools a completion, and the share of them that failed."""
    episodes = [completion.episode for completion in completions if completion.episode is not None]
    calls = [episode.num_tool_calls for episode in episodes if episode.num_tool_calls is not None]
    if not calls:
        return {}
    failures = sum(episode.num_tool_failures for episode in episodes)
    return {"tools/call_frequency": sum(calls) / len(calls), "tools/failure_frequency": failures / max(1, sum(calls))}


def _all_wrong(group: Group, least_reward: float) -> bool:
    known = [value for value in group.reward if not math.isnan(value)]
    return bool(known) and max(known) <= least_reward


def _mean(values: np.ndarray[Any, Any]) -> float:
    known = values[~np.isnan(values)] if values.size else values
    return float(known.mean()) if known.size else math.nan


def _std(values: np.ndarray[Any, Any]) -> float:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if known.size > 1 else 0.0
