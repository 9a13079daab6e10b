"""The compute meter: tokens, model FLOPs by phase, device-seconds, energy and money, summed over all resumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

from grpo_fast.compute.budget import Usage
from grpo_fast.compute.flops import ModelShape, backward_flops, decode_flops, forward_flops, prefill_flops, reference_flops

FlopPhase: TypeAlias = Literal["prefill", "decode", "reference", "forward", "backward"]
TokenKind: TypeAlias = Literal["prompt", "completion", "trained", "dropped"]

FLOP_PHASES: tuple[FlopPhase, ...] = ("prefill", "decode", "reference", "forward", "backward")
TOKEN_KINDS: tuple[TokenKind, ...] = ("prompt", "completion", "trained", "dropped")
CLOCK_PHASES = ("rollout", "reward", "score", "train", "sync", "other")
"""Phases to which seconds are charged."""

JOULES_PER_KWH = 3.6e6


class EnergySource(Protocol):
    """Joules that the devices took since the last reading."""

    name: str
    """Where the figure comes from: ``nvml``, ``nvml-power``, ``estimated``."""

    def read(self, device_seconds: float) -> float:
        """Joules since the last call, in which ``device_seconds`` seconds times devices passed."""
        ...


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

    def add_reference(
        self,
        lengths: Sequence[int],
        scored_tokens: int,
        *,
        shape: ModelShape | None = None,
        adapters: bool = False,
        shared_prompts: Sequence[int] = (),
        num_kept: int | None = None,
    ) -> None:
        """Charges a scoring pass without gradient, by the reference or the policy.

        Args:
            lengths: tokens of each sequence.
            scored_tokens: rows that pass the head.
            shape: the scoring model where it is not the policy's.
            adapters: whether LoRA takes part, as it does where the policy itself scores.
            shared_prompts: tokens of each prompt in ``lengths`` that another sequence with the same one computed.
            num_kept: tokens that sampling kept for the scored ones, all together, where it cut the support.
        """
        flops, scorer = forward_flops if adapters else reference_flops, shape or self.shape
        self._flops["reference"] += flops(scorer, lengths, scored_tokens, num_kept) - flops(scorer, shared_prompts, 0)

    def add_train(
        self,
        lengths: Sequence[int],
        scored_tokens: int,
        *,
        checkpointing: bool = False,
        num_iterations: int = 1,
        shared_prompts: Sequence[int] = (),
        num_kept: int | None = None,
    ) -> None:
        """Charges forward and backward.

        Args:
            lengths: tokens of each sequence that is trained on, without padding.
            scored_tokens: completion tokens that carry loss. They count as trained once, however many iterations pass.
            checkpointing: whether activations are recomputed.
            num_iterations: passes over these sequences.
            shared_prompts: as in :meth:`add_reference`.
            num_kept: as there.
        """
        forward = forward_flops(self.shape, lengths, scored_tokens, num_kept) - forward_flops(self.shape, shared_prompts, 0)
        backward = backward_flops(self.shape, lengths, scored_tokens, num_kept, checkpointing=checkpointing)
        saved = backward_flops(self.shape, shared_prompts, 0, checkpointing=checkpointing)
        self._flops["forward"] += num_iterations * forward
        self._flops["backward"] += num_iterations * (backward - saved)
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
        """Where the energy figure comes from; several names joined by ``+`` if a run was resumed on another machine."""
        return "+".join(sorted(self._joules)) or self._power.name

    def usage(self, steps: int) -> Usage:
        """The usage that :meth:`Budget.check` checks, after ``steps`` finished steps."""
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
                raise ValueError(
                    f"the compute meter's state does not fit at {key!r}; it was written by another version of grpo-fast"
                )
        self._tokens, self._flops = dict(state["tokens"]), dict(state["flops"])
        self._seconds, self._gpu_seconds = dict(state["seconds"]), dict(state["gpu_seconds"])
        self._joules, self._money = dict(state["joules"]), float(state["money"])
        self._flops_at_step, self._mfu = int(state["flops_at_step"]), None
