"""Facts about a run before it begins: read from model and data, measured by a probe, given, or assumed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo_fast.compute import ModelShape
from grpo_fast.compute.outlook import Guess, Pace, StepWork
from grpo_fast.config import Config, ConfigError
from grpo_fast.device import GPU_TABLE, device_facts, gpu_spec, similar_gpus
from grpo_fast.law import RunFacts
from grpo_fast.metrics import PhaseTimer
from grpo_fast.tasks import Task, load_task
from grpo_fast.tools import find_tools, schemas_of
from grpo_fast.train.collect import Collector
from grpo_fast.train.data import encoded, reward_range
from grpo_fast.train.disk_room import checkpoint_bytes
from grpo_fast.train.evaluate import evaluate, probe
from grpo_fast.train.optim import build_optimizer
from grpo_fast.train.parts import Parts, build_parts
from grpo_fast.train.policy import count_parameters
from grpo_fast.train.policy_source import PolicySource, pick_device
from grpo_fast.train.results import idle_passes
from grpo_fast.train.step import Learner

ASSUMED_MFU = 0.1
"""Share of the peak that is assumed where nothing was timed, within a factor of 3: sampling waits for memory, not for FLOPs."""
LAYER_TOKEN_S = 50e-6
"""Seconds a layer is assumed to take, at least, to decode one more token of however few sequences: ten kernels, launched by
the host one after the other in about 5 us each."""
_MFU_FACTOR, _GIVEN_MFU_FACTOR = 3.0, 1.3
_DRIFT, _GIVEN_FACTOR, _UNKNOWN_LENGTH_FACTOR = 1.5, 1.25, 2.5
_SHARE, _SHARE_FACTOR, _MEASURED_SHARE_FACTOR = 0.7, 1.5, 1.6
_LORA_SHARE = 0.01
_CHARACTERS_A_TOKEN, _SAMPLED_ROWS = 4.0, 256


@dataclass(frozen=True)
class PlanInputs:
    """Inputs of a plan in addition to the run's configuration.

    Attributes:
        probe: training prompts that the untrained policy answers, after which two steps are timed; 0 for neither.
        start_reward: mean reward of the untrained policy, where it is known already.
        model_size: parameters in 1e9, to plan without a model.
        lora: whether adapters are trained rather than all weights.
        prompt_tokens: mean length of a prompt; with ``data_size`` no data is read.
        data_size: number of prompts.
        completion_tokens: mean length of a completion.
        seconds_per_step: wall-clock seconds of a step.
        mfu: model FLOPs as a share of the device's peak.
        gpu: the device, by the name that CUDA gives it; this machine's without one. With ``seconds_per_step`` it may be one
            that the table of :mod:`grpo_fast.device` does not hold.
        num_devices: devices that the run holds.

    Raises:
        ConfigError: values that contradict each other or are out of range.
    """

    probe: int = 0
    start_reward: float | None = None
    model_size: float | None = None
    lora: bool = False
    prompt_tokens: float | None = None
    data_size: int | None = None
    completion_tokens: float | None = None
    seconds_per_step: float | None = None
    mfu: float | None = None
    gpu: str | None = None
    num_devices: int = 1

    def __post_init__(self) -> None:
        for name in ("model_size", "prompt_tokens", "data_size", "completion_tokens", "seconds_per_step", "mfu", "num_devices"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name}={value} must be a positive number, or left out if it is unknown")
        if self.probe < 0 or self.probe == 1:
            raise ConfigError(f"probe={self.probe} must be at least 2 prompts, or 0 for no probe")
        if self.mfu is not None and self.mfu > 1:
            raise ConfigError(f"mfu={self.mfu} must be a share of the device's peak, at most 1")
        if self.probe and self.model_size is not None:
            raise ConfigError("a probe needs the model itself: leave out model_size, or probe")
        if self.probe and self.start_reward is not None:
            raise ConfigError("probe measures the start reward: leave out start_reward, or probe")
        if self.probe and (self.gpu is not None or self.num_devices > 1):
            raise ConfigError("a probe times this machine, on one device: leave out gpu and num_devices, or probe")
        if self.seconds_per_step is not None and self.mfu is not None:
            raise ConfigError("seconds_per_step and mfu both determine the time per step: give one of them")
        if self.gpu is not None and self.seconds_per_step is None and gpu_spec(self.gpu) is None:
            raise ConfigError(f"unknown gpu={self.gpu!r}{_known_gpus(self.gpu)}, or time a step and give seconds_per_step too")

    @property
    def planned_for(self) -> torch.device | None:
        """The device that is named, which need not be here."""
        return None if self.gpu is None else torch.device("cuda")


def _known_gpus(name: str) -> str:
    """Suggests a name in place of a GPU's name that is not in the table."""
    similar = similar_gpus(name)
    if similar:
        return f"; did you mean {' or '.join(map(repr, similar))}? Choose one"
    laptop = " (how fast a laptop's GPU is depends on the power that the laptop gives it)" if "laptop" in name.lower() else ""
    return f"{laptop}; choose one of {', '.join(row.name for row in GPU_TABLE)}"


@dataclass(frozen=True)
class PlanFacts:
    """The facts that a plan is based on.

    Attributes:
        facts: what the prior is asked for.
        work: sizes of a step.
        pace: how fast steps go.
        completion_tokens: mean length of a completion over the run.
        trained_share: share of completions that carry a gradient.
        num_prompts: prompts of the training data.
        device: the device's name.
        model: the model in words.
        dataset: the data in words.
        sources: how each fact is known, by name: "read", "measured", "given", "assumed" or "unknown".
        notes: what was assumed, in sentences.
        held_out: held-out reward of the untrained policy, where it was measured.
        sampled_lengths: tokens of the completions of a probe's step, group after group.
        reward_range: lowest and highest possible mean reward, if known.
        checkpoint_bytes: size of a checkpoint on disk; None if only the model's size is known.
    """

    facts: RunFacts
    work: StepWork
    pace: Pace
    completion_tokens: Guess
    trained_share: Guess
    num_prompts: int
    device: str
    model: str
    dataset: str
    sources: Mapping[str, str]
    notes: list[str] = field(default_factory=list)
    held_out: float | None = None
    sampled_lengths: tuple[int, ...] = ()
    reward_range: tuple[float, float] | None = None
    checkpoint_bytes: int | None = None


def gather(config: Config, inputs: PlanInputs) -> PlanFacts:
    """Reads, measures and assumes what a plan needs.

    Raises:
        ConfigError: model or data cannot be read.
        RewardError: a probe's reward function failed.
    """
    return _probed(config, inputs) if inputs.probe else _unprobed(config, inputs)


def _unprobed(config: Config, inputs: PlanInputs) -> PlanFacts:
    notes: list[str] = []
    sources = {"start_reward": "unknown" if inputs.start_reward is None else "given"}
    if inputs.model_size is not None:
        size, source, model = inputs.model_size, None, f"a model of {inputs.model_size:g} B parameters"
        on_disk = None
        shape = ModelShape(round(size * 1e9), 0, 0, 0, 0, 0)
        notes.append("only the model's size is known: FLOPs are counted as two per parameter and token, without attention")
    else:
        source = PolicySource(config, planned_for=inputs.planned_for)
        outline = source.outline()
        size, shape, model = _size(outline), ModelShape.from_model(outline), config.model
        on_disk = checkpoint_bytes(outline, source.config)
    sources["model_size"] = "given" if inputs.model_size is not None else "read"
    task = None if inputs.data_size is not None and inputs.prompt_tokens is not None else _task(config, source)
    dataset, count, prompt_tokens = _data(config, inputs, source, task=task, notes=notes)
    lengths = _lengths(config, inputs, notes)
    sources["completion_tokens"] = lengths.source
    sources |= {"num_prompts": "read" if inputs.data_size is None else "given"}
    shape = _adapted(config, shape, inputs, notes)
    pace, device = _pace(config, inputs, sources, notes)
    share = Guess(_SHARE, _SHARE_FACTOR, "assumed", most=1.0)
    work = _work(config, shape, prompt_tokens)
    if pace.mfu is not None and inputs.mfu is None:
        pace = _unless_launches_decide(pace, work, lengths, share, sources=sources, notes=notes)
    return PlanFacts(
        facts=RunFacts(size_b=size, start=inputs.start_reward, lora=inputs.lora or config.use_peft),
        work=work,
        pace=pace,
        completion_tokens=lengths,
        trained_share=share,
        num_prompts=count,
        device=device,
        model=model,
        dataset=dataset,
        sources=sources,
        notes=notes,
        reward_range=_reward_range(config, task),
        checkpoint_bytes=on_disk,
    )


def _task(config: Config, source: PolicySource | None) -> Task:
    return load_task(config, chat=source is not None and source.chat, needs_reward=config.environment_factory is None)


def _reward_range(config: Config, task: Task | None) -> tuple[float, float] | None:
    if task is None or (config.environment_factory is not None and not config.reward_funcs):
        return config.reward_range
    return reward_range(config, task, config.reward_funcs or task.reward_funcs)


def _data(
    config: Config, inputs: PlanInputs, source: PolicySource | None, *, task: Task | None, notes: list[str]
) -> tuple[str, int, float]:
    """Name, number of prompts and their mean length in tokens; without a task both are given."""
    if task is None:
        assert inputs.data_size is not None
        assert inputs.prompt_tokens is not None
        return "data of that size", inputs.data_size, inputs.prompt_tokens
    count = inputs.data_size or len(task.train)
    if inputs.prompt_tokens is not None:
        return task.name, count, inputs.prompt_tokens
    if source is None:
        rows = [task.train[index] for index in range(min(_SAMPLED_ROWS, len(task.train)))]
        characters = sum(len(_text(row["prompt"])) for row in rows) / len(rows)
        notes.append(f"prompts have {characters:.0f} characters on average; {_CHARACTERS_A_TOKEN:g} are counted as a token")
        return task.name, count, max(1.0, characters / _CHARACTERS_A_TOKEN)
    tools = schemas_of(find_tools(config.tools))
    prompts = encoded(config, task.train, source, tools=tools, numbers=task.train_numbers)
    return task.name, inputs.data_size or len(prompts), prompts.mean_length


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else " ".join(str(message.get("content")) for message in prompt)


def _lengths(config: Config, inputs: PlanInputs, notes: list[str]) -> Guess:
    most = config.max_completion_length
    if inputs.completion_tokens is not None:
        if inputs.completion_tokens > most:
            raise ConfigError(f"completion_tokens={inputs.completion_tokens:g} exceeds max_completion_length={most}")
        return Guess(inputs.completion_tokens, _DRIFT, "given", most=most)
    notes.append(
        f"the length of completions is unknown: half of max_completion_length={most} is assumed, within a factor of "
        f"{_UNKNOWN_LENGTH_FACTOR:g}; measure it with --probe, or set --completion-tokens"
    )
    return Guess(max(1.0, most / 2), _UNKNOWN_LENGTH_FACTOR, "assumed", most=most)


def _adapted(config: Config, shape: ModelShape, inputs: PlanInputs, notes: list[str]) -> ModelShape:
    if shape.lora_params or not (inputs.lora or config.use_peft):
        return shape
    notes.append(f"adapters are assumed to have {_LORA_SHARE:.0%} of the model's weights")
    return replace(shape, lora_params=max(1, round(_LORA_SHARE * shape.body_params)))


def _pace(config: Config, inputs: PlanInputs, sources: dict[str, str], notes: list[str]) -> tuple[Pace, str]:
    common: dict[str, Any] = {"num_devices": inputs.num_devices, "price_per_gpu_hour": config.price_per_gpu_hour}
    if inputs.gpu is not None:
        spec = gpu_spec(inputs.gpu)
        name, peak = inputs.gpu, None if spec is None or spec.bf16_tflops is None else spec.bf16_tflops * 1e12
        common["watts"] = None if spec is None else spec.watts
    else:
        facts = device_facts("cpu" if pick_device(config.device).type == "cpu" else "cuda")
        name, peak = facts.name, facts.peak_bf16_flops
        common["watts"] = facts.power_watts
    in_float32 = peak is not None and config.dtype == "float32"
    peak = None if in_float32 else peak
    if inputs.seconds_per_step is not None:
        sources["seconds_per_step"] = "given"
        return Pace(seconds=Guess(inputs.seconds_per_step, _GIVEN_FACTOR, "given"), **common), name
    if peak is None:
        sources["seconds_per_step"] = "unknown"
        if in_float32:
            why = (
                f"the peak FLOP/s of {name} is known in bfloat16 alone, and dtype is 'float32'; leave dtype at 'auto', measure "
            )
            why += "a step there with --probe, or give --seconds-per-step"
        elif inputs.gpu is None:
            why = f"the peak FLOP/s of {name} is not known; measure a step with --probe, give --seconds-per-step, or name the "
            why += "device with --gpu"
        else:
            why = f"{name} has no bfloat16 and computes in float32, whose peak FLOP/s is not known; measure a step there with "
            why += "--probe, or give --seconds-per-step"
        notes.append(f"time and money are unknown, because {why}")
        return Pace(**common), name
    sources["seconds_per_step"] = "assumed"
    given = inputs.mfu is not None
    mfu = Guess(
        inputs.mfu or ASSUMED_MFU, _GIVEN_MFU_FACTOR if given else _MFU_FACTOR, "given" if given else "assumed", most=1.0
    )
    notes.append(
        f"no step was timed: {mfu.value:.0%} of the {peak / 1e12:g} TFLOP/s of {name} are {mfu.source}, give or take "
        f"a factor of {mfu.factor:g}"
    )
    return Pace(mfu=mfu, peak_flops=peak, **common), name


def _unless_launches_decide(
    pace: Pace, work: StepWork, lengths: Guess, share: Guess, *, sources: dict[str, str], notes: list[str]
) -> Pace:
    """The pace, but an unknown one where a share of the peak foretells less time than launching the kernels takes."""
    zero = np.zeros(1)
    flops = np.array([work.flops(lengths.value, share.value)])
    by_flops = float(pace.wall_seconds(work.tokens(np.array([lengths.value])), flops, zero)[0])
    layers = work.shape.attention_layers + work.shape.sliding_layers
    if by_flops >= lengths.value * layers * LAYER_TOKEN_S:
        return pace
    sources["seconds_per_step"] = "unknown"
    notes[-1] = (
        f"time and money are unknown: a step of {flops[0]:.2g} FLOPs is so small that launching kernels takes longer than "
        "computing; measure a step there with --probe, or give --seconds-per-step"
    )
    return replace(pace, mfu=None)


def _probed(config: Config, inputs: PlanInputs) -> PlanFacts:
    """Builds the run, asks the untrained policy, and does two steps at a learning rate of zero, timing the second."""
    with tempfile.TemporaryDirectory(prefix="grpo-plan-") as directory:
        quiet = config.replace(output_dir=Path(directory) / "run", sinks=(), report=False, baseline_probe=inputs.probe)
        parts = build_parts(quiet, {}, resume=False, saves=False)
        try:
            return _measured(quiet, inputs, parts)
        finally:
            parts.close()


@dataclass(frozen=True)
class _Steps:
    """Measurements of two steps of the untrained policy."""

    seconds: float
    """Seconds of the second step."""
    lengths: tuple[int, ...]
    """Tokens of the second step's completions, group after group."""
    mean_length: float
    trained_share: float


def _measured(config: Config, inputs: PlanInputs, parts: Parts) -> PlanFacts:
    timer, failed = PhaseTimer(), list[str]()

    def tell(event: str, message: str) -> None:
        if event == "warn":
            failed.append(message)

    baseline = probe(config, parts, timer, tell=tell)
    timer.lap()
    held_out = evaluate(config, parts, tell=tell)["eval_reward"] if config.eval_steps else math.nan
    evaluation_s = sum(timer.lap().values()) / config.eval_steps if config.eval_steps else 0.0
    steps = _two_steps(config, parts, timer)
    work = _work(config, parts.meter.shape, parts.prompts.mean_length)
    timed_steps = (
        f"measured: {baseline.num_prompts} prompts, answered once each, and two steps at a learning rate of 0, of which the "
        f"second took {steps.seconds:.3g} s" + (f", with {evaluation_s:.2g} s per step for evaluations" if evaluation_s else "")
    )
    lengths = (
        f"completions of the untrained policy have {steps.mean_length:.1f} tokens on average, for which memory is predicted; "
        f"training may make them up to {_DRIFT:g} times longer or shorter"
    )
    notes = [timed_steps, lengths, *dict.fromkeys(failed)]
    start = None if math.isnan(baseline.reward) else baseline.reward
    if start is None:
        notes.append("no answer of the probe has a reward, so the start reward stays unknown")
    sources = {"start_reward": "unknown" if start is None else "measured", "model_size": "read"}
    sources |= {"completion_tokens": "measured", "num_prompts": "read", "seconds_per_step": "measured"}
    if inputs.seconds_per_step is None and inputs.mfu is None:
        pace = Pace(
            seconds=Guess(steps.seconds + evaluation_s, _GIVEN_FACTOR, "measured"),
            at_tokens=float(work.tokens(np.array(steps.mean_length))),
            price_per_gpu_hour=config.price_per_gpu_hour,
            watts=parts.facts.power_watts,
        )
    else:
        pace, _ = _pace(config, inputs, sources, notes)
    error = baseline.error if start is not None and baseline.error > 0 else None
    return PlanFacts(
        facts=RunFacts(size_b=_size(parts.policy.model), start=start, start_error=error, lora=inputs.lora or config.use_peft),
        work=work,
        pace=pace,
        completion_tokens=Guess(steps.mean_length, _DRIFT, "measured", most=config.max_completion_length),
        trained_share=Guess(steps.trained_share, _MEASURED_SHARE_FACTOR, "measured", most=1.0),
        num_prompts=inputs.data_size or len(parts.prompts),
        device=parts.facts.name,
        model=config.model,
        dataset=parts.data.task.name,
        sources=sources,
        notes=notes,
        held_out=None if math.isnan(held_out) else held_out,
        sampled_lengths=steps.lengths,
        reward_range=parts.config.reward_range,
        checkpoint_bytes=parts.checkpoint_bytes,
    )


def _two_steps(config: Config, parts: Parts, timer: PhaseTimer) -> _Steps:
    learner = Learner(config, parts.policy, build_optimizer(parts.policy.model, config), reference=parts.reference)
    collector = Collector(config, parts.sampler, stream=parts.stream, rewards=parts.rewards)
    num_trained = 0
    sampled: list[list[int]] = []
    seconds = 0.0
    for step in (1, 2):
        timer.lap()
        collected = collector.collect(step, timer)
        update = learner.update(collected.groups, learning_rate=0.0, timer=timer)
        parts.engine.sync_weights(parts.policy.model, step)
        seconds = sum(timer.lap().values())
        num_trained += len(update.trained)
        sampled.append([len(one.token_ids) for group in collected.groups for one in group.completions])
    lengths = [length for of_step in sampled for length in of_step]
    return _Steps(
        seconds,
        tuple(sampled[-1]),
        mean_length=max(1.0, sum(lengths) / len(lengths)),
        trained_share=max(num_trained, 1) / len(lengths),
    )


def _size(model: Any) -> float:
    """Parameters in 1e9, as a run tells its forecaster."""
    return count_parameters(model) / 1e9


def _work(config: Config, shape: ModelShape, prompt_tokens: float) -> StepWork:
    return StepWork(
        shape=shape,
        num_prompts=config.prompts_per_step,
        num_generations=config.num_generations,
        prompt_tokens=prompt_tokens,
        num_iterations=config.num_iterations,
        checkpointing=config.recomputes_products,
        scoring_passes=config.scoring_passes,
        idle_passes=idle_passes(config),
        top_k=config.top_k,
    )
