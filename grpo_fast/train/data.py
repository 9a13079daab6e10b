"""Data and rewards of a run, as configured or as given in Python, and a record of both for a later resume."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_fast.config import Config, ConfigError
from grpo_fast.environments import Environments
from grpo_fast.given_values import dataset_anywhere
from grpo_fast.rewards import RewardFunction, resolve_reward, reward_name
from grpo_fast.rewards.call import check_columns
from grpo_fast.rewards.functions import BOUNDS
from grpo_fast.rewards.judged import ARGUMENT, set_apart
from grpo_fast.run_dir import write_whole
from grpo_fast.tasks import Rows, Task, encode_prompts, load_task
from grpo_fast.tasks.encoded import EncodedPrompts
from grpo_fast.tasks.replies import Replies
from grpo_fast.tasks.tool_calls import ToolReplies
from grpo_fast.tools import NoEnvironment, find_tools
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.train.reward_model import with_models

_FILE = "sources.json"


@dataclass(frozen=True, slots=True)
class Data:
    """Rows and rewards."""

    task: Task
    reward_funcs: Sequence[str | Callable[..., Any]]
    """The training rewards: names, or functions as they were given."""
    environments: Environments | None = None
    """The environments that answer the policy between its turns; started."""
    judges: Sequence[RewardFunction] = ()
    """Reward functions that read environments; in ``reward_funcs`` others stand for them."""

    @property
    def measure(self) -> str:
        """The task's own reward of held-out answers; empty if the training rewards measure them, as with environments."""
        return self.task.eval_reward if self.environments is None else ""

    @property
    def schemas(self) -> Sequence[Mapping[str, Any]]:
        """JSON schemas of the tools that the model is told of."""
        return () if self.environments is None else self.environments.schemas

    @property
    def _names(self) -> dict[str, Any]:
        return {
            "dataset": self.task.name,
            "reward_funcs": [reward_name(function) for function in self.reward_funcs],
        } | ({"environment_factory": None, "tools": None} if self.environments is None else self.environments.sources)

    def write_names(self, run_dir: Path) -> None:
        """Records in a run's directory the names of data and rewards given in Python, which its configuration lacks."""
        write_whole(run_dir / _FILE, json.dumps(self._names, indent=1))

    def check_names(self, run_dir: Path) -> None:
        """Refuses to go on with another dataset or other rewards than a run was begun with.

        Args:
            run_dir: the run's directory; of one that was killed before it wrote its names nothing is known.

        Raises:
            ConfigError: they differ; both are named.
        """
        file = run_dir / _FILE
        if not file.exists():
            return
        begun = json.loads(file.read_text(encoding="utf-8"))
        for name, now in self._names.items():
            before = begun.get(name)
            if name == "dataset" and before != now:  # older runs have it as it was given
                before = dataset_anywhere(before)
            if before != now:
                raise ConfigError(
                    f"the run in {run_dir} started with {name} {before!r}, but now {name} is {now!r}; resume with the same "
                    "one (given in Python, give it to GRPOTrainer.resume too), or start a new run in another output_dir with "
                    f"model='{run_dir}/checkpoint-N', which begins from a checkpoint's weights"
                )


def check_rows(given: Mapping[str, Any]) -> None:
    """Refuses data given in Python that does not go together.

    Raises:
        ConfigError: two sources of rows, or held-out rows alone.
    """
    if "train_dataset" in given and "task" in given:
        raise ConfigError("train_dataset and task are both given; each brings the rows to train on, so give one")
    if "eval_dataset" in given and "train_dataset" not in given:
        raise ConfigError("eval_dataset is given without train_dataset; give both, or name a split by eval_split")


def choose_environments(config: Config, given: Mapping[str, Any], *, opened: ExitStack) -> Environments | None:
    """Environments and tools as given or configured, started; ``None`` where there are none.

    Args:
        config: the run's configuration.
        given: of :class:`~grpo_fast.train.parts.Replacements`, those on environments and tools are read.
        opened: will close them.

    Raises:
        ConfigError: they cannot be found, are none, or do not go together.
    """
    factory = given.get("environment_factory", config.environment_factory)
    functions = given.get("tools", config.tools) or ()
    try:
        tools = find_tools([functions] if isinstance(functions, str) or callable(functions) else functions)
        if factory is None and not tools:
            return None
        environments = Environments(
            NoEnvironment if factory is None else factory,
            tools=tools,
            timeout_s=config.environment_timeout_s,
            workers=config.environment_workers,
        )
        opened.enter_context(environments)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return environments


def choose_replies(config: Config, environments: Environments | None, source: PolicySource) -> Replies:
    """Makes the part that tokenises an environment's answers and reads the policy's calls of tools.

    Raises:
        ConfigError: there are tools, and the model's chat template does not know how to tell of them.
    """
    if environments is None or not environments.schemas:
        return Replies(source.tokenizer, config.chat_template_kwargs)
    try:
        return ToolReplies(source.tokenizer, config.chat_template_kwargs, environments.schemas)
    except ConfigError as error:
        raise ConfigError(f"tools {', '.join(environments.tool_names)} cannot be used by {config.model}: {error}") from error


def check_episodes(data: Data, prompts: EncodedPrompts, replies: Replies) -> None:
    """Tries what episodes will need.

    Raises:
        ConfigError: the chat template refuses an answer, or the dataset lacks a column.
    """
    if data.environments is None:
        return
    if prompts.num_plain < len(prompts):
        replies.token_ids([{"role": "user", "content": "go on"}], last_token=-1)
    if data.judges and ARGUMENT in prompts.columns:
        raise ConfigError(
            f"the dataset column {ARGUMENT!r} has the name of an argument that reward functions receive; rename it"
        )
    try:
        data.environments.check_columns(prompts.columns)
        for reward in data.judges:
            check_columns(reward, [*prompts.columns, ARGUMENT])
    except ValueError as error:
        raise ConfigError(str(error)) from None


def unheard(data: Data) -> list[str]:
    """Tells of an environment's ``get_reward`` that no reward is made of."""
    environments = data.environments
    if environments is None or not environments.can_rate or data.judges or "environment" in data.reward_funcs:
        return []
    if any("environment_rewards" in _names(function) for function in data.reward_funcs):
        return []
    names = ", ".join(map(reward_name, data.reward_funcs))
    told = f"has a get_reward, which counts for nothing here: reward_funcs are {names}; add 'environment' to them"
    return [f"environment {environments.name!r} {told}"]


def _names(function: str | Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(resolve_reward(function).function).parameters
    except (ValueError, TypeError):
        return ()


def choose_data(config: Config, given: Mapping[str, Any], *, chat: bool, environments: Environments | None = None) -> Data:
    """Chooses data and rewards: those given, else those configured, else an environment's own rewards, else the task's.

    Args:
        config: the run's configuration.
        given: of :class:`~grpo_fast.train.parts.Replacements`, those on data and rewards are read.
        chat: whether the tokeniser has a chat template.
        environments: what answers the policy.

    Raises:
        ConfigError: data that cannot be read or used, or a reward that no environment gives.
    """
    rates = environments is not None and environments.can_rate
    needs_reward = "reward_funcs" not in given and not rates
    if "train_dataset" in given:
        from grpo_fast.tasks import task_of  # noqa: PLC0415 (it imports datasets, which takes half a second)

        task = task_of(config, given["train_dataset"], given.get("eval_dataset"), needs_reward=needs_reward)
    else:
        task = given.get("task") or load_task(config, chat=chat, needs_reward=needs_reward)
    functions = given.get("reward_funcs", ())
    alone = isinstance(functions, str) or callable(functions)
    own = ("environment",) if rates else task.reward_funcs
    chosen = with_models(config, [functions] if alone else functions or config.reward_funcs or own)
    if "environment" in chosen and not rates:
        raise ConfigError(
            "the reward 'environment' comes from the get_reward of an environment, but "
            + ("there is none; set environment_factory" if environments is None else f"{environments.name!r} has none; add it")
        )
    if environments is None:
        return Data(task, chosen)
    stand_ins, judges = set_apart(chosen)
    return Data(task, stand_ins, environments, judges)


def reward_range(config: Config, task: Task, reward_funcs: Sequence[str | Callable[..., Any]]) -> tuple[float, float] | None:
    """The range of the mean reward: as configured, else from the rewards themselves; ``None`` where one's is not known.

    Args:
        config: the run's configuration; its range and weights are read.
        task: knows the range of its own rewards.
        reward_funcs: the training rewards.
    """
    if config.reward_range is not None:
        return config.reward_range
    known = {**dict.fromkeys(task.reward_funcs, task.reward_range), **BOUNDS}
    bounds = [known.get(spec) if isinstance(spec, str) else None for spec in reward_funcs]
    weights = config.reward_weights or [1.0] * len(bounds)
    ends = [sorted((weight * of[0], weight * of[1])) for weight, of in zip(weights, bounds, strict=False) if of is not None]
    least, greatest = (sum(end[place] for end in ends) for place in (0, 1))
    return (least, greatest) if len(ends) == len(bounds) and least < greatest else None


def encoded(
    config: Config,
    rows: Rows,
    source: PolicySource,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    numbers: Sequence[int] | None = None,
) -> EncodedPrompts:
    """Rows as the model reads them.

    Args:
        config: the run's configuration.
        rows: each with a prompt.
        source: has the tokeniser.
        tools: JSON schemas of the tools that the model is told of.
        numbers: those by which errors name the rows.

    Raises:
        ConfigError: prompts that cannot be read, or are too long.
    """
    return encode_prompts(
        rows,
        source.tokenizer,
        system_prompt=config.system_prompt,
        chat_template_kwargs=config.chat_template_kwargs,
        tools=tools,
        max_prompt_length=source.max_prompt_length,
        overlong=config.overlong_prompts,
        numbers=numbers,
    )


def encoded_task(config: Config, data: Data, source: PolicySource) -> tuple[EncodedPrompts, EncodedPrompts]:
    """Prompts to train on, and those held out.

    Raises:
        ConfigError: as :func:`encoded`; or nothing is held out, and evaluation is on.
    """
    task, tools = data.task, data.schemas
    prompts = encoded(config, task.train, source, tools=tools, numbers=task.train_numbers)
    eval_prompts = encoded(config, task.eval, source, tools=tools, numbers=task.eval_numbers)
    if config.eval_steps and not eval_prompts:
        raise ConfigError(
            f"eval_steps={config.eval_steps}, but {task.name} has no held-out rows; set eval_split, or eval_steps=0"
        )
    return prompts, eval_prompts
