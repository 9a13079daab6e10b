"""Peak memory of a run by part, before anything is loaded, and changes that make it fit.

Weights, gradients and moments are counted from the model's outline, what the passes of the largest micro-batches hold by
:func:`~grpo_fast.train.activations.pass_bytes`, keys and values from the lengths that may occur. Phases of a step follow one
another: the fullest is the peak. Not counted is what an allocator loses between blocks: a few percent, more where lengths vary
much; what Liger's kernels and ``torch_compile`` save; nor what servers hold, but for copies that the transport ``sparse`` has
them keep on this machine.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from grpo_fast.compute.memory import MemoryPlan
from grpo_fast.config import Config, ConfigError
from grpo_fast.device import device_facts, gpu_spec
from grpo_fast.rollout.transformers_engine import MAX_BATCH_TOKENS
from grpo_fast.rollout.vllm_memory import cpu_cache_bytes
from grpo_fast.sinks.quantities import binary
from grpo_fast.train.activations import DryPass, HeadBytes, HeldBytes, PassBytes, UncountableError, pass_bytes
from grpo_fast.train.plan_pass import StepLengths, largest_passes
from grpo_fast.train.plan_sizes import (
    DeviceMemory,
    ModelSizes,
    head_bytes,
    moments,
    sparse_copies,
    update_bytes,
    vllm_pass_bytes,
    weight_bytes,
)
from grpo_fast.train.policy_source import computes_in_bfloat16, outline_of, pick_device
from grpo_fast.train.reward_model import reward_model_bytes
from grpo_fast.train.streaming import streams_weights

_CONTEXT_BYTES = {"cuda": 700 * 2**20, "cpu": 450 * 2**20}
"""Memory of the process before the model: CUDA's context and libraries' workspaces; Python with its modules."""
_VLLM_PASS = "vLLM's activations"
USUAL_NODE = 8
"""Devices of a node, where nothing says how many it has."""
_NUM_CHANGES = 3
_FEWEST_TOKENS = 1024
_LEAST_SHARE = 0.2


@dataclass(frozen=True)
class Change:
    """A change that makes a run smaller.

    Attributes:
        settings: fields of the configuration and their new values.
        price: what it costs, in words.
        peak_bytes: what is needed with it.
    """

    settings: Mapping[str, Any]
    price: str
    peak_bytes: int

    def to_words(self) -> str:
        """One line."""
        told = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{told}: {binary(self.peak_bytes)} ({self.price})"


@dataclass(frozen=True)
class MemoryInputs:
    """Inputs that determine memory in addition to the configuration.

    Attributes:
        room_bytes: memory of the device.
        kind: "cuda" or "cpu".
        prompt_tokens: length of a prompt; the mean, or better the longest.
        num_devices: processes that share a step's sequences, and what ``fsdp`` divides.
        completion_tokens: lengths of completions as they were sampled, group after group; without any, all are as long as
            may be.
        devices_per_node: what ``fsdp="hybrid_shard"`` divides by.
        begins_from_adapters: whether ``model`` names saved adapters.
    """

    room_bytes: int
    kind: str
    prompt_tokens: float
    num_devices: int = 1
    completion_tokens: tuple[int, ...] = ()
    devices_per_node: int = USUAL_NODE
    begins_from_adapters: bool = False


class MemoryPlanner:
    """Plans the memory of runs of one model.

    Args:
        model_config: sizes and kind of the model.
        config: the run's configuration.
        inputs: see there.
    """

    def __init__(self, model_config: PreTrainedConfig, config: Config, inputs: MemoryInputs) -> None:
        self._model_config = model_config
        self._config = config
        self._inputs = inputs
        self._outlines: dict[tuple[Any, ...], PreTrainedModel] = {}
        self._passes: dict[tuple[Any, ...], PassBytes] = {}
        self._reward_models = reward_model_bytes(config, inputs.kind)

    def plan(self, config: Config | None = None) -> MemoryPlan:
        """The memory of the run, or of a changed one.

        Raises:
            ConfigError: the adapters do not fit the model.
            UncountableError: it has layers whose memory cannot be counted, such as experts that tokens choose.
        """
        config = config or self._config
        dtype, outline = self._dtype(config), self._outline(config)
        sizes = ModelSizes.of(outline, config, dtype=dtype)
        lasting, host = self._lasting(config, sizes)
        sampling = self._sampling(config, sizes, dtype)
        host |= sparse_copies(config, sizes.base(config) * dtype.itemsize)
        if self._inputs.kind == "cpu":  # the host is the device
            lasting, host = lasting | host, {}
        if config.vllm_enable_sleep_mode:
            if config.rollout == "vllm" and config.use_peft:
                host["vLLM's weights"] = sizes.total * dtype.itemsize
        elif config.rollout == "vllm" or config.max_staleness:  # the engine stays awake, or samples while training goes on
            # What a pass of vLLM lets go of is this process's again, where it is in it.
            apart = config.vllm_own_process or config.max_staleness or self._inputs.num_devices > 1
            passing = set() if apart else {_VLLM_PASS}
            lasting |= {name: size for name, size in sampling.items() if name not in passing}
            sampling = {name: size for name, size in sampling.items() if name in passing}
        training, waiting = self._training(outline, config, sizes)
        if waiting:
            host["activations"] = waiting
        if self._num_parts(config) > 1 and not streams_weights(config):
            lasting["whole weights to sample from"] = sizes.frozen_copy_bytes(config)
        return MemoryPlan(lasting, {"sampling": sampling, **training}, self._inputs.room_bytes, host)

    def _training(self, outline: PreTrainedModel, config: Config, sizes: ModelSizes) -> tuple[dict[str, dict[str, int]], int]:
        """Bytes by part of each phase of an update, and what waits in the host's memory."""
        passes = self._largest(outline, config, sizes)
        gradients, parts = self._gradients(config, sizes), self._num_parts(config)
        widened = weight_bytes(config) // weight_bytes(self._gathered(config))  # shards keep gradients in their own type

        def of_pass(work: DryPass, held: HeldBytes, *, backward: bool) -> dict[str, int]:
            return {
                "gradients": gradients if work.accumulates or not gradients else widened * held.gradients // parts,
                "activations": held.activations,
                "head and loss": held.head,
                **self._on_the_way(config, sizes, backward=backward),
            }

        losses = (of_pass(work, found.losses, backward=False) for work, found in passes)
        gradient_passes = (of_pass(work, found.gradients, backward=True) for work, found in passes)
        phases = {
            "computing losses": max(losses, key=lambda held: sum(held.values())),
            "computing gradients": max(gradient_passes, key=lambda held: sum(held.values())),
        }
        copies = 0 if self._offloads(config) else update_bytes(config, sizes) // parts
        phases["updating weights"] = {"gradients": gradients, "numbers of one update": copies}
        return phases, max(found.waiting for _, found in passes)

    def _largest(self, outline: PreTrainedModel, config: Config, sizes: ModelSizes) -> list[tuple[DryPass, PassBytes]]:
        """The largest micro-batches and what they take; padded where the policy would find that the model takes none packed."""
        passes = largest_passes(outline, config, self._lengths(config), dtype=self._dtype(config), kind=self._inputs.kind)
        try:
            return [(work, self._pass(outline, config, work, self._head(config, sizes, work))) for work in passes]
        except UncountableError:
            if passes[0].layout == "padded" or config.padding_free:
                raise
            return self._largest(outline, config.replace(padding_free=False, share_prompts=None), sizes)

    def _on_the_way(self, config: Config, sizes: ModelSizes, *, backward: bool) -> dict[str, int]:
        """Weights that are there while a layer needs them."""
        parts = {}
        if self._num_parts(config) > 1:
            parts["gathered weights"] = sizes.gathered_bytes(config, backward=backward)
        if config.load_in_4bit:
            parts["weights out of four bits"] = sizes.widest * self._dtype(config).itemsize
        return parts

    def _pass(self, outline: PreTrainedModel, config: Config, work: DryPass, head: HeadBytes) -> PassBytes:
        """Counted once a kind of pass."""
        config = self._gathered(config)
        checkpointing = config.gradient_checkpointing and config.gradient_checkpointing_mode
        cut = (config.tokens_per_microbatch, work.layout, work.shares_prompts, work.accumulates)
        key = (checkpointing, *_adapters(config), config.weights_dtype, *cut, head)
        if key not in self._passes:
            self._passes[key] = pass_bytes(outline, config, work, head)
        return self._passes[key]

    def _gathered(self, config: Config) -> Config:
        """As a pass finds it: shards are gathered in the type of computation, so that nothing casts them and keeps the copy."""
        is_short = self._num_parts(config) > 1 and self._dtype(config) == torch.bfloat16 and not config.use_peft
        return config.replace(weights_dtype="bfloat16") if is_short else config

    def _outline(self, config: Config) -> PreTrainedModel:
        """Made once a kind of adapters."""
        key = _adapters(config)
        if key not in self._outlines:
            self._outlines[key] = outline_of(copy.deepcopy(self._model_config), config)  # a model keeps the very object
        return self._outlines[key]

    def _head(self, config: Config, sizes: ModelSizes, work: DryPass) -> HeadBytes:
        return head_bytes(
            config,
            sizes,
            DeviceMemory(self._inputs.kind, self._inputs.room_bytes),
            num_rows=sum(len(sequence.completion_ids) for sequence in work.sequences),
            parts=self._num_parts(config) if config.fsdp_parallel_head else 1,
        )

    def least_bytes(self) -> int:
        """Memory that does not depend on lengths: weights, moments and gradients."""
        sizes = ModelSizes.of(self._outline(self._config), self._config, dtype=self._dtype(self._config))
        return sum(self._lasting(self._config, sizes)[0].values()) + self._gradients(self._config, sizes)

    def _dtype(self, config: Config) -> torch.dtype:
        return torch.bfloat16 if computes_in_bfloat16(config, self._inputs.kind) else torch.float32

    def _num_parts(self, config: Config) -> int:
        """Devices that share weights, gradients and moments."""
        if config.fsdp == "no_shard":
            return 1
        if config.fsdp == "hybrid_shard":  # every node has a copy
            return min(self._inputs.num_devices, self._inputs.devices_per_node)
        return self._inputs.num_devices

    def _lasting(self, config: Config, sizes: ModelSizes) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes by part that stay on the device, and in the host's memory."""
        parts = self._num_parts(config)
        of_optimiser, host = moments(config, sizes, parts=parts)
        of_adapters = self._inputs.begins_from_adapters and parts > 1
        reference = sizes.reference_bytes(config, of_adapters=of_adapters, in_parts=parts > 1)
        lasting = {"process and libraries": _CONTEXT_BYTES[self._inputs.kind], "reward models": self._reward_models}
        shards = {
            "weights that are trained": sizes.trained * weight_bytes(config) // parts,
            "frozen weights": sizes.frozen_bytes // parts,
            "reference policy": reference // parts,
            "optimiser": of_optimiser,
        }
        if not self._offloads(config):
            return lasting | shards, host
        shards["gradients"] = shards["weights that are trained"]
        return lasting, host | {name: size for name, size in shards.items() if size}

    def _offloads(self, config: Config) -> bool:
        """Whether shards lie in the host's memory, with their gradients and moments."""
        return config.fsdp_offload_params and self._num_parts(config) > 1

    def _gradients(self, config: Config, sizes: ModelSizes) -> int:
        return 0 if self._offloads(config) else sizes.trained * weight_bytes(config) // self._num_parts(config)

    def changes(self) -> list[Change]:
        """The cheapest changes that make it fit: up to three that do so alone, or else one of several settings together.

        Empty where nothing known is enough.
        """
        tried = (self._tried(*candidate) for candidate in _candidates(self._config, self._inputs))
        found: list[Change] = []
        alone: list[Change] = []
        for change in tried:
            if change is not None:
                found.append(change)
                alone += [change] * self._is_enough(change)
            if len(alone) == _NUM_CHANGES:
                break
        return alone or self._together([change.settings for change in found])

    def _together(self, candidates: list[Mapping[str, Any]]) -> list[Change]:
        """Takes one after the other until they are enough, then leaves out what is not needed, the dearest first."""
        done: dict[str, Any] = {}
        for settings in candidates:
            change = self._tried({**done, **settings}, "together")
            if change is None:
                continue
            done = dict(change.settings)
            if self._is_enough(change):
                break
        else:
            return []
        for name in reversed(list(done)):
            fewer = self._tried({other: value for other, value in done.items() if other != name}, "together")
            if fewer is not None and self._is_enough(fewer):
                change, done = fewer, dict(fewer.settings)
        return [change]

    def _is_enough(self, change: Change) -> bool:
        return change.peak_bytes <= self._inputs.room_bytes

    def _tried(self, settings: Mapping[str, Any], price: str) -> Change | None:
        settings = {name: value for name, value in settings.items() if value != getattr(self._config, name)}
        try:
            peak = self.plan(self._config.replace(**settings)).peak_bytes
        except ConfigError:  # it does not go with the rest of the configuration
            return None
        return Change(settings, price, peak)

    def _longest(self, config: Config) -> int:
        return int(self._inputs.prompt_tokens) + config.max_completion_length

    def _lengths(self, config: Config) -> StepLengths:
        completions = self._inputs.completion_tokens or (config.max_completion_length,)
        return StepLengths(max(1, round(self._inputs.prompt_tokens)), completions, self._inputs.num_devices)

    def _sampling(self, config: Config, sizes: ModelSizes, dtype: torch.dtype) -> dict[str, int]:
        if config.rollout == "vllm-http":
            return {}
        if config.rollout == "vllm":
            if self._inputs.kind == "cuda" and config.vllm_kv_cache_gib is None:
                return {"vLLM": round(config.vllm_gpu_memory_utilization * self._inputs.room_bytes)}
            cache = cpu_cache_bytes(sizes.cached_values * dtype.itemsize, self._longest(config))
            if config.vllm_kv_cache_gib is not None:
                cache = round(config.vllm_kv_cache_gib * 2**30)
            device = DeviceMemory(self._inputs.kind, self._inputs.room_bytes)
            activations = vllm_pass_bytes(config, sizes, device, longest=self._longest(config), itemsize=dtype.itemsize)
            return {
                "vLLM's weights": sizes.total * dtype.itemsize,
                "vLLM's keys and values": cache,
                _VLLM_PASS: activations,
            }
        width = self._longest(config)
        rows = min(config.prompts_per_step * config.num_generations, max(1, MAX_BATCH_TOKENS // width))
        copied = sizes.trained * weight_bytes(config) if config.max_staleness else 0
        return {
            "copy of trained weights": copied,
            "keys and values": rows * width * sizes.cached_values * dtype.itemsize,
            "probabilities": 3 * rows * sizes.vocab * 4,
        }


def _adapters(config: Config) -> tuple[Any, ...]:
    return config.use_peft, config.lora_r, config.lora_target_modules


def _candidates(config: Config, inputs: MemoryInputs) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes and their prices, the cheapest first."""
    kind = inputs.kind
    if (tokens := config.microbatch_tokens(kind)) > _FEWEST_TOKENS:
        half = max(_FEWEST_TOKENS, tokens // 2)
        yield {"tokens_per_microbatch": half}, "the same results, in more and smaller passes"
        yield {"tokens_per_microbatch": _FEWEST_TOKENS}, "the same results, in many small passes"
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}, "the same results, a third more compute in training"
    elif kind == "cuda" and config.gradient_checkpointing_mode == "full":
        yield {"gradient_checkpointing_mode": "offload"}, "the same results, layers' inputs kept in host memory"
    if inputs.num_devices > 1 and config.fsdp == "no_shard":
        yield (
            {"fsdp": "full_shard", "optim": "adamw_torch_fused"},
            "the same results, weights gathered from all devices layer by layer",
        )
    elif inputs.num_devices > inputs.devices_per_node and config.fsdp == "hybrid_shard":
        yield {"fsdp": "full_shard"}, "the same results, weights gathered over nodes too"
    if config.rollout == "vllm" and kind == "cuda":
        yield {"vllm_enable_sleep_mode": True}, "vLLM sleeps while the policy trains, and wakes for each step"
    if config.rollout == "vllm" and config.vllm_gpu_memory_utilization > _LEAST_SHARE:
        yield {"vllm_gpu_memory_utilization": _LEAST_SHARE}, "fewer completions at once"
    if not config.use_peft:
        if config.optim == "adamw_torch_fused" and not config.offload_optimizer:
            if config.weights_dtype == "float32" and config.fsdp == "no_shard":
                yield {"optim": "adamw_8bit"}, "moments in 8 bits"
            if config.weights_dtype == "float32":
                yield (
                    {"weights_dtype": "bfloat16", "optim": "adamw_torch_fused"},
                    "weights in bfloat16, with stochastic rounding",
                )
            yield {"offload_optimizer": True, "optim": "adamw_torch_fused"}, "updates are made on the host, which takes longer"
        yield (
            {"use_peft": True, "weights_dtype": "float32", "offload_optimizer": False},
            "adapters are trained, not all weights",
        )
    if not config.load_in_4bit:
        yield (
            {"use_peft": True, "load_in_4bit": True, "weights_dtype": "float32", "offload_optimizer": False},
            "adapters over a base in four bits",
        )


def device_room(config: Config, gpu: str | None) -> tuple[int, str]:
    """Bytes and kind of the device that a run is planned for: a named GPU, or this machine's."""
    spec = None if gpu is None else gpu_spec(gpu)
    if spec is not None:
        return round(spec.gib * 2**30), "cuda"
    facts = device_facts("cpu" if pick_device(config.device).type == "cpu" else "cuda")
    return facts.memory_bytes, facts.kind


def check_room(model_config: PreTrainedConfig, config: Config, **place: Any) -> None:
    """Ends a run before anything is loaded where weights, gradients and moments alone cannot fit.

    Args:
        model_config: of the model.
        config: of the run.
        **place: what else is known of :class:`MemoryInputs`, such as ``num_devices``.

    Raises:
        ConfigError: they cannot; the message says by part how much is missing, and what would fit.
    """
    room, kind = device_room(config, None)
    planner = MemoryPlanner(model_config, config, MemoryInputs(room, kind, prompt_tokens=1, **place))
    if planner.least_bytes() > room:
        try:
            told = refusal(planner.plan(), planner.changes())
        except UncountableError as error:
            least = binary(planner.least_bytes())
            told = f"weights, gradients and moments need {least}, and the device has {binary(room)}; {error}"
        raise ConfigError(told)


def refusal(plan: MemoryPlan, changes: list[Change]) -> str:
    """Why a run cannot fit, and what would, in sentences."""
    told = (
        f"the run needs {binary(plan.peak_bytes)} while {plan.peak_phase}, and the device has {binary(plan.room_bytes)}: "
        + ", ".join(f"{name} {binary(size)}" for name, size in sorted(plan.parts.items(), key=lambda part: -part[1]))
    )
    if not changes:
        return (
            f"{told}. No known change of settings is enough: choose a smaller model, a larger device, or more devices with fsdp"
        )
    return f"{told}. It would fit with " + "; or ".join(change.to_words() for change in changes)


def table(plan: MemoryPlan) -> list[tuple[str, ...]]:
    """Rows of part and size, the largest first, then the sum and what there is."""
    rows = [(name, binary(size)) for name, size in sorted(plan.parts.items(), key=lambda part: -part[1])]
    rows += [(f"{name}, on the host", binary(size)) for name, size in plan.host.items()]
    return [*rows, (f"at once, while {plan.peak_phase}", binary(plan.peak_bytes)), ("the device has", binary(plan.room_bytes))]


def to_dict(plan: MemoryPlan, changes: list[Change]) -> dict[str, Any]:
    """JSON values."""
    return {
        "peak_bytes": plan.peak_bytes,
        "peak_phase": plan.peak_phase,
        "room_bytes": plan.room_bytes,
        "fits": plan.fits,
        "parts": plan.parts,
        "host": dict(plan.host),
        "changes": [asdict(change) for change in changes],
    }
