"""Everything a run is made of, built in the order in which mistakes are cheapest to find.

Output directory, rewards, data and tokeniser are checked before the weights are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

from grpo_fast.compute import Budget, ComputeMeter, ModelShape
from grpo_fast.config import Config, ConfigError
from grpo_fast.device import DeviceFacts, device_facts, energy_source
from grpo_fast.explain import meant
from grpo_fast.law import OnlinePredictor, Prior, RunFacts
from grpo_fast.objective import OBJECTIVES
from grpo_fast.rewards import RewardPool, reward_name
from grpo_fast.rollout import RolloutEngine
from grpo_fast.run_dir import CONFIG_FILE, write_whole
from grpo_fast.sinks import JsonlSink, RunInfo, Sink, SinkSet, build_sinks
from grpo_fast.tasks import PromptStream, Task
from grpo_fast.tasks.encoded import EncodedPrompts
from grpo_fast.tasks.remarks import few_held_out, plain_text, repeats, rounded, unreadable, unseen
from grpo_fast.train.adapter_start import OWN_SETTINGS
from grpo_fast.train.checkpoint import check_checkpoint, reading, recover_checkpoints
from grpo_fast.train.claim import Claim
from grpo_fast.train.data import (
    Data,
    check_episodes,
    check_rows,
    choose_data,
    choose_environments,
    choose_replies,
    encoded_task,
    reward_range,
    unheard,
)
from grpo_fast.train.disk_room import check_disk, checkpoint_bytes, few_checkpoints
from grpo_fast.train.distributed import ALONE, World
from grpo_fast.train.engines import build_sampler, check_sampler, check_vllm, share_engine, wait_for_servers
from grpo_fast.train.episodes import Sampler
from grpo_fast.train.given import GivenEngine, check_parts
from grpo_fast.train.handshake import check_prompts
from grpo_fast.train.launch import launcher, note_launch
from grpo_fast.train.optim import check_optimizer
from grpo_fast.train.plan_memory import check_room
from grpo_fast.train.policy import Policy, Scorer, count_parameters
from grpo_fast.train.policy_source import PolicySource, check_dtype, source_to_resume
from grpo_fast.train.reference import build_reference
from grpo_fast.train.resumable import LIMITS, has_ended
from grpo_fast.train.schedule import learning_rates
from grpo_fast.train.sharding import shards_of_one, spread
from grpo_fast.train.shares import Rewards, SharedRewards, idle_ranks
from grpo_fast.train.streaming import streams_weights
from grpo_fast.types import Prompt


@dataclass
class Parts:
    """The components that the trainer works with."""

    config: Config
    data: Data
    prompts: EncodedPrompts
    eval_prompts: list[Prompt]
    stream: PromptStream
    policy: Policy
    reference: Scorer | None
    engine: RolloutEngine
    sampler: Sampler
    """Samples answers to prompts from the engine, in several turns with an environment."""
    rewards: Rewards
    eval_rewards: Rewards
    predictor: OnlinePredictor
    meter: ComputeMeter
    budget: Budget
    record: JsonlSink
    """The run's own files; also one of ``sinks``."""
    sinks: SinkSet
    facts: DeviceFacts
    claim: Claim
    """This process's hold on the run's directory."""
    launchers: Sequence[str]
    """The launcher of each rank; see :func:`~grpo_fast.train.launch.launcher`."""
    checkpoints: Sequence[Path]
    """Complete checkpoints of a run that is resumed, oldest first; the policy has the weights of the last, but for adapters."""
    checkpoint_bytes: int
    """Bytes of one checkpoint."""

    def open(self, start_step: int) -> None:
        """Writes the resolved configuration and starts the sinks."""
        config = self.config
        self.claim.open()
        # With either of these left in it, to begin another run from this file would delete this one, or go on with it.
        write_whole(config.output_dir / CONFIG_FILE, config.replace(overwrite=False, resume_if_exists=False).to_toml())
        self.data.write_names(config.output_dir)
        note_launch(config.output_dir, self.launchers)
        self.sinks.start(
            RunInfo(
                run_dir=config.output_dir,
                model=config.model,
                dataset=self.data.task.name,
                max_steps=config.max_steps,
                start_step=start_step,
                device=self.facts.name,
                forecast_epsilon=config.forecast_epsilon,
                forecast_confidence=config.forecast_confidence,
                config=config.model_dump(mode="json"),
            )
        )
        room = few_checkpoints(config, self.checkpoint_bytes, step=start_step, existing=len(self.checkpoints))
        for remark in [*(self.remarks if start_step == 0 else ()), *room]:
            self.sinks.log_event(start_step, "warn", remark)
        if config.fsdp != "no_shard" and self.meter.num_devices == 1:
            self.sinks.log_event(start_step, "warn", shards_of_one(config))
        self.sinks.log_event(start_step, "resume" if start_step else "start", self.describe(start_step))

    @property
    def remarks(self) -> list[str]:
        """Warnings about the data, shown when the run starts."""
        config, prompts, held_out = self.config, self.prompts, self.eval_prompts
        asked = config.eval_size if "eval_size" in config.model_fields_set else 0
        return [
            *repeats(prompts, held_out, prompts_per_step=config.prompts_per_step),
            *(plain_text(prompts.num_plain, len(prompts)) if self.policy.tokenizer.chat_template is not None else ()),
            *unreadable(prompts, self.policy.tokenizer),
            *unseen(self.data.task.train),
            *rounded(self.data.task.train),
            *unheard(self.data),
            *(idle_ranks(config, self.meter.num_devices) if config.rollout != "vllm-http" else ()),
            *few_held_out(asked, len(held_out), num_prompts=len(prompts)),
        ]

    def describe(self, step: int) -> str:
        """One line on the run that starts."""
        shape = self.meter.shape
        begin = f"resuming after step {step}" if step else "training"
        return (
            f"{begin}: {self.config.model} ({(shape.body_params + shape.head_params) / 1e6:.1f} M matmul parameters) on "
            f"{self.data.task.name} ({len(self.prompts)} prompts, {len(self.eval_prompts)} held out), "
            f"rewarded by {', '.join(map(reward_name, self.data.reward_funcs))}, on {self.facts.name}"
        )

    def close(self) -> None:
        """Ends worker processes, the engine and the sinks, and releases the directory."""
        with contextlib.ExitStack() as each:  # in the opposite order; what one raises keeps none open
            each.callback(self.claim.release)
            each.callback(self.sinks.close)
            if self.data.environments is not None:
                each.callback(self.data.environments.close)
            each.callback(self.engine.close)
            each.callback(self.eval_rewards.close)
            each.callback(self.rewards.close)


class Replacements(TypedDict, total=False):
    """Arguments of the trainer that replace configured parts."""

    reward_funcs: str | Callable[..., Any] | Sequence[str | Callable[..., Any]]
    """Names, Python functions or reward models, in place of ``config.reward_funcs``; a single one needs no list."""
    train_dataset: Any
    """Rows, in place of ``config.dataset``: a ``datasets.Dataset`` or a list of mappings."""
    eval_dataset: Any
    """Held-out rows, together with ``train_dataset``."""
    task: Task
    """Prompts and rewards together, in place of ``config.dataset``."""
    environment_factory: str | Callable[[], Any]
    """Factory of the environments that answer the policy, usually a class; in place of ``config.environment_factory``."""
    tools: str | Callable[..., Any] | Sequence[str | Callable[..., Any]]
    """Functions that the policy may call, in place of ``config.tools``; a single one needs no list."""
    budget: Budget
    """Limits in place of the configuration's; ``config.max_steps`` still applies, as the horizon."""
    engine: RolloutEngine
    """Sampling engine, in place of ``config.rollout``."""
    predictor: OnlinePredictor
    """Forecaster, in place of the default one."""
    sinks: Sequence[Sink]
    """Sinks, in place of ``config.sinks``; the run's own files are always written."""


def check_given(config: object, given: Mapping[str, Any]) -> None:
    """Refuses arguments that the trainer does not have, such as those of a TRL script.

    Raises:
        TypeError: ``config`` is not a Config, or there is no such argument; the nearest one is named.
    """
    known = Replacements.__annotations__
    if not isinstance(config, Config):
        fix = "make one with Config(...) or recipe(...)"
        if type(config).__name__ == "GRPOConfig" or (config is None and {"args", "model"} & given.keys()):
            fix += "; docs/from-trl.md says what TRL's settings are called"
        raise TypeError(f"the first argument must be a Config, not {config!r:.80}; {fix}")
    for name in given:
        if name not in known:
            hint = meant(name, parts=known, settings=Config.model_fields)
            told = f"{name!r}; {hint}" if hint else f"{name!r}. "
            raise TypeError(
                f"GRPOTrainer() has no argument {told}It takes: {', '.join(known)}; other settings belong in Config"
            )


def _without_none(given: Replacements) -> Replacements:
    """What is given of parts that a run can do without: ``engine=None`` is as good as nothing."""
    optional = ("engine", "sinks", "budget", "predictor")
    return cast("Replacements", {name: part for name, part in given.items() if part is not None or name not in optional})


def build_parts(config: Config, given: Replacements, *, resume: bool, world: World = ALONE, saves: bool = True) -> Parts:
    """Builds the parts that the configuration names, except those given; of several ranks, only rank 0 has sinks.

    Args:
        config: of the run.
        given: see there.
        resume: whether the run in ``output_dir`` is resumed.
        world: the ranks.
        saves: whether checkpoints will be written.

    Raises:
        ConfigError: something cannot work; raised before anything expensive is done.
        ValueError: the loss, a reward or a sink cannot work with a number; raised before anything expensive is done.
        TypeError: a part that is given is of another kind; raised before that too.
    """
    given = _without_none(given)
    claim = Claim(config)
    world.once(lambda: claim.stake(resume=resume))
    try:
        return _build(config, given, claim, resume=resume, world=world, saves=saves)
    except BaseException:
        claim.release()
        raise


def _build(config: Config, given: Replacements, claim: Claim, *, resume: bool, world: World, saves: bool) -> Parts:
    world.each(lambda: _check(config, given, resume=resume))
    record, sinks = _build_sinks(config, given, world)
    budget = _build_budget(config, given.get("budget"))
    prior = load_prior(config)
    checkpoints = _checkpoints(config, world) if resume else []
    newest = checkpoints[-1] if checkpoints else None
    source = world.each(lambda: source_to_resume(config, newest))
    config = config.model_copy(update={name: getattr(source.config, name) for name in OWN_SETTINGS})
    world.once(lambda: claim.spare(source.directory, given))
    if "engine" not in given:
        check_sampler(config, source)
    place = {"devices_per_node": world.ranks_per_node, "begins_from_adapters": source.begins_from_adapters}
    world.each(lambda: check_room(source.model_config, source.config, num_devices=world.size, **place))
    outline = source.outline()
    needed = checkpoint_bytes(outline, source.config)
    if saves and not ("budget" not in given and newest and world.once(lambda: has_ended(config, newest))):
        world.once(lambda: check_disk(config, needed, freed=claim.freed()))
    with contextlib.ExitStack() as on_error:
        environments = world.each(lambda: choose_environments(config, given, opened=on_error))
        replies = world.each(lambda: choose_replies(config, environments, source))
        data = world.each(lambda: choose_data(config, given, chat=source.chat, environments=environments))
        config = config.model_copy(update={"reward_range": reward_range(config, data.task, data.reward_funcs)})
        rewards = build_pool(config, data.reward_funcs, config.reward_weights, world=world)
        if resume:
            world.once(lambda: data.check_names(config.output_dir))
        prompts, eval_prompts = world.each(lambda: encoded_task(config, data, source))
        check_prompts(prompts, eval_prompts, world)
        on_error.callback(rewards.close)
        rewards.start(prompts.columns)
        check_episodes(data, prompts, replies)
        if "engine" not in given:
            world.patiently(lambda: wait_for_servers(config))  # it may take minutes: after all that is cheap to check
        shape, num_parameters = ModelShape.from_model(outline), count_parameters(outline)
        streams = world.size > 1 and "engine" not in given and streams_weights(config)
        policy, read = _load(source, newest, config=config, world=world, streams=streams)
        longest = max(prompts.longest, eval_prompts.longest)
        own = GivenEngine(given["engine"], vocab_size=shape.vocab_size) if "engine" in given else None
        engine = share_engine(config, read, longest, given=own, world=world)
        on_error.callback(engine.close)
        facts = device_facts("cpu" if policy.device.type == "cpu" else "cuda")
        parts = Parts(
            config=config,
            data=data,
            prompts=prompts,
            eval_prompts=eval_prompts[: config.eval_size],
            stream=PromptStream(prompts, seed=config.seed, shuffle=config.shuffle),
            policy=policy,
            reference=build_reference(source, policy, config=config, world=world) if config.beta > 0 else None,
            engine=engine,
            sampler=build_sampler(config, engine, data, replies, world=world),
            rewards=rewards,
            eval_rewards=build_pool(config, (data.measure,), (), world=world) if data.measure else rewards,
            predictor=given.get("predictor") or _build_predictor(config, prior, num_parameters=num_parameters),
            meter=_build_meter(config, policy, shape=shape, facts=facts, num_devices=world.size),
            budget=budget,
            record=record,
            sinks=sinks,
            facts=facts,
            claim=claim,
            launchers=world.gather(launcher),
            checkpoints=checkpoints,
            checkpoint_bytes=needed,
        )
        on_error.pop_all()
    return parts


def _checkpoints(config: Config, world: World) -> list[Path]:
    """Complete checkpoints of the run, oldest first, of which the newest is sound by its manifest."""
    run = config.output_dir  # which other ranks may reach by another path
    found = [run / path.name for path in world.once(lambda: recover_checkpoints(run))]
    if found:
        world.gather(lambda: check_checkpoint(found[-1]))
    return found


def _load(
    source: PolicySource, checkpoint: Path | None, *, config: Config, world: World, streams: bool
) -> tuple[Policy, Policy]:
    """The policy to train, and the one that the engine reads, with a checkpoint's weights; adapters come later."""
    if checkpoint is not None and not config.use_peft:
        with reading(checkpoint):
            return _load(source.at(checkpoint), None, config=config, world=world, streams=streams)
    if world.size > 1:
        return spread(source, config=config, world=world, streams=streams)
    policy = source.load()
    return policy, policy


def _check(config: Config, given: Replacements, *, resume: bool) -> None:
    """Checks that need no tokeniser, data or weights."""
    check_rows(given)
    check_parts(config, given, resume=resume)
    check_dtype(config)
    OBJECTIVES[config.loss_type].spec(config)
    if config.rollout != "transformers" and "engine" not in given:
        check_vllm(config)
    check_optimizer(config)
    learning_rates(config)


def _build_sinks(config: Config, given: Replacements, world: World) -> tuple[JsonlSink, SinkSet]:
    """The run's own files, and all sinks, which only the main process has."""
    try:
        record, sinks = build_sinks(() if "sinks" in given else config.sinks, config.output_dir)
    except ImportError as error:
        raise ConfigError(f"sinks={list(config.sinks)}: {error}") from error
    if "sinks" in given:
        sinks = SinkSet([record, *given["sinks"]], record=record)
    return record, sinks if world.is_main else SinkSet([])


def _build_predictor(config: Config, prior: Prior, *, num_parameters: int) -> OnlinePredictor:
    return OnlinePredictor(
        config.max_steps,
        epsilon=config.forecast_epsilon,
        reward_range=config.reward_range,
        facts=RunFacts(size_b=num_parameters / 1e9, lora=config.use_peft),
        prior=prior,
    )


def _build_meter(config: Config, policy: Policy, *, shape: ModelShape, facts: DeviceFacts, num_devices: int) -> ComputeMeter:
    return ComputeMeter(
        shape,
        power=energy_source(facts, num_devices=num_devices),
        price_per_gpu_hour=config.price_per_gpu_hour,
        num_devices=num_devices,
        peak_flops=facts.peak_bf16_flops if policy.autocast_dtype is not None else None,
    )


def load_prior(config: Config) -> Prior:
    """The prior that a configuration names, or the one in the package.

    Raises:
        ConfigError: the file cannot be read, or holds no prior.
    """
    if config.forecast_prior is None:
        return Prior.default()
    try:
        return Prior.load(config.forecast_prior)
    except (OSError, ValueError) as error:
        raise ConfigError(f"forecast_prior: {error}") from error


def _build_budget(config: Config, given: Budget | None) -> Budget:
    budget = given or Budget.from_config(**{name: getattr(config, name) for name in LIMITS})
    if budget.money is not None and config.price_per_gpu_hour == 0:
        raise ConfigError(f"a budget of money ({budget.money:g}) needs price_per_gpu_hour above 0")
    return budget


def build_pool(
    config: Config, reward_funcs: Sequence[str | Callable[..., Any]], weights: Sequence[float], *, world: World
) -> Rewards:
    """The pool of some reward functions, as all ranks use it together."""
    pool = RewardPool(
        reward_funcs,
        weights=weights or None,
        timeout_s=config.reward_timeout_s,
        workers=config.reward_workers,
        on_error=config.reward_on_error,
    )
    return pool if world.size == 1 else SharedRewards(pool, world)
