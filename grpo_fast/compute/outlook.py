"""Predicted costs of a run before it begins: a step's tokens, FLOPs and seconds from sizes, each with its spread.

A step is charged as :class:`~grpo_fast.compute.meter.ComputeMeter` will charge it, at mean lengths: attention over lengths that
scatter costs a little more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grpo_fast.compute.flops import ModelShape
from grpo_fast.compute.meter import JOULES_PER_KWH, ComputeMeter

Array = npt.NDArray[np.float64]

_Z90 = 1.6448536269514722
_GRID = 9
COSTS = ("tokens", "flops", "device_hours", "wall_hours", "money", "energy_kwh")
"""Kinds of cost of a step, by name."""


@dataclass(frozen=True, slots=True)
class Guess:
    """A positive number that is known more or less.

    Attributes:
        value: its median.
        factor: it lies between ``value / factor`` and ``value * factor`` nine times in ten.
        source: "measured", "given" or "assumed".
        most: what it cannot exceed.

    Raises:
        ValueError: a value that is not positive, or a factor below 1.
    """

    value: float
    factor: float
    source: str
    most: float = math.inf

    def __post_init__(self) -> None:
        if not (self.value > 0 and math.isfinite(self.value)) or not self.factor >= 1:
            raise ValueError(
                f"a guess of {self.value} within a factor of {self.factor} is invalid; give a positive value and a factor >= 1"
            )

    def draws(self, normals: Array) -> Array:
        """(N,) values for (N,) standard normals."""
        return np.minimum(self.value * self.factor ** (normals / _Z90), self.most)

    def to_dict(self) -> dict[str, float | str]:
        """JSON values."""
        return {"value": self.value, "factor": self.factor, "source": self.source}


@dataclass(frozen=True, slots=True)
class StepWork:
    """The sizes of one step.

    Attributes:
        shape: of the policy.
        num_prompts: P.
        num_generations: G.
        prompt_tokens: mean length of a prompt.
        num_iterations: optimiser updates a step.
        checkpointing: whether activations are recomputed.
        scoring_passes: passes without gradient over what is trained on, by a reference policy or against the sampler; of each,
            whether adapters take part.
        idle_passes: passes without gradient over what is not trained on.
        top_k: tokens that are kept of each position at most; 0 where nothing bounds them.
    """

    shape: ModelShape
    num_prompts: int
    num_generations: int
    prompt_tokens: float
    num_iterations: int = 1
    checkpointing: bool = False
    scoring_passes: tuple[bool, ...] = ()
    idle_passes: int = 0
    top_k: int = 0

    def tokens(self, completion_tokens: Array) -> Array:
        """Tokens of a step, as a budget counts them, for mean completion lengths of any shape."""
        return np.asarray(self.num_prompts * self.num_generations * (self.prompt_tokens + completion_tokens))

    def flops(self, completion_tokens: float, trained_share: float) -> float:
        """Model FLOPs of a step.

        Args:
            completion_tokens: mean length of a completion.
            trained_share: share of completions that carry a gradient.
        """
        prompt, completion = max(1, round(self.prompt_tokens)), max(1, round(completion_tokens))
        num_sampled = self.num_prompts * self.num_generations
        num_trained = round(trained_share * num_sampled)
        meter = ComputeMeter(self.shape, power=_NoPower())
        meter.add_rollout([prompt] * self.num_prompts, [[completion] * self.num_generations] * self.num_prompts)
        kept_of_each = min(self.top_k, self.shape.vocab_size) if self.top_k else None
        lengths, scored = [prompt + completion] * num_trained, completion * num_trained
        kept = kept_of_each and scored * kept_of_each
        iterations = self.num_iterations
        meter.add_train(lengths, scored, checkpointing=self.checkpointing, num_iterations=iterations, num_kept=kept)
        for adapters in self.scoring_passes:
            meter.add_reference(lengths, scored, adapters=adapters, num_kept=kept)
        num_idle = self.idle_passes * (num_sampled - num_trained)
        lengths, scored = [prompt + completion] * num_idle, completion * num_idle
        meter.add_reference(lengths, scored, adapters=True, num_kept=kept_of_each and scored * kept_of_each)
        return float(meter.usage(0).flops)


class _NoPower:
    name = "none"

    def read(self, device_seconds: float) -> float:
        del device_seconds
        return 0.0


@dataclass(frozen=True, slots=True)
class Pace:
    """Speed of a step: measured, or derived from the device's peak.

    Attributes:
        seconds: wall-clock seconds of a step; None if ``mfu`` is given.
        at_tokens: tokens of the step that was timed: steps of more take longer in proportion; None where ``seconds`` is a mean
            over all steps.
        mfu: model FLOPs a second as a share of the peak; None if ``seconds`` is given.
        peak_flops: dense FLOP/s of one device.
        num_devices: devices that the run holds.
        price_per_gpu_hour: price of a device hour; 0 where money is of no interest.
        watts: power of one device.
    """

    seconds: Guess | None = None
    at_tokens: float | None = None
    mfu: Guess | None = None
    peak_flops: float | None = None
    num_devices: int = 1
    price_per_gpu_hour: float = 0.0
    watts: float | None = None

    def wall_seconds(self, tokens: Array, flops: Array, normals: Array) -> Array:
        """(N,) seconds of a step; NaN if unknown."""
        if self.seconds is not None:
            return self.seconds.draws(normals) * (1.0 if self.at_tokens is None else tokens / self.at_tokens)
        if self.mfu is not None and self.peak_flops is not None:
            return flops / (self.mfu.draws(-normals) * self.peak_flops * self.num_devices)
        return np.full(tokens.size, np.nan)


def step_costs(
    work: StepWork, pace: Pace, *, completion_tokens: Guess, trained_share: Guess, normals: Array
) -> dict[str, Array]:
    """Costs of a step, as N equally likely guesses: (N,) for each of :data:`COSTS`, NaN where it is unknown.

    Args:
        work: the step's sizes.
        pace: how fast it goes.
        completion_tokens: mean length of a completion, over the run.
        trained_share: share of completions that carry a gradient.
        normals: (3, N) standard normals for lengths, shares and pace.
    """
    lengths, shares = completion_tokens.draws(normals[0]), trained_share.draws(normals[1])
    tokens = work.tokens(lengths)
    grid = np.linspace(lengths.min(), lengths.max(), _GRID)
    # FLOPs are linear in the share, and close to a parabola in the length.
    fixed, full = (np.interp(lengths, grid, [work.flops(length, share) for length in grid.tolist()]) for share in (0.0, 1.0))
    flops = fixed + shares * (full - fixed)
    wall = pace.wall_seconds(tokens, flops, normals[2]) / 3600
    hours = wall * pace.num_devices
    unknown = np.full(tokens.size, np.nan)
    money = hours * pace.price_per_gpu_hour if pace.price_per_gpu_hour > 0 else unknown
    energy = unknown if pace.watts is None else hours * 3600 * pace.watts / JOULES_PER_KWH
    return dict(zip(COSTS, (tokens, flops, hours, wall, money, energy), strict=True))


def end_steps(costs: Mapping[str, Array], limits: Mapping[str, float | None], *, max_steps: int) -> tuple[Array, str]:
    """The step at which the first limit ends each of N runs, (N,), and the limit that does so most often.

    Args:
        costs: of one step, from :func:`step_costs`.
        limits: of the whole run by the names of :data:`COSTS`; None for no limit.
        max_steps: steps at most.

    Raises:
        ValueError: a limit of a cost that is unknown.
    """
    ends, names = [np.full(costs["tokens"].size, float(max_steps))], ["steps"]
    for name, limit in limits.items():
        if limit is None:
            continue
        if np.isnan(costs[name]).any():
            raise ValueError(name)
        ends.append(np.maximum(1.0, np.ceil(limit / costs[name])))
        names.append(name)
    stacked = np.stack(ends)
    first = stacked.argmin(axis=0)
    return stacked.min(axis=0), names[int(np.bincount(first, minlength=len(names)).argmax())]
