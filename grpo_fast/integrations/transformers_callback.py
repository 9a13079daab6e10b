"""The plateau stop for any transformers trainer that logs a reward, TRL's GRPOTrainer above all."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from grpo_fast.law import Forecast, OnlinePredictor, Prior, RunFacts, Spending, StopDecision, StoppingRule

logger = logging.getLogger(__name__)

_LEAST_PROGRESS = 1e-9
_TOKENS = ("num_tokens", "num_input_tokens_seen")
_ZERO_STD = "frac_reward_zero_std"
_SHARDED = "FullyShardedDataParallel"  # whose parameters are one device's share


class PlateauStopCallback(TrainerCallback, ExportableState):
    """Forecasts the end of a run from its logged rewards, and ends it when going on is not worth it.

    ``GRPOTrainer(..., callbacks=[PlateauStopCallback()])`` is all that is needed. Each log that holds the reward is one
    observation; a log of ``logging_steps`` steps counts as their mean. Evaluation logs are passed over. The forecast is written
    into the log as ``forecast/median``, ``forecast/low``, ``forecast/high`` (the mean reward at the end of the budget and its
    90 % interval), ``forecast/plateau`` and ``forecast/p_gain_below_eps``: so it reaches ``state.log_history``,
    ``trainer_state.json`` and every callback that comes after this one. Trackers come first in a trainer; to have the forecast
    there as well, put this one before them: ``trainer.callback_handler.callbacks.insert(0, callback)`` in place of
    ``callbacks=``.

    Progress is counted in summed learning rate where the schedule is one of transformers' functions of the step, as all but
    ``reduce_lr_on_plateau`` are, and in steps elsewhere. After a resume the rewards are taken from the checkpoint and the
    forecasts are what they would have been without a break, also where the callback is new or ``max_steps`` has changed.

    The forecast starts from the size of the trainer's model and from whether adapters are trained; ``facts`` adds what only you
    know. If tokens are logged, as by TRL, the history gives costs in tokens. Consecutive logs with a ``frac_reward_zero_std``
    of 1 count towards a stop, as nothing was learnt (see :class:`~grpo_fast.law.StoppingRule`): not while the reward is the
    least of all, and not with ``beta`` or ``entropy_coef``.

    When it stops the run, a checkpoint is saved unless ``save_strategy`` is "no".

    Args:
        horizon: steps of the whole budget; the trainer's ``max_steps`` without one.
        reward_key: name of the logged reward.
        epsilon: remaining gain that is not worth having, in reward units.
        confidence: probability of so small a gain that stops the run; the default of :class:`~grpo_fast.law.StoppingRule`
            without one.
        patience: for how long forecasts must say so: below 1 a share of the horizon, from 1 on a number of logs; likewise.
        min_steps: steps before which nothing stops a run; likewise.
        mode: "stop", or "warn" for one log line and no stop.
        reward_range: least and greatest mean reward that is possible, where that is known; it sharpens the forecast.
        num_prompts: prompts a step; from the trainer's batch sizes without one.
        num_generations: completions per prompt; the trainer's ``num_generations`` without one.
        prior: what is believed of runs, or its ``to_dict()``; the one that ships without one.
        facts: what is known of the run, or a mapping of its fields: the start above all, the mean reward before step 1.

    Attributes:
        history: forecasts, one row a log in the layout of ``forecasts.jsonl`` without the band.
        forecast: the newest forecast; None before the first reward.
        decision: what the rule said last.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(  # noqa: PLR0913 (the law's own)
        self,
        horizon: int | None = None,
        *,
        reward_key: str = "reward",
        epsilon: float = 0.01,
        confidence: float | None = None,
        patience: float | None = None,
        min_steps: int | None = None,
        mode: Literal["stop", "warn"] = "stop",
        reward_range: tuple[float, float] | None = None,
        num_prompts: int | None = None,
        num_generations: int | None = None,
        prior: Prior | Mapping[str, Any] | None = None,
        facts: RunFacts | Mapping[str, Any] | None = None,
    ) -> None:
        if mode not in {"stop", "warn"}:
            raise ValueError(f'mode={mode!r} must be "stop" or "warn"')
        self._args: dict[str, Any] = {
            "horizon": horizon,
            "reward_key": reward_key,
            "epsilon": epsilon,
            "confidence": confidence,
            "patience": patience,
            "min_steps": min_steps,
            "mode": mode,
            "reward_range": None if reward_range is None else tuple(reward_range),
            "num_prompts": num_prompts,
            "num_generations": num_generations,
            "prior": prior.to_dict() if isinstance(prior, Prior) else prior,
            "facts": asdict(facts) if isinstance(facts, RunFacts) else facts,
        }
        self._prior = None if prior is None else Prior.from_dict(self._args["prior"])  # as a checkpoint will give it back
        self._facts = RunFacts(**(self._args["facts"] or {}))
        self.rewards: list[tuple[int, float]] = []
        self.tokens: list[float | None] = []
        self.zero_std: list[float | None] = []
        self._also_learns = False
        self._progress = [1.0]
        self._counts = (1, 1)
        self._begin(1 if horizon is None else horizon)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint: the arguments, and for each reward seen the tokens spent and its groups' variance."""
        seen = {"rewards": self.rewards, "tokens": self.tokens, "zero_std": self.zero_std}
        return {"args": self._args, "attributes": seen}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Fixes horizon and schedule, and takes up what a resumed run has logged."""
        if isinstance(
            state.stateful_callbacks, dict
        ):  # a resumed state lacks this callback where it is new, and saving needs it
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        key = self._args["reward_key"]
        seen = self._seen()
        seen = seen or [
            (int(row["step"]), _number(row[key]), _tokens(row), row.get(_ZERO_STD)) for row in state.log_history if key in row
        ]
        horizon = self._args["horizon"] or state.max_steps
        self._progress = _schedule(kwargs.get("lr_scheduler"), horizon)
        self._counts = _counts(args, self._args["num_prompts"], self._args["num_generations"])
        self._facts = _completed(RunFacts(**(self._args["facts"] or {})), kwargs.get("model"))
        self._also_learns = any(getattr(args, name, None) for name in ("beta", "entropy_coef", "use_adaptive_entropy"))
        self._begin(horizon)
        for step, reward, tokens, zero_std in seen:
            if step <= min(state.global_step, horizon):
                self._observe(step, reward, tokens, zero_std)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Takes the reward of a log, writes the forecast into it, and stops the run where the rule says so."""
        key, step = self._args["reward_key"], state.global_step
        if logs is None or key not in logs or step <= self._last_step:
            return
        if step > self.predictor.horizon:
            self._say_once(
                "horizon", f"step {step} is beyond horizon={self.predictor.horizon}; no forecasts from here on", state
            )
            return
        tokens = _tokens(logs) or state.num_input_tokens_seen or None
        self._observe(step, _number(logs[key]), tokens, logs.get(_ZERO_STD), state)
        assert self.forecast is not None
        assert self.decision is not None
        values = {
            f"forecast/{name}": self.history[-1][name] for name in ("median", "low", "high", "plateau", "p_gain_below_eps")
        }
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == step:
            state.log_history[-1].update(values)
        if not self.decision.stop:
            return
        if self._args["mode"] == "warn":
            self._say_once(
                "stop", f"the plateau is reached, but training continues (mode='warn'): {self.decision.reason}", state
            )
            return
        self._say_once("stop", f"training stops at the plateau: {self.decision.reason}", state)
        control.should_training_stop = True
        control.should_save = control.should_save or args.save_strategy != "no"

    def _begin(self, horizon: int) -> None:
        made = self._args
        self.predictor = OnlinePredictor(
            horizon, epsilon=made["epsilon"], reward_range=made["reward_range"], facts=self._facts, prior=self._prior
        )
        asked = {name: made[name] for name in ("confidence", "patience", "min_steps") if made[name] is not None}
        self.rule = StoppingRule(made["epsilon"], **asked)
        self.rewards, self.tokens, self.zero_std = [], [], []
        self._still = 0
        self.history: list[dict[str, Any]] = []
        self.forecast: Forecast | None = None
        self.decision: StopDecision | None = None
        self._said: set[str] = set()
        self._last_step = 0

    def _seen(self) -> list[tuple[int, float, float | None, float | None]]:
        """Every observation; checkpoints of older versions know less of each."""
        beside = itertools.zip_longest(self.rewards, self.tokens, self.zero_std)
        return [(step, reward, tokens, zero_std) for (step, reward), tokens, zero_std in beside]

    def _observe(
        self, step: int, reward: float, tokens: float | None, zero_std: float | None, state: TrainerState | None = None
    ) -> None:
        if math.isinf(reward):
            self._say_once("infinite", f"the reward of step {step} is infinite and counts as missing", state)
            reward = math.nan
        bounds = self.predictor.reward_range
        if bounds is not None and not (math.isnan(reward) or bounds[0] <= reward <= bounds[1]):
            said = f"the reward {reward:g} of step {step} is outside reward_range={bounds}; the range is ignored from here on"
            self._say_once("range", said, state)
            self._forget_range()
        num_prompts, num_generations = self._counts
        self.forecast = self.predictor.observe(
            step,
            self._progress[step - 1],
            reward,
            num_prompts=num_prompts * (step - self._last_step),
            num_generations=num_generations,
            spent=None if tokens is None else Spending(tokens=float(tokens)),
        )
        still = zero_std == 1.0 and not self._also_learns and reward > self._least(reward)
        self._still = self._still + step - self._last_step if still else 0
        self.decision = self.rule.update(self.forecast, still=self._still)
        self.rewards.append((step, reward))
        self.tokens.append(tokens)
        self.zero_std.append(zero_std)
        self._last_step = step
        row = self.forecast.to_dict()
        del row["band"]
        self.history.append(row)

    def _least(self, reward: float) -> float:
        """The reward of completions that earn nothing, as far as that is known: then a first right answer may still come."""
        bounds = self.predictor.reward_range
        seen = [reward, *(reward for _, reward in self.rewards if not math.isnan(reward))]
        return min(seen) if bounds is None else bounds[0]

    def _forget_range(self) -> None:
        """Goes on as if no range had been given."""
        said, seen = self._said, self._seen()
        self._args = self._args | {"reward_range": None}
        self._begin(self.predictor.horizon)
        self._said = said
        for observation in seen:
            self._observe(*observation)

    def _say_once(self, what: str, message: str, state: TrainerState | None) -> None:
        if what not in self._said and (state is None or state.is_world_process_zero):
            logger.warning(message)
        self._said.add(what)


def _schedule(scheduler: Any, horizon: int) -> list[float]:
    """Share of the summed learning rate that is spent after step 1, 2, ..., ``horizon``, each above 0."""
    scheduler = getattr(scheduler, "scheduler", scheduler)
    factors = getattr(scheduler, "lr_lambdas", None)
    rates = [float(factors[0](step)) for step in range(horizon)] if factors else [1.0] * horizon
    spent = list(itertools.accumulate(rates))
    if not spent[-1] > 0:
        return [step / horizon for step in range(1, horizon + 1)]
    return [min(1.0, max(_LEAST_PROGRESS, value / spent[-1])) for value in spent]


def _counts(args: TrainingArguments, num_prompts: int | None, num_generations: int | None) -> tuple[int, int]:
    """Prompts a step and completions per prompt: as given, as the trainer's arguments tell, or 1."""
    group = num_generations or int(getattr(args, "num_generations", None) or 1)
    batch = int(args.train_batch_size) * int(args.gradient_accumulation_steps) * int(args.world_size)
    told = max(1, batch // group) if hasattr(args, "num_generations") else 1
    return num_prompts or told, group


def _number(value: Any) -> float:
    """A logged value; NaN for None, which TRL logs where no completion had a reward."""
    return math.nan if value is None else float(value)


def _tokens(row: Mapping[str, Any]) -> float | None:
    """Tokens since the first step, where a log tells them."""
    return next((float(row[name]) for name in _TOKENS if row.get(name)), None)


def _completed(facts: RunFacts, model: Any) -> RunFacts:
    """Facts with what the model tells: its size, whole where DeepSpeed has split it, and whether it has adapters."""
    if model is None:
        return facts
    if facts.size_b is None and type(model).__name__ != _SHARDED:
        size = sum(getattr(weight, "ds_numel", None) or weight.numel() for weight in model.parameters())
        facts = replace(facts, size_b=size / 1e9 if size else None)
    return replace(facts, lora=facts.lora or hasattr(model, "peft_config"))
