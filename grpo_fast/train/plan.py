"""Predicts a run before it begins: its rewards, by the law's prior, and its costs, both with intervals.

The rewards are the prior's, told the model's size, where the untrained policy stands, the method and the length of the budget:
the same numbers that training's own forecaster starts from. Costs are the meter's formulas on lengths and a pace that are
measured, given or assumed (:mod:`grpo_fast.train.plan_facts`). Both are 1,024 equally likely runs, so that "money by the step
at which 80 % of the rise is done" is a quantile of one sample and not a product of medians.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from grpo_fast.compute.memory import MemoryPlan
from grpo_fast.compute.outlook import COSTS, Array, Guess, end_steps, step_costs
from grpo_fast.config import Config, ConfigError
from grpo_fast.device import gpu_spec
from grpo_fast.law import Forecast, OnlinePredictor
from grpo_fast.law.posterior import quantiles
from grpo_fast.law.prospect import Prospect
from grpo_fast.sinks.quantities import COST_WORDS, binary, percent, si, significant
from grpo_fast.train.activations import UncountableError
from grpo_fast.train.parts import load_prior
from grpo_fast.train.plan_facts import PlanFacts, PlanInputs, gather
from grpo_fast.train.plan_memory import USUAL_NODE, Change, MemoryInputs, MemoryPlanner, device_room
from grpo_fast.train.plan_memory import to_dict as memory_to_dict
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.train.schedule import falls_if_shorter, progress_schedule

SHARES = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Shares of the run at which its rewards are foretold."""

_LEVELS = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
_NAMES = ("low", "low50", "median", "high50", "high")
_NUM_PATH = 41
_RISES = (0.8, 0.95)
_LIMITS = {
    "tokens": "max_tokens",
    "flops": "max_flops",
    "device_hours": "max_gpu_hours",
    "wall_hours": "max_wall_hours",
    "money": "max_money",
    "energy_kwh": "max_energy_kwh",
}
_SEED = 20251125  # any fixed one: equal questions get equal answers
_FEW_OF_BUDGET = 0.9

Quantiles = dict[str, float | None]


@dataclass(frozen=True)
class Plan:
    """The prediction of a run.

    Attributes:
        facts: the facts that it is based on.
        epsilon: gain that is not worth training for.
        reward_range: lowest and highest possible mean reward, if known.
        prior: where the prior comes from: "shipped" or a path.
        max_steps: steps that the schedule is laid over.
        end: quantiles of the step at which the budget ends the run.
        ended_by: the limit that does so most often.
        trajectory: at each of :data:`SHARES`, the step and quantiles of the mean reward.
        path: the same at 41 steps from the start to the end, for a picture; columns by name.
        forecast: the law's own forecast before the first reward, for the whole of ``max_steps``.
        ways: probabilities of :data:`~grpo_fast.law.prospect.WAYS`.
        rises: for 0.8 and 0.95 of the rise, quantiles of the step (None beyond the budget), the probability that a run
            which rises gets so far, and quantiles of the costs by then.
        costs: by :data:`~grpo_fast.compute.outlook.COSTS`, quantiles of a step and of the whole run; None where unknown.
        epochs: how often each prompt is seen.
        notes: what was assumed, in sentences.
        memory: peak memory of a device; None if only the model's size is known.
        changes: changes that make the run fit, if it does not.
    """

    facts: PlanFacts
    epsilon: float
    reward_range: tuple[float, float] | None
    prior: str
    max_steps: int
    end: Quantiles
    ended_by: str
    trajectory: list[dict[str, float]]
    path: dict[str, list[float]]
    forecast: Forecast
    ways: dict[str, float]
    rises: dict[float, dict[str, Any]]
    costs: dict[str, dict[str, Quantiles] | None]
    epochs: float
    notes: list[str]
    memory: MemoryPlan | None
    changes: list[Change]

    @property
    def p_plateau(self) -> float:
        """Probability that the run rises, and that its plateau, or its peak, lies within the budget."""
        return self.ways["rises to a plateau"] + self.ways["peaks and falls back"]

    def to_dict(self) -> dict[str, Any]:
        """One JSON object: JSON values only, no NaN."""
        known, forecast = self.facts, self.forecast
        return {
            "model": known.model,
            "dataset": known.dataset,
            "device": known.device,
            "prior": self.prior,
            "known": {
                "model_size_b": known.facts.size_b,
                "start_reward": known.facts.start,
                "start_reward_error": known.facts.start_error,
                "held_out_start": known.held_out,
                "method": "lora" if known.facts.lora else "full",
                "num_prompts": known.num_prompts,
                "prompt_tokens": known.work.prompt_tokens,
                "completion_tokens": known.completion_tokens.to_dict(),
                "trained_share": known.trained_share.to_dict(),
                "seconds_per_step": _guess(known.pace.seconds),
                "mfu": _guess(known.pace.mfu),
                "peak_flops": known.pace.peak_flops,
                "num_devices": known.pace.num_devices,
            },
            "sources": dict(known.sources),
            "unknown": [name for name, source in known.sources.items() if source == "unknown"],
            "epsilon": self.epsilon,
            "reward_range": None if self.reward_range is None else list(self.reward_range),
            "budget": {"max_steps": self.max_steps, "end_step": self.end, "ended_by": self.ended_by, "epochs": self.epochs},
            "trajectory": self.trajectory,
            "path": self.path,
            "plateau": {
                "level": {
                    "low": forecast.plateau_low,
                    "low50": forecast.plateau_interval50[0],
                    "median": forecast.plateau,
                    "high50": forecast.plateau_interval50[1],
                    "high": forecast.plateau_high,
                },
                "probability_within_budget": self.p_plateau,
                **{f"x{share * 100:.0f}": found for share, found in self.rises.items()},
            },
            "outcomes": self.ways,
            "costs": self.costs,
            "checkpoint_bytes": known.checkpoint_bytes,
            "memory": None if self.memory is None else memory_to_dict(self.memory, self.changes),
            "notes": self.notes,
        }

    def to_words(self) -> dict[str, str]:
        """The plan as words beside words, for a table."""
        known, level = self.facts, self.forecast
        told = known.sources
        words = {
            "model": f"{known.model}: {_parameters(known.facts.size_b)}, {'LoRA' if known.facts.lora else 'all weights'}",
            "data": f"{known.dataset}: {known.num_prompts:,} prompts of {known.work.prompt_tokens:.0f} tokens on average",
            "device": f"{known.pace.num_devices} x {known.device}",
            "start reward": self._start_words(),
            "a step": f"{known.work.num_prompts} prompts x {known.work.num_generations} completions of "
            f"{known.completion_tokens.value:.0f} tokens ({told['completion_tokens']})",
            "the budget ends at": self._end_words(),
            "plateau": _interval(level.plateau, level.plateau_low, level.plateau_high)
            + f", reached within the budget with probability {percent(self.p_plateau)}",
        }
        if known.checkpoint_bytes is not None:
            words["a checkpoint"] = f"{binary(known.checkpoint_bytes)} on disk"
        for share, found in self.rises.items():
            words[f"{share * 100:.0f} % of the rise"] = _rise_words(found)
        words["what may come"] = ", ".join(f"{way} {percent(probability)}" for way, probability in self.ways.items())
        return words

    def trajectory_words(self) -> list[tuple[str, ...]]:
        """Rows of a table of rewards: share of the run, step, median, 50 % and 90 % interval."""
        return [
            (
                "start" if row["share"] == 0 else f"{row['share']:.0%}",
                f"{row['step']:,}",
                f"{row['median']:.3f}",
                f"{row['low50']:.3f} to {row['high50']:.3f}",
                f"{row['low']:.3f} to {row['high']:.3f}",
            )
            for row in self.trajectory
        ]

    def cost_words(self) -> list[tuple[str, ...]]:
        """Rows of a table of costs: name, of a step, of the whole run with its 90 % interval, and by 95 % of the rise."""
        rows: list[tuple[str, ...]] = []
        for name, (words, unit) in COST_WORDS.items():
            if name == "device_hours" and self.facts.pace.num_devices == 1:
                continue
            found, late = self.costs[name], self.rises[0.95]["costs"].get(name)
            if found is not None:
                run = found["run"]
                told = [
                    found["step"]["median"],
                    run["median"],
                    run["low"],
                    run["high"],
                    None if late is None else late["median"],
                ]
                step, middle, low, high, by = ("-" if value is None else unit(value) for value in told)
                rows.append((words, step, middle, f"{low} to {high}", by))
            elif name == "wall_hours":
                rows.append((words, *["unknown"] * 4))
        return rows

    def _start_words(self) -> str:
        facts, source = self.facts.facts, self.facts.sources["start_reward"]
        if facts.start is None:
            return "unknown (taken from the prior)"
        error = "" if facts.start_error is None else f" +- {facts.start_error:.2g}"
        held_out = "" if self.facts.held_out is None else f"; held-out {self.facts.held_out:.3g}"
        return f"{facts.start:.3g}{error} ({source}){held_out}"

    def _end_words(self) -> str:
        low, middle, high = (self.end[name] for name in ("low", "median", "high"))
        spread = "" if low == high else f" (90 % interval {low:,.0f} to {high:,.0f})"
        by = "" if self.ended_by == "max_steps" else f" of {self.max_steps:,}, by {self.ended_by}"
        return f"step {middle:,.0f}{spread}{by}; each prompt is seen {significant(self.epochs, 2)} times"


def make_plan(config: Config, inputs: PlanInputs | None = None) -> Plan:
    """Predicts a run.

    Args:
        config: its whole configuration; the budget is its ``max_*`` fields.
        inputs: what is known or asked in addition.

    Raises:
        ConfigError: contradictions, unreadable model or data, or a limit of something that cannot be predicted.
        RewardError: a probe's reward function failed.
    """
    if config.max_money is not None and config.price_per_gpu_hour == 0:
        raise ConfigError(f"a budget of money ({config.max_money:g}) needs price_per_gpu_hour above 0")
    clock = np.concatenate([[0.0], progress_schedule(config)])
    prior = load_prior(config)
    inputs = inputs or PlanInputs()
    config = _on_named(config, inputs.gpu)
    known = gather(config, inputs)
    config = config.model_copy(update={"reward_range": known.reward_range})
    try:
        memory, changes = _memory(config, inputs, known)
    except UncountableError as error:
        memory, changes = None, []
        known.notes.append(f"the memory that the run needs is unknown: {error}")
    predictor = OnlinePredictor(
        config.max_steps, epsilon=config.forecast_epsilon, reward_range=config.reward_range, facts=known.facts, prior=prior
    )
    prospect = Prospect.of(predictor)
    normals = _normals(prospect.weight.size)
    costs = step_costs(
        known.work,
        known.pace,
        completion_tokens=known.completion_tokens,
        trained_share=known.trained_share,
        normals=normals,
    )
    ends, ended_by = _ends(config, costs)
    at_end = np.interp(ends, np.arange(clock.size), clock)
    end = _quantiles(ends, prospect.weight, whole=True)
    assert end["median"] is not None
    return Plan(
        facts=known,
        epsilon=config.forecast_epsilon,
        reward_range=config.reward_range,
        prior="shipped" if config.forecast_prior is None else str(config.forecast_prior),
        max_steps=config.max_steps,
        end=end,
        ended_by=ended_by,
        trajectory=_trajectory(predictor, clock, int(end["median"])),
        path=_columns(_rewards(predictor, clock, sorted({round(x) for x in np.linspace(0, end["median"], _NUM_PATH)}))),
        forecast=predictor.forecast(),
        ways=prospect.ways(at_end),
        rises={share: _rise(prospect, share, clock, ends=ends, costs=costs) for share in _RISES},
        costs={name: _whole(costs[name], ends, prospect.weight) for name in COSTS},
        epochs=end["median"] * config.prompts_per_step / known.num_prompts,
        notes=[*known.notes, *_notes(config, known, float(end["median"]))],
        memory=memory,
        changes=changes,
    )


def _on_named(config: Config, gpu: str | None) -> Config:
    """The configuration on a GPU that is named, which need not be here, nor compute as this machine's device does."""
    if gpu is None:
        return config
    config, spec = config.replace(device="auto"), gpu_spec(gpu)
    if spec is None or config.dtype != "auto":
        return config
    return config.replace(dtype="float32" if spec.bf16_tflops is None else "bfloat16")


def _memory(config: Config, inputs: PlanInputs, known: PlanFacts) -> tuple[MemoryPlan | None, list[Change]]:
    if inputs.model_size is not None:
        return None, []
    if inputs.gpu is not None and gpu_spec(inputs.gpu) is None:
        known.notes.append(f"whether the run fits is unknown, because the memory of {inputs.gpu} is not known")
        return None, []
    room, kind = device_room(config, inputs.gpu)
    source = PolicySource(config, planned_for=inputs.planned_for)
    place = MemoryInputs(
        room,
        kind,
        prompt_tokens=known.work.prompt_tokens,
        num_devices=inputs.num_devices,
        completion_tokens=known.sampled_lengths,
        begins_from_adapters=source.begins_from_adapters,
    )
    planner = MemoryPlanner(source.model_config, source.config, place)
    plan = planner.plan()
    return plan, [] if plan.fits else planner.changes()


def _normals(size: int) -> Array:
    """(3, size) independent standard normals, each row an even ladder in its own order: medians are met exactly."""
    inverse = NormalDist().inv_cdf
    ladder = np.array([inverse((place + 0.5) / size) for place in range(size)])
    rng = np.random.default_rng(_SEED)
    return np.stack([rng.permutation(ladder) for _ in range(3)])


def _ends(config: Config, costs: Mapping[str, Array]) -> tuple[Array, str]:
    limits = {name: getattr(config, field) for name, field in _LIMITS.items()}
    try:
        ends, name = end_steps(costs, limits, max_steps=config.max_steps)
    except ValueError as error:
        field = _LIMITS[str(error)]
        raise ConfigError(
            f"{field}={getattr(config, field):g} cannot be turned into steps, because the time per step is unknown; measure it "
            "with --probe, give --seconds-per-step, or name the device with --gpu"
        ) from error
    return ends, "max_steps" if name == "steps" else _LIMITS[name]


def _trajectory(predictor: OnlinePredictor, clock: Array, end: int) -> list[dict[str, float]]:
    rows = _rewards(predictor, clock, [math.ceil(share * end) for share in SHARES])
    return [{"share": share, **row} for share, row in zip(SHARES, rows, strict=True)]


def _rewards(predictor: OnlinePredictor, clock: Array, steps: list[int]) -> list[dict[str, float]]:
    """Quantiles of the mean reward at steps."""
    levels, weight = predictor.levels(clock[steps])
    found = quantiles(levels, weight, _LEVELS)
    return [
        {"step": step, **dict(zip(_NAMES, column, strict=True))} for step, column in zip(steps, found.T.tolist(), strict=True)
    ]


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in ("step", *_NAMES)}


def _rise(prospect: Prospect, share: float, clock: Array, *, ends: Array, costs: Mapping[str, Array]) -> dict[str, Any]:
    """Step at which a share of the rise is done, over the runs that rise, and costs by then, over those that get so far."""
    when, rising = prospect.time_to(share), prospect.rises
    steps = np.where(when <= 1.0, np.maximum(1.0, np.ceil(np.interp(when, clock, np.arange(clock.size)))), np.inf)
    steps = np.where(steps <= ends, steps, np.inf)
    there = rising & np.isfinite(steps)
    weight = prospect.weight
    of_rising = float(weight[there].sum() / weight[rising].sum()) if weight[rising].sum() > 0 else 0.0
    spent = {
        name: _quantiles((values * steps)[there], weight[there])
        for name, values in costs.items()
        if there.any() and np.isfinite(values).all()
    }
    return {
        "step": _quantiles(steps[rising], weight[rising], whole=True) if rising.any() else dict.fromkeys(_NAMES),
        "probability": of_rising,
        "costs": spent,
    }


def _whole(values: Array, ends: Array, weight: Array) -> dict[str, Quantiles] | None:
    if not np.isfinite(values).all():
        return None
    return {"step": _quantiles(values, weight), "run": _quantiles(values * ends, weight)}


def _quantiles(values: Array, weight: Array, *, whole: bool = False) -> Quantiles:
    """Quantiles by name; None where they are infinite. Steps are ``whole``: the least with so much of the sample behind it."""
    if whole:
        order = np.argsort(values, kind="stable")
        mass = np.cumsum(weight[order]) / weight.sum()
        found = values[order][np.minimum(np.searchsorted(mass, _LEVELS - 1e-12), values.size - 1)]
    else:
        found = quantiles(values[:, None], weight / weight.sum(), _LEVELS)[:, 0]
    return {name: float(value) if math.isfinite(value) else None for name, value in zip(_NAMES, found, strict=True)}


def _notes(config: Config, known: PlanFacts, end: float) -> list[str]:
    notes = []
    if known.facts.start is None:
        notes.append(
            "the start reward is unknown, which makes the prediction vague; measure it with --probe 64, or give --start-reward"
        )
    if config.reward_range is None:
        notes.append("reward_range is not given: rewards are assumed to be of the order of 1")
    if end < _FEW_OF_BUDGET * config.max_steps and falls_if_shorter(config, max(1, int(end))):
        notes.append(
            f"the run ends at step {end:.0f}, long before the learning-rate schedule over max_steps={config.max_steps} does; "
            f"set max_steps={end:.0f} to complete the schedule"
        )
    if config.fsdp == "hybrid_shard" and known.pace.num_devices > USUAL_NODE:
        notes.append(
            f"nodes are taken to have {USUAL_NODE} devices, over which fsdp='hybrid_shard' spreads a copy of the weights"
        )
    if config.forecast != "off":
        notes.append(f"a forecast plateau may end the run earlier (forecast={config.forecast})")
    return notes


def _guess(guess: Guess | None) -> dict[str, float | str] | None:
    return None if guess is None else guess.to_dict()


def _parameters(size_b: float | None) -> str:
    return "unknown size" if size_b is None else f"{si(size_b * 1e9)} parameters"


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.3g} (90 % interval {low:.3g} to {high:.3g})"


def _rise_words(found: Mapping[str, Any]) -> str:
    step = found["step"]
    if step["low"] is None:
        return "beyond the budget"
    low, middle, high = (
        "beyond the budget" if step[name] is None else f"{step[name]:,.0f}" for name in ("low", "median", "high")
    )
    words = (
        f"step {middle} (90 % interval {low} to {high})"
        if step["median"] is not None
        else f"beyond the budget (from step {low})"
    )
    return f"{words}, if it rises; {percent(found['probability'])} of rising runs get there"
