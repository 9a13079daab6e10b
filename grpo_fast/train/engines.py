"""The engine that a run samples from: checked before anything is read, waited for, built, and shared by all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from grpo_fast.config import Config, ConfigError
from grpo_fast.rollout import RolloutEngine, RolloutError
from grpo_fast.rollout.transformers_engine import TransformersEngine, foreign_parts
from grpo_fast.rollout.transports import Host, choose_transport
from grpo_fast.rollout.vllm_addresses import api_key, check_addresses
from grpo_fast.rollout.vllm_arguments import check_engine_args
from grpo_fast.rollout.vllm_client import wait_until_up
from grpo_fast.rollout.vllm_engine import VLLMEngine, VLLMServerEngine, VLLMSettings
from grpo_fast.rollout.vllm_environment import require_vllm
from grpo_fast.rollout.vllm_sleep import sleep_level
from grpo_fast.tasks.replies import Replies
from grpo_fast.train.data import Data
from grpo_fast.train.distributed import World
from grpo_fast.train.episodes import InTurns, OneTurn, Sampler
from grpo_fast.train.policy import Policy
from grpo_fast.train.policy_source import PolicySource, pick_device
from grpo_fast.train.shares import MainEngine, SharedEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_sampler(config: Config, source: PolicySource) -> None:
    """Checks whether the engine can sample from a model of this kind, or raises a ConfigError."""
    model = f"model={config.model!r}, of type {source.model_config.model_type!r},"
    if config.rollout == "transformers":
        foreign = foreign_parts(source.model_config)
        if foreign is not None:
            raise ConfigError(
                f"{model} has {foreign}, but rollout='transformers' samples from decoders with attention layers only; choose "
                "such a model, or pass your own engine to GRPOTrainer"
            )
    elif not hasattr(source.model_config.get_text_config(decoder=True), "max_position_embeddings"):
        raise ConfigError(
            f"{model} has no max_position_embeddings, by which rollout={config.rollout!r} sizes vLLM; choose a model with "
            "attention layers, or pass your own engine to GRPOTrainer"
        )


def check_vllm(config: Config) -> None:
    """Checks whether vLLM is there and takes the configuration's settings, or raises a ConfigError."""
    urls, on_gpu = config.vllm_server_urls, pick_device(config.device).type == "cuda"
    if config.vllm_enable_sleep_mode:
        try:
            sleep_level(on_gpu=on_gpu, has_adapters=config.use_peft)
        except ValueError as error:
            raise ConfigError(f"vllm_enable_sleep_mode=True: {error}") from None
    host: Host = "own process" if config.vllm_own_process else "in process"
    try:
        if config.rollout == "vllm-http":
            host = check_addresses(urls)
            api_key()
        choose_transport(config.vllm_transport, host, on_gpu=on_gpu, num_engines=max(1, len(urls)))
        require_vllm()
        check_engine_args(config.vllm_engine_args, on_gpu=on_gpu)
    except (ValueError, RolloutError) as error:
        raise ConfigError(f"rollout={config.rollout!r}: {error}") from None


def wait_for_servers(config: Config) -> None:
    """Waits for the servers of ``rollout='vllm-http'``, which may be starting; for other rollouts it does nothing.

    Raises:
        ConfigError: one is not up after ``vllm_server_timeout``, or cannot be spoken to; it is named.
    """
    if config.rollout != "vllm-http":
        return
    try:
        wait_until_up(config.vllm_server_urls, timeout_s=config.vllm_server_timeout, deadline_s=config.sync_deadline_s)
    except RolloutError as error:
        raise ConfigError(f"rollout={config.rollout!r}: {error}") from None


def build_engine(config: Config, policy: Policy, longest: int, *, alone: bool = True) -> RolloutEngine:
    """The engine that the configuration names; ``longest`` is the length of the longest prompt in tokens.

    Beside other ranks vLLM has a process of its own, because in one with a process group it would take that for its own.
    """
    if config.rollout == "transformers":
        return TransformersEngine(
            policy.model, policy.tokenizer, autocast_dtype=policy.autocast_dtype, own_weights=config.max_staleness > 0
        )
    gib = config.vllm_kv_cache_gib
    settings = VLLMSettings(
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        kv_cache_bytes=None if gib is None else int(gib * 2**30),
        max_length=longest + config.max_completion_length,
        sync_deadline_s=config.sync_deadline_s,
        request_deadline_s=config.request_deadline_s,
        pause_mode=config.vllm_pause_mode,
        own_process=config.vllm_own_process or not alone,
        transport=config.vllm_transport,
        enable_sleep_mode=config.vllm_enable_sleep_mode,
        engine_args=config.vllm_engine_args,
    )
    if config.rollout == "vllm-http":
        return VLLMServerEngine(
            cast("PreTrainedModel", policy.whole_model()),
            policy.tokenizer,
            urls=config.vllm_server_urls,
            autocast_dtype=policy.autocast_dtype,
            settings=settings,
            device=policy.device,
        )
    return VLLMEngine(policy.model, policy.tokenizer, autocast_dtype=policy.autocast_dtype, settings=settings)


def share_engine(config: Config, policy: Policy, longest: int, *, given: RolloutEngine | None, world: World) -> RolloutEngine:
    """The engine, as all ranks use it together."""
    if given is None and config.rollout == "vllm-http" and world.size > 1:
        return MainEngine(lambda: build_engine(config, policy, longest), world, reading=policy.reading(world))
    engine = given or build_engine(config, policy, longest, alone=world.size == 1)
    return engine if world.size == 1 else SharedEngine(engine, world)


def build_sampler(config: Config, engine: RolloutEngine, data: Data, replies: Replies, *, world: World) -> Sampler:
    """Builds what has prompts answered: by the engine alone, or in turns with the environments."""
    if data.environments is None:
        return OneTurn(engine)
    return InTurns(engine, data.environments, replies, max_turns=config.max_turns, world=world, judges=data.judges)
