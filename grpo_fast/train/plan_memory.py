"""Will it fit? Peak memory of a run by part, before anything is loaded, and what to change where it does not.

Weights, gradients and moments are counted from the model's outline, activations by
:func:`~grpo_fast.train.activations.activation_bytes`, keys and values from the lengths that may occur. Not counted is what an
allocator loses between blocks: a few percent, more where lengths vary much; nor what servers hold, but for copies that the
transport ``sparse`` has them keep on this machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from grpo_fast.compute.memory import MemoryPlan, cached_values
from grpo_fast.config import Config, ConfigError
from grpo_fast.device import device_facts, gpu_spec
from grpo_fast.ops.kept_logprob import kept_chunk_bytes
from grpo_fast.ops.lm_head import chunk_bytes_of
from grpo_fast.rollout.transformers_engine import MAX_BATCH_TOKENS
from grpo_fast.rollout.vllm_engine import cpu_cache_bytes
from grpo_fast.sinks.quantities import binary
from grpo_fast.train.activations import ActivationBytes, activation_bytes
from grpo_fast.train.policy_source import computes_in_bfloat16, outline_of, pick_device
from grpo_fast.train.streaming import streams_weights

_CONTEXT_BYTES = {"cuda": 700 * 2**20, "cpu": 450 * 2**20}
"""What the process holds before the model: CUDA's context and libraries' workspaces; Python with its modules."""
_NF4_BYTES, _NESTED_NF4_BYTES = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256)
_NUM_CHANGES = 3
_COUNTED_TOKENS = (128, 256)
_FEWEST_TOKENS = 1024
_LEAST_SHARE = 0.2


@dataclass(frozen=True)
class Change:
    """Something that makes a run smaller.

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
    """What decides memory beside the configuration.

    Attributes:
        room_bytes: memory of the device.
        kind: "cuda" or "cpu".
        prompt_tokens: length of a prompt; the mean, or better the longest.
        num_devices: processes that share what ``fsdp`` divides.
    """

    room_bytes: int
    kind: str
    prompt_tokens: float
    num_devices: int = 1


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
        self._counts: dict[tuple[Any, ...], list[ActivationBytes]] = {}

    def plan(self, config: Config | None = None) -> MemoryPlan:
        """The memory of the run, or of a changed one.

        Raises:
            ConfigError: the adapters do not fit the model.
        """
        config = config or self._config
        dtype, outline = self._dtype(config), outline_of(self._model_config, config)
        sizes = _Sizes.of(outline, config, dtype=dtype)
        lasting, host = self._lasting(config, sizes)
        sampling = self._sampling(config, sizes, dtype)
        on_host = lasting if self._inputs.kind == "cpu" else host
        on_host |= _sparse_copies(config, sizes.base(config) * dtype.itemsize)
        if config.vllm_enable_sleep_mode:
            if config.rollout == "vllm" and config.use_peft:
                host["vLLM's weights"] = sizes.total * dtype.itemsize
        elif config.rollout == "vllm" or config.max_staleness:  # the engine stays awake, or samples while training goes on
            lasting |= sampling
            sampling = {}
        on_device, waiting = self._activation_bytes(outline, config, dtype)
        if waiting:
            host["activations"] = waiting
        head_parts = self._num_parts(config) if config.fsdp_parallel_head else 1
        training = {
            "gradients": self._gradients(config, sizes),
            "activations": on_device,
            "head and loss": sizes.head_bytes(
                head_parts * self._tokens(config), self._chunk_bytes(config, sizes), parts=head_parts
            ),
        }
        if self._num_parts(config) > 1:
            whole = sizes.frozen_bytes + _weight_bytes(config) * sizes.trained
            if not streams_weights(config):
                lasting["whole weights to sample from"] = whole
            training["gathered weights"] = 2 * whole // sizes.layers + _weight_bytes(config) * sizes.head * (head_parts == 1)
        return MemoryPlan(lasting, {"sampling": sampling, "training": training}, self._inputs.room_bytes, host)

    def least_bytes(self) -> int:
        """What the run needs whatever its lengths are: weights, moments and gradients."""
        sizes = _Sizes.of(outline_of(self._model_config, self._config), self._config, dtype=self._dtype(self._config))
        return sum(self._lasting(self._config, sizes)[0].values()) + self._gradients(self._config, sizes)

    def _dtype(self, config: Config) -> torch.dtype:
        return torch.bfloat16 if computes_in_bfloat16(config, self._inputs.kind) else torch.float32

    def _num_parts(self, config: Config) -> int:
        """Devices that share weights, gradients and moments."""
        return 1 if config.fsdp == "no_shard" else self._inputs.num_devices

    def _lasting(self, config: Config, sizes: _Sizes) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes by part that stay on the device, and in the host's memory."""
        parts = self._num_parts(config)
        moments, host = _moments(config, sizes.trained // parts)
        return {
            "process and libraries": _CONTEXT_BYTES[self._inputs.kind],
            "weights that are trained": sizes.trained * _weight_bytes(config) // parts,
            "frozen weights": sizes.frozen_bytes // parts,
            "reference policy": sizes.reference_bytes(config) // parts,
            "optimiser": moments,
        }, host

    def _gradients(self, config: Config, sizes: _Sizes) -> int:
        return sizes.trained * _weight_bytes(config) // self._num_parts(config)

    def changes(self) -> list[Change]:
        """The cheapest changes that make it fit: up to three that do so alone, or else one of several settings together.

        Empty where nothing known is enough.
        """
        tried = (self._tried(*candidate) for candidate in _candidates(self._config, self._inputs.kind))
        found = [change for change in tried if change is not None]
        alone = [change for change in found if self._is_enough(change)]
        return alone[:_NUM_CHANGES] or self._together([change.settings for change in found])

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

    def _chunk_bytes(self, config: Config, sizes: _Sizes) -> int:
        if not config.truncates_support:
            return chunk_bytes_of(self._inputs.kind, self._inputs.room_bytes)
        return kept_chunk_bytes(
            sizes.vocab,
            sizes.hidden,
            num_kept=config.top_k or sizes.vocab,
            kind=self._inputs.kind,
            copied=self._dtype(config).itemsize != 4,
            trained=sizes.head_trained,
        )

    def _longest(self, config: Config) -> int:
        return int(self._inputs.prompt_tokens) + config.max_completion_length

    def _tokens(self, config: Config) -> int:
        """Tokens of the largest micro-batch."""
        whole = config.prompts_per_step * config.num_generations * self._longest(config)
        return max(self._longest(config), min(config.tokens_per_microbatch, whole))

    def _activation_bytes(self, outline: PreTrainedModel, config: Config, dtype: torch.dtype) -> tuple[int, int]:
        """On the device and in the host's memory: lines in the tokens, through two points counted once a kind of pass."""
        checkpointing = config.gradient_checkpointing and config.gradient_checkpointing_mode
        kind = (checkpointing, config.use_peft, config.lora_r, config.lora_target_modules, config.weights_dtype)
        if kind not in self._counts:
            self._counts[kind] = [
                activation_bytes(outline, config, num_tokens=number, dtype=dtype) for number in _COUNTED_TOKENS
            ]
        near, far = self._counts[kind]
        share = (self._tokens(config) - _COUNTED_TOKENS[0]) / (_COUNTED_TOKENS[1] - _COUNTED_TOKENS[0])
        return (
            round(near.peak + share * (far.peak - near.peak)),
            round(near.waiting + share * (far.waiting - near.waiting)),
        )

    def _sampling(self, config: Config, sizes: _Sizes, dtype: torch.dtype) -> dict[str, int]:
        if config.rollout == "vllm-http":
            return {}
        if config.rollout == "vllm":
            if self._inputs.kind == "cuda" and config.vllm_kv_cache_gib is None:
                return {"vLLM": round(config.vllm_gpu_memory_utilization * self._inputs.room_bytes)}
            cache = cpu_cache_bytes(sizes.cached_values * dtype.itemsize, self._longest(config))
            if config.vllm_kv_cache_gib is not None:
                cache = round(config.vllm_kv_cache_gib * 2**30)
            return {"vLLM's weights": sizes.total * dtype.itemsize, "vLLM's keys and values": cache}
        width = self._longest(config)
        rows = min(config.prompts_per_step * config.num_generations, max(1, MAX_BATCH_TOKENS // width))
        copied = sizes.trained * _weight_bytes(config) if config.max_staleness else 0
        return {
            "copy of trained weights": copied,
            "keys and values": rows * width * sizes.cached_values * dtype.itemsize,
            "probabilities": 3 * rows * sizes.vocab * 4,
        }


@dataclass(frozen=True)
class _Sizes:
    """Numbers of weights, and bytes of those that no optimiser sees."""

    trained: int
    total: int
    frozen_bytes: int
    head: int
    head_trained: bool
    layers: int
    hidden: int
    vocab: int
    cached_values: int

    @classmethod
    def of(cls, outline: Any, config: Config, *, dtype: torch.dtype) -> _Sizes:
        layer = outline.get_output_embeddings()
        if layer is None:
            raise ConfigError(f"{type(outline).__name__} has no output embeddings; a causal language model is needed")
        head = layer.weight
        trained = total = 0
        frozen = 0.0
        linear = {id(module.weight) for module in outline.modules() if isinstance(module, torch.nn.Linear)} - {id(head)}
        nf4 = _NESTED_NF4_BYTES if config.use_bnb_nested_quant else _NF4_BYTES
        for weight in outline.parameters():
            total += weight.numel()
            if weight.requires_grad:
                trained += weight.numel()
            else:
                frozen += weight.numel() * (nf4 if config.load_in_4bit and id(weight) in linear else dtype.itemsize)
        model = outline.config.get_text_config()
        layers = int(model.num_hidden_layers)
        return cls(
            trained=trained,
            total=total,
            frozen_bytes=round(frozen),
            head=head.numel(),
            head_trained=head.requires_grad,
            layers=layers,
            hidden=int(model.hidden_size),
            vocab=head.shape[0],
            cached_values=cached_values(model),
        )

    def base(self, config: Config) -> int:
        """Weights that go to vLLM as they are, not as adapters."""
        return self.total - self.trained if config.use_peft else self.total

    def reference_bytes(self, config: Config) -> int:
        """A reference policy of its own: none without KL, nor where adapters are switched off for it."""
        return self.total * _weight_bytes(config) if config.beta > 0 and not config.use_peft else 0

    def head_bytes(self, tokens: int, chunk_bytes: int, *, parts: int) -> int:
        """A chunk of logits, hidden states with their gradient, and the head's gradient in float32 where it has one."""
        return chunk_bytes + 2 * tokens * self.hidden * 4 + self.head * 4 * self.head_trained // parts


def _weight_bytes(config: Config) -> int:
    return 2 if config.weights_dtype == "bfloat16" else 4


def _moments(config: Config, trained: int) -> tuple[int, dict[str, int]]:
    """Bytes of the optimiser on the device, and in the host's memory."""
    if config.offload_optimizer:
        return 0, {"optimiser and float32 weights": 16 * trained}
    if config.optim.startswith("paged_"):
        return 0, {"paged optimiser": (2 if "8bit" in config.optim else 8) * trained}
    return (2 if config.optim == "adamw_8bit" else 8) * trained, {}


def _sparse_copies(config: Config, sent_bytes: int) -> dict[str, int]:
    """Bytes of host memory in which both ends of the transport ``sparse`` keep the weights as they went over last."""
    if config.rollout == "transformers" or config.vllm_transport != "sparse":
        return {}
    receivers = len(config.vllm_server_urls) if config.rollout == "vllm-http" else 1
    return {"weights as last sent": sent_bytes, "weights as vLLM last got them": receivers * sent_bytes}


def _candidates(config: Config, kind: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes and their prices, the cheapest first."""
    if config.tokens_per_microbatch > _FEWEST_TOKENS:
        half = max(_FEWEST_TOKENS, config.tokens_per_microbatch // 2)
        yield {"tokens_per_microbatch": half}, "the same results, in more and smaller passes"
        yield {"tokens_per_microbatch": _FEWEST_TOKENS}, "the same results, in many small passes"
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}, "the same results, a third more compute in training"
    elif kind == "cuda" and config.gradient_checkpointing_mode == "full":
        yield {"gradient_checkpointing_mode": "offload"}, "the same results, layers' inputs wait in the host's memory"
    if config.rollout == "vllm" and kind == "cuda":
        yield {"vllm_enable_sleep_mode": True}, "vLLM sleeps while the policy trains, and wakes for each step"
    if config.rollout == "vllm" and config.vllm_gpu_memory_utilization > _LEAST_SHARE:
        yield {"vllm_gpu_memory_utilization": _LEAST_SHARE}, "fewer completions at once"
    if not config.use_peft:
        if config.optim == "adamw_torch_fused" and not config.offload_optimizer:
            if config.weights_dtype == "float32" and config.fsdp == "no_shard":
                yield {"optim": "adamw_8bit"}, "moments in 8 bits"
            if config.weights_dtype == "float32":
                yield {"weights_dtype": "bfloat16", "optim": "adamw_torch_fused"}, "weights in bfloat16, rounded at random"
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


def check_room(model_config: PreTrainedConfig, config: Config, *, num_devices: int) -> None:
    """Ends a run before anything is loaded where weights, gradients and moments alone cannot fit.

    Args:
        model_config: of the model.
        config: of the run.
        num_devices: processes of the run.

    Raises:
        ConfigError: they cannot; the message says by part how much is missing, and what would fit.
    """
    room, kind = device_room(config, None)
    planner = MemoryPlanner(model_config, config, MemoryInputs(room, kind, prompt_tokens=1, num_devices=num_devices))
    if planner.least_bytes() > room:
        raise ConfigError(refusal(planner.plan(), planner.changes()))


def refusal(plan: MemoryPlan, changes: list[Change]) -> str:
    """Why a run cannot fit, and what would, in sentences."""
    told = (
        f"the run needs {binary(plan.peak_bytes)} while {plan.peak_phase}, and the device has {binary(plan.room_bytes)}: "
        + ", ".join(f"{name} {binary(size)}" for name, size in sorted(plan.parts.items(), key=lambda part: -part[1]))
    )
    if not changes:
        return f"{told}. No change known here is enough: take a smaller model, more devices with fsdp, or a larger one"
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
