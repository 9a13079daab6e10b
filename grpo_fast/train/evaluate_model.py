"""A model measured on held-out prompts, outside a run: a checkpoint of one, or any other model."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grpo_fast.config import Config, ConfigError
from grpo_fast.metrics import mean_known
from grpo_fast.rewards import RewardReport
from grpo_fast.run_dir import run_of, write_whole
from grpo_fast.tasks.files import hold_out
from grpo_fast.tasks.task import Task
from grpo_fast.train.adapters import SETTINGS_FILE
from grpo_fast.train.data import Data, check_episodes, choose_data, choose_environments, choose_replies, encoded
from grpo_fast.train.distributed import ALONE
from grpo_fast.train.engines import build_engine, build_sampler, check_sampler, check_vllm, wait_for_servers
from grpo_fast.train.evaluate import answers
from grpo_fast.train.export import PLAIN, checkpoint_meant
from grpo_fast.train.parts import build_pool
from grpo_fast.train.policy_source import PolicySource, check_dtype
from grpo_fast.train.resumable import config_of
from grpo_fast.types import Group


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over completions, and how sure it is."""

    mean: float
    """Mean over the completions that got a value; NaN where none did."""
    error: float
    """Its standard error, from the spread of the prompts' means, as completions of one prompt are alike; NaN below two."""
    num_values: int
    """Completions that got a value."""

    @classmethod
    def of(cls, values: Sequence[Sequence[float]]) -> Estimate:
        """The estimate from [P][G] values, NaN where there is none."""
        known = [[value for value in row if not math.isnan(value)] for row in values]
        means = np.array([math.fsum(row) / len(row) for row in known if row], dtype=np.float64)
        error = float(means.std(ddof=1)) / math.sqrt(means.size) if means.size > 1 else math.nan
        return cls(mean_known(value for row in known for value in row), error, sum(map(len, known)))

    def to_dict(self) -> dict[str, float | int | None]:
        """JSON values; ``None`` in place of NaN."""
        mean, error = (None if math.isnan(value) else value for value in (self.mean, self.error))
        return {"mean": mean, "standard_error": error, "num_values": self.num_values}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A model's answers to held-out prompts, and what the reward functions gave them."""

    model: str
    """Checkpoint, directory or hub id."""
    dataset: str
    temperature: float
    """At which it was sampled; 0: greedily."""
    max_completion_length: int
    groups: Sequence[Group]
    """P prompts with G completions each."""
    reward: Estimate
    """Estimate of the training reward, the weighted sum of its functions."""
    rewards: dict[str, Estimate]
    """Estimates of each reward function by its name; the task's own measure is among them."""
    problems: Sequence[str] = ()
    """One line for each reward call that failed, with ``reward_on_error`` "none"."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(completion.token_ids) for group in self.groups for completion in group.completions]

    @property
    def truncated_share(self) -> float:
        """Share of the completions that the length limit cut."""
        return float(np.mean([completion.truncated for group in self.groups for completion in group.completions]))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "num_prompts": len(self.groups),
            "num_completions": len(self.lengths),
            "temperature": self.temperature,
            "max_completion_length": self.max_completion_length,
            "reward": self.reward.to_dict(),
            "rewards": {name: estimate.to_dict() for name, estimate in self.rewards.items()},
            "mean_length": float(np.mean(self.lengths)),
            "max_length": max(self.lengths),
            "truncated_share": self.truncated_share,
            "problems": list(self.problems),
        }

    def write_completions(self, path: Path) -> None:
        """Writes a JSON line for each completion: prompt, the dataset's columns, completion, reward, tokens, how it ended."""
        lines = [
            {
                "prompt": group.prompt.prompt,
                "columns": dict(group.prompt.columns),
                "completion": completion.text,
                "reward": None if math.isnan(reward) else reward,
                "tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
            }
            for group in self.groups
            for completion, reward in zip(group.completions, group.reward, strict=True)
        ]
        write_whole(path, "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))


def evaluate_model(config: Config, source: str) -> Evaluation:
    """Samples answers to held-out prompts and scores them, as a run's evaluations do.

    Args:
        config: of data, rewards, sampling and engine; for a run's checkpoint usually the run's own. ``eval_size``,
            ``eval_split``, ``eval_temperature`` and ``num_generations_eval`` are as in training.
        source: a checkpoint of a run; a run, of which the checkpoint is taken that its summary names, or else the newest; or a
            model's directory or hub id, as in ``config.model``; a directory of adapters needs no ``use_peft``.

    Raises:
        ConfigError: model, data or rewards cannot be read, nothing is held out, or the run trained on what is.
        CheckpointError: the checkpoint is damaged, or there is none.
        RewardError: a reward function failed and ``reward_on_error`` is ``raise``.
        RolloutError: the engine failed.
    """
    config, checkpoint = _resolved(config, source)
    check_dtype(config)
    if config.rollout != "transformers":
        check_vllm(config)
    policy_source = PolicySource(config)
    check_sampler(config, policy_source)
    with contextlib.ExitStack() as opened:
        environments = choose_environments(config, {}, opened=opened)
        replies = choose_replies(config, environments, policy_source)
        data = choose_data(config, {}, chat=policy_source.chat, environments=environments)
        prompts = encoded(config, data.task.eval, policy_source, tools=data.schemas, numbers=data.task.eval_numbers)
        if not prompts:
            fix = "set eval_split" if config.eval_size else "set eval_size above 0"
            if not config.eval_size and checkpoint is not None and data.task.train_numbers is not None:
                fix += ", and another eval_split or dataset: with eval_size=0 the run trained on all rows"
            raise ConfigError(f"{data.task.name} has no held-out rows; {fix}")
        if (run := run_of(Path(source))) is not None:
            _check_unseen(config, config_of(run), data.task)
        training = build_pool(config, data.reward_funcs, config.reward_weights, world=ALONE)
        opened.callback(training.close)
        training.start(prompts.columns)
        check_episodes(data, prompts, replies)
        wait_for_servers(config)
        policy = policy_source.load()
        if checkpoint is not None and config.use_peft:
            policy.load_weights(checkpoint)
        engine = build_engine(config, policy, prompts.longest)
        opened.callback(engine.close)
        sampler = build_sampler(config, engine, data, replies, world=ALONE)
        groups = answers(config, sampler, prompts[: config.eval_size])
        return Evaluation(
            model=source if checkpoint is None else str(checkpoint),
            dataset=data.task.name,
            temperature=config.eval_temperature,
            max_completion_length=config.max_completion_length,
            groups=groups,
            **_scored(config, data, groups, training.score),
        )


def _resolved(config: Config, source: str) -> tuple[Config, Path | None]:
    """The configuration to measure with, and the checkpoint that is meant, if ``source`` is a run or one of its checkpoints."""
    config, run = config.replace(**PLAIN), run_of(Path(source))
    if run is None:
        adapters = (Path(source) / SETTINGS_FILE).is_file() and not (Path(source) / "config.json").exists()
        return config.replace(model=source, use_peft=config.use_peft or adapters), None
    checkpoint = checkpoint_meant(Path(source), run)
    return config if config.use_peft else config.replace(model=str(checkpoint), revision=None), checkpoint


def _check_unseen(config: Config, trained: Config, task: Task) -> None:
    """Refuses held-out rows that a run, whose configuration is ``trained``, did not hold out of the same table."""
    tables = [(each.dataset, each.dataset_config, each.dataset_split) for each in (config, trained)]
    if tables[0] != tables[1] or task.train_numbers is None or task.eval_numbers is None:
        return
    own: Sequence[int] = ()
    if trained.eval_split is None:
        _, own = hold_out(len(task.train_numbers) + len(task.eval_numbers), trained.eval_size, seed=trained.seed)
    seen = len(set(task.eval_numbers) - set(own))
    if seen:
        fix = "it held out none of this table. Set eval_split"
        if own:
            fix = (
                f"it held out {len(own)}, with eval_size={trained.eval_size} and seed={trained.seed}. Leave both as they were, "
            )
            fix += f"or set eval_size to {len(own)} or less"
        raise ConfigError(
            f"eval_size={config.eval_size}, seed={config.seed}: the run trained on {seen} of these {len(task.eval_numbers)} "
            f"rows; {fix}"
        )


def _scored(
    config: Config, data: Data, groups: Sequence[Group], score: Callable[[Sequence[Group]], RewardReport]
) -> dict[str, Any]:
    """Estimates of the reward and of each function, and what failed; the groups keep the training rewards."""
    measured: dict[str, Estimate] = {}
    problems: tuple[str, ...] = ()
    if data.measure and data.measure not in data.reward_funcs:
        measure = build_pool(config, (data.measure,), (), world=ALONE)
        with contextlib.closing(measure):
            report = measure.score(groups)
            measured, problems = _each(report.mean, groups), report.problems
    report = score(groups)
    each = _each(report.mean, groups) | measured
    reward = Estimate.of([group.reward for group in groups])
    return {"reward": reward, "rewards": each, "problems": report.problems + problems}


def _each(names: Iterable[str], groups: Sequence[Group]) -> dict[str, Estimate]:
    return {name: Estimate.of([[row[place] for row in group.rewards] for group in groups]) for place, name in enumerate(names)}
