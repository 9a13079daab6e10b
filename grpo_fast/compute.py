"""The compute meter: model FLOPs by phase, tokens, GPU-seconds, energy, money, and the budget they are held against.

FLOPs here are *model* FLOPs: two per multiply-add of every matrix product that the algorithm needs, on real tokens. Not
counted are padding, what a kernel recomputes on its own (flash attention runs its scores twice in backward, a fused
head its logits), element-wise work and embedding look-ups. Attention is counted under the causal mask: a query sees the
keys up to itself, ``S * (S + 1) / 2`` pairs for S tokens, half of the ``S * S`` that a profiler charges for a dense
mask. Gradient checkpointing is counted, since the configuration asks for it.

With N matmul parameters (body and head), L attention layers, d = query heads x head size, p prompt and c completion tokens,
S = p + c, the leading terms are: prefill ``2 N p + 2 L d p^2`` (once a prompt where its cache is shared), decode
``2 N c + 2 L d (S^2 - p^2)``, reference ``2 N S + 2 L d S^2``, forward the same, backward twice the forward; with LoRA
the frozen base gives back only the gradient of its inputs. The functions below keep the lower-order terms, which
matter for short sequences, and charge the head only for the rows that pass it.

Sources: Kaplan et al. 2020 (arXiv:2001.08361), section 2.1; Chowdhery et al. 2022 (arXiv:2204.02311), appendix B.
Not covered: vision towers, and state updates of linear-attention layers (their projections are counted).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeAlias

if TYPE_CHECKING:
    import torch

FlopPhase: TypeAlias = Literal["prefill", "decode", "reference", "forward", "backward"]
TokenKind: TypeAlias = Literal["prompt", "completion", "trained", "dropped"]

FLOP_PHASES: tuple[FlopPhase, ...] = ("prefill", "decode", "reference", "forward", "backward")
TOKEN_KINDS: tuple[TokenKind, ...] = ("prompt", "completion", "trained", "dropped")
CLOCK_PHASES = ("rollout", "reward", "score", "train", "sync", "other")
"""What seconds are charged to."""

JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that decide a model's FLOPs."""

    body_params: int
    """Matmul weights that every token passes, LoRA and head apart; of a mixture of experts the active ones."""
    head_params: int
    """Matmul weights of the language-model head, counted once also where they are tied to the embedding."""
    attention_layers: int
    """L: layers with causal attention over the whole context."""
    attention_dim: int
    """d: query heads times head size (grouped keys and values change the projections, not the scores)."""
    hidden_size: int
    """H."""
    vocab_size: int
    """V."""
    lora_params: int = 0
    """LoRA weights; above 0 the base counts as frozen."""
    sliding_layers: int = 0
    """Layers whose queries see only the last ``sliding_window`` keys."""
    sliding_window: int = 0
    """Keys that a sliding layer's query sees."""

    @classmethod
    def from_model(cls, model: torch.nn.Module) -> Self:
        """Reads the sizes of a Hugging Face causal language model.

        A matmul weight is any parameter of two or more dimensions outside an embedding. Weights stacked by expert, or kept in
        a list named ``experts``, count by the share ``num_experts_per_tok / number of experts``. PEFT's ``lora_`` weights are
        counted apart. Call it before weights are sharded.

        Raises:
            ValueError: the model has no head or its configuration names no size of the attention.
        """
        find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = find_head()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings; pass a causal language model")
        whole: Any = model.config
        config = whole.get_text_config()
        body, lora, head_params = _count_matmul_params(model, head, config)
        full, sliding, window = _attention_layers(config)
        return cls(
            body_params=body,
            head_params=head_params,
            attention_layers=full,
            attention_dim=_attention_dim(config),
            hidden_size=_config_int(config, "hidden_size"),
            vocab_size=_config_int(config, "vocab_size"),
            lora_params=lora,
            sliding_layers=sliding,
            sliding_window=window,
        )


def _config_int(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise ValueError(f"the configuration {type(config).__name__} has none of {', '.join(names)}; build ModelShape by hand")


def _attention_dim(config: Any) -> int:
    heads = _config_int(config, "num_attention_heads")
    value_dim = getattr(config, "v_head_dim", None)
    rope_dim = getattr(config, "qk_rope_head_dim", None)
    if value_dim is not None and rope_dim is not None:  # multi-head latent attention: scores and values differ in size
        return int(heads * (config.qk_nope_head_dim + rope_dim + value_dim) // 2)
    head_dim = getattr(config, "head_dim", None)
    return heads * int(head_dim) if head_dim else _config_int(config, "hidden_size")


def _attention_layers(config: Any) -> tuple[int, int, int]:
    layers = _config_int(config, "num_hidden_layers")
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        windowed = window is not None and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if windowed else "full_attention"] * layers
    sliding = sum(kind in {"sliding_attention", "chunked_attention"} for kind in kinds)
    full = sum(kind in {"full_attention", "attention"} for kind in kinds)
    if not sliding:
        return full, 0, 0
    return full, sliding, _config_int(config, "sliding_window", "attention_chunk_size")


def _count_matmul_params(model: torch.nn.Module, head: torch.nn.Module, config: Any) -> tuple[int, int, int]:
    """Weights of body, LoRA and head."""
    experts = next((n for k in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(config, k, None))), 1)
    share = int(getattr(config, "num_experts_per_tok", None) or experts) / experts
    in_head = {id(module) for module in head.modules()}
    counts = {"body": 0.0, "lora": 0.0, "head": 0.0}
    for path, module in model.named_modules():
        if hasattr(module, "num_embeddings") or "lora_embedding" in path:
            continue
        kind = "lora" if "lora_" in path else "head" if id(module) in in_head else "body"
        expert_share = share if ".experts." in f".{path}." else 1.0
        own = dict(module.named_parameters(recurse=False))
        if "weight" in own and hasattr(module, "in_features"):  # quantised weights are packed: trust the layer's sizes
            counts[kind] += expert_share * int(module.in_features) * int(module.out_features)
            continue
        for weight in own.values():
            stacked = weight.dim() > 2 and weight.shape[0] == experts
            counts[kind] += weight.numel() * (share if stacked else expert_share) if weight.dim() > 1 else 0
    return round(counts["body"]), round(counts["lora"]), round(counts["head"])


def causal_pairs(lengths: Sequence[int], *, window: int = 0) -> int:
    """Query-key pairs that a causal mask lets through, summed over sequences.

    Args:
        lengths: tokens of each sequence.
        window: keys that a query sees at most, itself included; 0 means all.
    """
    if not window:
        return (sum(n * n for n in lengths) + sum(lengths)) // 2
    return sum(m * (m + 1) // 2 + (n - m) * m for n in lengths for m in (min(n, window),))


def _attention_flops(shape: ModelShape, lengths: Sequence[int]) -> int:
    """Scores and their product with the values, ``4 d`` a pair and layer."""
    pairs = shape.attention_layers * causal_pairs(lengths)
    if shape.sliding_layers:
        pairs += shape.sliding_layers * causal_pairs(lengths, window=shape.sliding_window)
    return 4 * shape.attention_dim * pairs


def forward_flops(shape: ModelShape, lengths: Sequence[int], head_rows: int) -> int:
    """The policy's forward pass, LoRA included.

    Args:
        shape: the model.
        lengths: tokens of each sequence, prompt and completion together.
        head_rows: positions that pass the head; the trainer sends only those whose next token is scored.
    """
    linear = 2 * (shape.body_params + shape.lora_params) * sum(lengths) + 2 * shape.head_params * head_rows
    return linear + _attention_flops(shape, lengths)


def backward_flops(shape: ModelShape, lengths: Sequence[int], head_rows: int, *, checkpointing: bool = False) -> int:
    """The backward pass: gradients of inputs and of weights; arguments as in :func:`forward_flops`.

    Of a LoRA model the frozen base, head included, gives back the gradient of its inputs only. Attention has four products in
    backward for two in forward. With ``checkpointing`` the body's forward runs once more (the head lies outside).
    """
    tokens, rows = sum(lengths), head_rows
    inputs = 2 * (shape.body_params + shape.lora_params) * tokens + 2 * shape.head_params * rows
    weights = 2 * shape.lora_params * tokens if shape.lora_params else inputs
    recomputed = forward_flops(shape, lengths, 0) if checkpointing else 0
    return inputs + weights + 2 * _attention_flops(shape, lengths) + recomputed


def reference_flops(shape: ModelShape, lengths: Sequence[int], head_rows: int) -> int:
    """A scoring pass without gradient, by the reference or the old policy: a forward of the base, LoRA left out."""
    return forward_flops(shape, lengths, head_rows) - 2 * shape.lora_params * sum(lengths)


def prefill_flops(shape: ModelShape, prompt_lengths: Sequence[int]) -> int:
    """Reading the prompts; the head sees only each one's last token, from which the first sampled token falls out.

    Args:
        shape: the model.
        prompt_lengths: tokens of each prompt that is read; list a prompt G times where its cache is not shared.
    """
    return forward_flops(shape, prompt_lengths, len(prompt_lengths))


def decode_flops(shape: ModelShape, prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]]) -> int:
    """Sampling after the prefill: c tokens take c - 1 passes of one token over a growing cache.

    Args:
        shape: the model.
        prompt_lengths: tokens of each of P prompts.
        completion_lengths: [P][G], tokens of each prompt's completions, end token included.
    """
    pairs = [(p, c) for p, row in zip(prompt_lengths, completion_lengths, strict=True) for c in row if c > 0]
    before, after = [p for p, _ in pairs], [p + c - 1 for p, c in pairs]
    passes = sum(after) - sum(before)
    return forward_flops(shape, after, passes) - forward_flops(shape, before, 0)


class EnergySource(Protocol):
    """Joules that the devices took since the last reading."""

    name: str
    """How they are known: ``nvml``, ``nvml-power``, ``estimated``."""

    def read(self, device_seconds: float) -> float:
        """Joules since the last call, in which ``device_seconds`` seconds times devices passed."""
        ...


@dataclass(frozen=True, slots=True)
class Usage:
    """What a run has used so far, in the units of :class:`Budget`."""

    steps: int
    tokens: int
    flops: int
    gpu_hours: float
    wall: float
    money: float | None
    energy: float


class ComputeMeter:
    """Adds up what a run costs, over all resumes.

    Call the other ``add_`` methods for what a step did, then ``add_seconds`` once, which ends the step.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        power: EnergySource,
        price_per_gpu_hour: float = 0.0,
        num_devices: int = 1,
        peak_flops: float | None = None,
    ) -> None:
        """Starts at zero.

        Args:
            shape: sizes of the policy.
            power: where joules come from; see ``device.energy_source``.
            price_per_gpu_hour: price of one device hour, in any currency; 0 where money is of no interest.
            num_devices: devices that the run holds, busy or not.
            peak_flops: dense FLOP/s of one device at the run's precision; ``None`` where unknown, and then there is no MFU.

        Raises:
            ValueError: a negative price, no device, or a peak that is not positive.
        """
        if not price_per_gpu_hour >= 0:
            raise ValueError(f"price_per_gpu_hour must be 0 or more, got {price_per_gpu_hour!r}")
        if num_devices < 1:
            raise ValueError(f"num_devices must be at least 1 (a CPU counts as one device), got {num_devices!r}")
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"peak_flops must be positive, or None where it is unknown, got {peak_flops!r}")
        self.shape = shape
        self.price_per_gpu_hour = price_per_gpu_hour
        self.num_devices = num_devices
        self.peak_flops = peak_flops
        self._power = power
        self._tokens: dict[str, int] = dict.fromkeys(TOKEN_KINDS, 0)
        self._flops: dict[str, int] = dict.fromkeys(FLOP_PHASES, 0)
        self._seconds: dict[str, float] = dict.fromkeys(CLOCK_PHASES, 0.0)
        self._gpu_seconds: dict[str, float] = dict.fromkeys(CLOCK_PHASES, 0.0)
        self._joules: dict[str, float] = {}
        self._money = 0.0
        self._flops_at_step = 0
        self._mfu: float | None = None

    def add_rollout(
        self, prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], *, shared_prefill: bool = True
    ) -> None:
        """Charges sampling.

        Args:
            prompt_lengths: tokens of each of P prompts.
            completion_lengths: [P][G], tokens of each prompt's completions.
            shared_prefill: whether a prompt is read once for its G completions, not G times. Its tokens are counted G times
                either way, as TRL's ``num_tokens`` counts them.
        """
        times = [min(1, len(row)) if shared_prefill else len(row) for row in completion_lengths]
        read = [p for p, n in zip(prompt_lengths, times, strict=True) for _ in range(n)]
        self._flops["prefill"] += prefill_flops(self.shape, read)
        self._flops["decode"] += decode_flops(self.shape, prompt_lengths, completion_lengths)
        self._tokens["prompt"] += sum(p * len(row) for p, row in zip(prompt_lengths, completion_lengths, strict=True))
        self._tokens["completion"] += sum(sum(row) for row in completion_lengths)

    def add_reference(self, lengths: Sequence[int], scored_tokens: int, *, shape: ModelShape | None = None) -> None:
        """Charges a scoring pass without gradient, by the reference or the old policy.

        Args:
            lengths: tokens of each sequence.
            scored_tokens: rows that pass the head.
            shape: the scoring model where it is not the policy's.
        """
        self._flops["reference"] += reference_flops(shape or self.shape, lengths, scored_tokens)

    def add_train(
        self, lengths: Sequence[int], scored_tokens: int, *, checkpointing: bool = False, num_iterations: int = 1
    ) -> None:
        """Charges forward and backward.

        Args:
            lengths: tokens of each sequence that is trained on, without padding.
            scored_tokens: completion tokens that carry loss. They count as trained once, however many iterations pass.
            checkpointing: whether activations are recomputed.
            num_iterations: passes over these sequences.
        """
        self._flops["forward"] += num_iterations * forward_flops(self.shape, lengths, scored_tokens)
        backward = backward_flops(self.shape, lengths, scored_tokens, checkpointing=checkpointing)
        self._flops["backward"] += num_iterations * backward
        self._tokens["trained"] += scored_tokens

    def add_dropped(self, completion_tokens: int) -> None:
        """Counts sampled tokens that never reach the loss: groups without reward variance, masked truncated completions."""
        self._tokens["dropped"] += completion_tokens

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Charges wall-clock seconds by phase, all devices, energy and money; ends the step whose MFU ``metrics`` gives.

        Raises:
            ValueError: an unknown phase or negative seconds.
        """
        for phase, value in seconds.items():
            if phase not in self._seconds:
                raise ValueError(f"unknown phase {phase!r}; known are {', '.join(CLOCK_PHASES)}")
            if not value >= 0:
                raise ValueError(f"seconds of {phase} must be 0 or more, got {value!r}")
        for phase, value in seconds.items():
            self._seconds[phase] += value
            self._gpu_seconds[phase] += value * self.num_devices
        device_seconds = sum(seconds.values()) * self.num_devices
        self._joules[self._power.name] = self._joules.get(self._power.name, 0.0) + self._power.read(device_seconds)
        self._money += device_seconds / 3600 * self.price_per_gpu_hour
        flops = sum(self._flops.values())
        if self.peak_flops is not None and device_seconds > 0:
            self._mfu = (flops - self._flops_at_step) / (device_seconds * self.peak_flops)
        self._flops_at_step = flops

    @property
    def energy_source(self) -> str:
        """How the joules are known; several names joined by ``+`` where a run was resumed on another machine."""
        return "+".join(sorted(self._joules)) or self._power.name

    def usage(self, steps: int) -> Usage:
        """What :meth:`Budget.check` is asked about, after ``steps`` finished steps."""
        return Usage(
            steps=steps,
            tokens=self._tokens["prompt"] + self._tokens["completion"],
            flops=sum(self._flops.values()),
            gpu_hours=sum(self._gpu_seconds.values()) / 3600,
            wall=sum(self._seconds.values()) / 3600,
            money=self._money if self.price_per_gpu_hour > 0 or self._money > 0 else None,
            energy=sum(self._joules.values()) / JOULES_PER_KWH,
        )

    def metrics(self) -> dict[str, float]:
        """Cumulative sums under the names of ``metrics.jsonl``, and the last step's ``mfu`` where the peak is known."""
        used = self.usage(0)
        result = {"num_tokens": float(used.tokens), "flops": float(used.flops)}
        result |= {f"flops/{phase}": float(value) for phase, value in self._flops.items()}
        result |= {f"tokens/{kind}": float(value) for kind, value in self._tokens.items()}
        result |= {"gpu_seconds": sum(self._gpu_seconds.values()), "energy_kwh": used.energy, "money": self._money}
        return result | ({} if self._mfu is None else {"mfu": self._mfu})

    def summary(self) -> dict[str, Any]:
        """The ``compute`` part of ``summary.json``: totals, their parts, and where the energy figure comes from."""
        used = self.usage(0)
        return {
            "flops": used.flops,
            "tokens": used.tokens,
            "gpu_hours": used.gpu_hours,
            "wall_hours": used.wall,
            "energy_kwh": used.energy,
            "energy_source": self.energy_source,
            "money": self._money,
            "seconds": dict(self._seconds),
            "gpu_seconds": dict(self._gpu_seconds),
            "flops_by_phase": dict(self._flops),
            "tokens_by_kind": dict(self._tokens),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that continues the sums; plain values that JSON keeps exactly."""
        return {
            "tokens": dict(self._tokens),
            "flops": dict(self._flops),
            "seconds": dict(self._seconds),
            "gpu_seconds": dict(self._gpu_seconds),
            "joules": dict(self._joules),
            "money": self._money,
            "flops_at_step": self._flops_at_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from :meth:`state_dict`.

        Raises:
            ValueError: the state has other keys than this version writes.
        """
        own = self.state_dict()
        for key in own.keys() | state.keys():
            same = key in own and key in state
            parts = same and isinstance(own[key], dict) and key != "joules"
            if not same or (parts and own[key].keys() != state[key].keys()):
                raise ValueError(f"the compute meter's state does not fit at {key!r}; it is of another version of grpo-fast")
        self._tokens, self._flops = dict(state["tokens"]), dict(state["flops"])
        self._seconds, self._gpu_seconds = dict(state["seconds"]), dict(state["gpu_seconds"])
        self._joules, self._money = dict(state["joules"]), float(state["money"])
        self._flops_at_step, self._mfu = int(state["flops_at_step"]), None


BUDGET_FIELDS = {
    "steps": "max_steps",
    "tokens": "max_tokens",
    "flops": "max_flops",
    "gpu_hours": "max_gpu_hours",
    "wall": "max_wall_hours",
    "money": "max_money",
    "energy": "max_energy_kwh",
}
"""Budget's fields and the configuration's names of the same limits."""

_UNITS = {
    "steps": "steps",
    "tokens": "tokens",
    "flops": "FLOPs",
    "gpu_hours": "device hours",
    "wall": "hours of wall-clock time",
    "money": "units of money",
    "energy": "kWh",
}


@dataclass(frozen=True, slots=True)
class BudgetVerdict:
    """Which limit ended a run."""

    limit: str
    """Field of :class:`Budget`."""
    used: float
    """What the run has used of it."""
    allowed: float
    """The limit."""

    @property
    def stopped_by(self) -> str:
        """The configuration's name of the limit, as in ``summary.json``."""
        return BUDGET_FIELDS[self.limit]

    @property
    def reason(self) -> str:
        """One sentence with numbers."""
        return f"{self.stopped_by} is reached: {self.used:,.6g} of {self.allowed:,.6g} {_UNITS[self.limit]} are used."


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may use at most; whatever is reached first ends it. ``None`` sets no limit.

    Raises:
        ValueError: a limit that is not a positive finite number.
    """

    steps: float | None = None
    """Trainer steps."""
    tokens: float | None = None
    """Prompt and completion tokens, each prompt counted for each of its completions."""
    flops: float | None = None
    """Model FLOPs, all phases."""
    gpu_hours: float | None = None
    """Hours times devices; a CPU counts as one device."""
    wall: float | None = None
    """Hours of wall-clock time, over all resumes."""
    money: float | None = None
    """Money, in the currency of ``price_per_gpu_hour``."""
    energy: float | None = None
    """Kilowatt-hours."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Budget({item.name}=...) must be a positive number, or None for no limit; got {value!r}")

    @classmethod
    def from_config(cls, **limits: float | None) -> Self:
        """Builds a budget from the configuration's names: ``max_steps``, ``max_tokens``, ... (see :data:`BUDGET_FIELDS`).

        Raises:
            TypeError: a name that is no limit.
            ValueError: a limit that is not positive.
        """
        names = {config_name: field for field, config_name in BUDGET_FIELDS.items()}
        unknown = limits.keys() - names.keys()
        if unknown:
            raise TypeError(f"unknown limits {', '.join(sorted(unknown))}; known are {', '.join(names)}")
        return cls(**{names[name]: value for name, value in limits.items()})

    def shares(self, usage: Usage) -> dict[str, float]:
        """Used share of each limit that is set; 1 and more means reached.

        Raises:
            ValueError: money is limited and the meter knows no price.
        """
        used = asdict(usage)
        if self.money is not None and usage.money is None:
            raise ValueError(f"Budget(money={self.money:g}) needs a price: set price_per_gpu_hour")
        return {name: used[name] / limit for name, limit in asdict(self).items() if limit is not None}

    def check(self, usage: Usage) -> BudgetVerdict | None:
        """Which limit is reached, the one by the largest share where several are; ``None`` while there is some left of each.

        Ask once before the first step too: a budget in money without a price is refused then.

        Raises:
            ValueError: as :meth:`shares`.
        """
        shares = self.shares(usage)
        limit = max(shares, key=shares.__getitem__, default=None)
        if limit is None or shares[limit] < 1:
            return None
        return BudgetVerdict(limit, used=getattr(usage, limit), allowed=getattr(self, limit))

    def remaining(self, usage: Usage) -> dict[str, float]:
        """Share of each limit that is left, in [0, 1].

        Raises:
            ValueError: as :meth:`shares`.
        """
        return {name: max(0.0, 1.0 - share) for name, share in self.shares(usage).items()}
