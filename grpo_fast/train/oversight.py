"""Watches a run and may end it: the forecast with its stopping rule, and the collapse alarm.

Neither changes training: if both only warn, a run is bit for bit the same as without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from grpo_fast.config import Config, ConfigError
from grpo_fast.law import AlarmState, CollapseAlarm, Forecast, OnlinePredictor, Spending, StopDecision, StoppingRule
from grpo_fast.law.stopping import STILL_STEPS
from grpo_fast.rewards import RewardError
from grpo_fast.sinks import SinkSet
from grpo_fast.train.distributed import ALONE, World
from grpo_fast.train.resumable import ending_settings
from grpo_fast.train.summary import Ending

_ROUNDING = 1e-9
_UNREWARDED_STEPS = 10
_ASK_AGAIN = 0.1
_ALL_WRONG = (
    "nothing was learnt, as no completion earned anything. Easier prompts, a reward with partial credit, or a higher "
    "num_generations would make rewards differ"
)
_ALIKE = (
    "nothing was learnt. The prompts are solved, the reward cannot tell answers apart, or all answers are alike (see "
    "completions.jsonl), for example because one answer earns something on every prompt. A higher temperature, entropy_coef "
    "or beta keeps the policy exploring"
)
_ANSWERS = {"stop": "end the run here", "go on": "ask again in a while", "never": "go on and do not ask again"}


class NoRewardError(RewardError):
    """Reward functions give no completion a reward, so that nothing is learnt.

    Args:
        function: their names.
        steps: how many steps in a row.
        last: of them.
    """

    def __init__(self, function: str, steps: int, last: int) -> None:
        many = f"the {steps} steps up to step {last}" if steps > 1 else f"step {last}"
        again = "continue with --resume" if steps < last else "start the run again with --overwrite"
        super().__init__(
            function,
            f"gave None or NaN, or failed, for every completion of {many}, so that nothing was learnt; correct it, or leave "
            f"out prompts that have no reward, and {again}",
        )
        self._given = (function, steps, last)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of watching a step."""

    forecast: Forecast | None = None
    decision: StopDecision | None = None
    alarm: AlarmState | None = None
    ending: Ending | None = None
    """Why to end the run; None to continue."""
    still: int = 0
    """Consecutive steps, this one included, in which no group held two different rewards and no other term gave a gradient."""
    failure: NoRewardError | None = None
    """What ends the run without a success, once the step is recorded."""

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the step: :attr:`still`, and the levels of the alarm's detectors (1: at the threshold)."""
        levels = {} if self.alarm is None else self.alarm.levels
        return {"steps_without_variance": float(self.still)} | {f"alarm/{name}": level for name, level in levels.items()}

    @property
    def row(self) -> dict[str, Any] | None:
        """The step's row of ``forecasts.jsonl``: the forecast, and what the rule made of it."""
        if self.forecast is None or self.decision is None:
            return None
        decision = self.decision
        told = {"stop": decision.stop, "stop_count": decision.count, "veto": decision.veto}
        return self.forecast.to_dict() | told


class Oversight:
    """Forecast, stopping rule and alarm of one run, with the warnings given and the answers received.

    Args:
        config: modes and thresholds.
        predictor: the run's forecaster.
        sinks: where warnings go, and whom ``forecast="ask"`` asks.
        world: the ranks, of which rank 0 alone is shown the steps.
    """

    def __init__(self, config: Config, *, predictor: OnlinePredictor, sinks: SinkSet, world: World = ALONE) -> None:
        self.predictor = predictor
        self.rule = build_rule(config)
        least = None if config.reward_range is None else config.reward_range[0]
        self.alarm = CollapseAlarm(config.forecast_epsilon, least_reward=least)
        self.forecast: Forecast | None = None
        self._config = config
        self._sinks = sinks
        self._world = world
        self.ending: Ending | None = None
        """Why the newest step ended the run, also one that is resumed with the settings that ended it; None if it did not."""
        self._told: set[str] = set()
        self._silent_until = 0
        self._still = 0
        self._unrewarded = 0
        """Consecutive steps in which no completion had a reward."""
        self._functions = ""
        self.collapsed = False
        """Whether a collapse was confirmed at the newest step."""
        self._onset: int | None = None
        """First step of the fall that the reward was in at the newest step."""

    def start_from(self, reward: float, error: float) -> None:
        """Gives the forecaster the reward of the untrained policy; a forecaster that already has one keeps it.

        Args:
            reward: mean reward of a probe; NaN is ignored.
            error: its standard error; NaN or 0 if unknown.
        """
        facts = self.predictor.facts
        if facts.start is None and not math.isnan(reward):
            known = error if error > 0 else None
            self.predictor.inform(replace(facts, start=reward, start_error=known))

    def observe(
        self,
        step: int,
        progress: float,
        metrics: Mapping[str, float],
        *,
        spent: Spending | None = None,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Verdict:
        """Shows a step to the forecast and the alarm.

        Args:
            step: the step that is done.
            progress: share of the summed learning rate that is spent.
            metrics: the step's.
            spent: compute since the run began.
            give_up: asked while a question waits for its answer; True ends the waiting.

        Raises:
            ConfigError: the reward lies outside ``reward_range``.
        """
        self._see_variance(step, metrics)
        forecast, decision = self._foresee(step, progress, metrics, spent)
        alarm = None if self._config.collapse_action == "off" else self.alarm.update(step, metrics["reward"], metrics)
        self.collapsed, self._onset = (False, None) if alarm is None else (alarm.confirmed, alarm.onset)
        ending = self._collapse(step, alarm) if alarm is not None and alarm.confirmed else None
        if ending is None and decision is not None and decision.stop:
            ending = self._plateau(step, decision, give_up)
        self.ending = ending
        return Verdict(forecast, decision, alarm, ending, self._still, self._see_rewards(step, metrics))

    def check_rewarded(self, step: int, ending: Ending) -> None:
        """Refuses to call a run done that reached its budget at ``step`` without a single reward; every rank has to ask.

        Raises:
            NoRewardError: it did.
        """

        def check() -> None:
            if ending.event == "budget" and 0 < step == self._unrewarded:
                raise NoRewardError(self._functions, step, step)

        self._world.once(check)

    def sound_until(self, step: int) -> int:
        """Newest step whose checkpoint is certainly from before a fall that may have begun by ``step``, the newest one.

        The reward of a step is that of the weights before its update.
        """
        return (step + 1 if self._onset is None else self._onset) - 2

    def within_range(self, reward: float, where: str) -> float:
        """A mean reward as the predictor takes it: what rounding put beyond ``reward_range`` is put back.

        Raises:
            ConfigError: it lies outside.
        """
        bounds = self.predictor.reward_range
        if self._config.forecast == "off" or bounds is None or math.isnan(reward):
            return reward
        nearest = min(max(reward, bounds[0]), bounds[1])
        if abs(nearest - reward) > _ROUNDING * (bounds[1] - bounds[0]):
            raise ConfigError(
                f"the mean reward {reward:g} of {where} is outside reward_range={bounds}; correct reward_range, or leave it "
                "out if the range is not known"
            )
        return nearest

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on bit for bit, as JSON values."""
        return {
            "predictor": self.predictor.state_dict(),
            "rule": self.rule.state_dict(),
            "alarm": self.alarm.state_dict(),
            "collapsed": self.collapsed,
            "onset": self._onset,
            "told": sorted(self._told),
            "silent_until": self._silent_until,
            "still": self._still,
            "unrewarded": self._unrewarded,
            "functions": self._functions,
            "ending": self.ending and asdict(self.ending) | {"settings": ending_settings(self._config)},
        }

    def restore(self, state: Mapping[str, Any], progress: Sequence[float]) -> None:
        """Goes on from :meth:`state_dict`; the predictor is fed anew where its settings have changed.

        Args:
            state: of a checkpoint.
            progress: the schedule as it is now.
        """
        restored = OnlinePredictor.from_state_dict(state["predictor"])
        same = all(getattr(restored, name) == getattr(self.predictor, name) for name in ("horizon", "epsilon", "reward_range"))
        if same and restored.prior.to_dict() == self.predictor.prior.to_dict():
            self.predictor = restored
        else:
            self.predictor.inform(restored.facts)
            for row in restored.rows:
                if row.step <= len(progress):
                    self.predictor.absorb(
                        row.step,
                        progress[row.step - 1],
                        row.reward,
                        num_prompts=row.num_prompts,
                        num_generations=row.num_generations,
                        reward_std=row.reward_std,
                        spent=row.spent,
                    )
        self.rule.take_up(state["rule"])
        self.alarm.load_state_dict(state["alarm"])
        self._told, self._silent_until = set(state["told"]), state["silent_until"]
        self._still = state.get("still", 0)  # none of these is in checkpoints of older versions
        self._unrewarded, self._functions = state.get("unrewarded", 0), state.get("functions", "")
        self.collapsed, self._onset = state.get("collapsed", False), state.get("onset")
        ending = state.get("ending")
        if ending is not None and ending["settings"] == ending_settings(self._config):
            self.ending = Ending(ending["kind"], ending["message"])
        if self._config.forecast != "off" and self.predictor.num_observations:
            self.forecast = self.predictor.forecast()

    def _foresee(
        self, step: int, progress: float, metrics: Mapping[str, float], spent: Spending | None
    ) -> tuple[Forecast | None, StopDecision | None]:
        if self._config.forecast == "off":
            return None, None
        self.forecast = self.predictor.observe(
            step,
            progress,
            self.within_range(metrics["reward"], f"step {step}"),
            num_prompts=self._config.prompts_per_step,
            num_generations=self._config.num_generations,
            reward_std=metrics["reward_std"],
            spent=spent,
        )
        all_wrong = metrics["frac_reward_all_wrong"]
        return self.forecast, self.rule.update(self.forecast, all_wrong=all_wrong, still=self._still)

    def _see_variance(self, step: int, metrics: Mapping[str, float]) -> None:
        """Counts steps whose rewards teach nothing, and tells of them once they are many."""
        also_learns = bool(self._config.beta or self._config.rewards_entropy)
        self._still = 0 if also_learns or metrics["frac_reward_zero_std"] < 1.0 else self._still + 1
        if self._still == STILL_STEPS:
            wrong = metrics["frac_reward_all_wrong"] == 1.0
            self._event(step, f"In {STILL_STEPS} steps no group held two different rewards: {_ALL_WRONG if wrong else _ALIKE}")

    def _see_rewards(self, step: int, metrics: Mapping[str, float]) -> NoRewardError | None:
        """Counts steps without any reward: one may have met prompts that have none, and many are a mistake."""
        self._unrewarded = self._unrewarded + 1 if math.isnan(metrics["reward"]) else 0
        names = [name.split("/")[1] for name in metrics if name.startswith("rewards/") and name.endswith("/mean")]
        self._functions = ", ".join(names)
        return None if self._unrewarded < _UNREWARDED_STEPS else NoRewardError(self._functions, self._unrewarded, step)

    def _collapse(self, step: int, alarm: AlarmState) -> Ending | None:
        if self._config.collapse_action == "stop":
            return Ending("collapse", f"{alarm.reason}.")
        self._event(step, f"{alarm.reason}; training continues (collapse_action='warn')")
        return None

    def _plateau(self, step: int, decision: StopDecision, give_up: Callable[[], bool]) -> Ending | None:
        if self._config.forecast == "stop":
            return Ending("forecast", f"{decision.reason}.")
        if self._config.forecast == "warn":
            self._event_once(step, "plateau", decision.reason)
            return None
        if step < self._silent_until or "never" in self._told:
            return None
        return self._ask(step, decision, give_up)

    def _ask(self, step: int, decision: StopDecision, give_up: Callable[[], bool]) -> Ending | None:
        answer = self._sinks.ask(f"{decision.reason}. Stop here?", _ANSWERS, give_up=give_up)
        if answer is None:
            self._event_once(step, "plateau", f"{decision.reason}; there is no terminal to ask on, so training continues")
            return None
        if answer == "stop":
            return Ending("forecast", f"{decision.reason}; you chose to stop.")
        self._silent_until = step + max(math.ceil(self.rule.patience), math.ceil(_ASK_AGAIN * self.predictor.horizon))
        if answer == "never":
            self._told.add("never")
        why = {"never": "you chose to continue to the end", "go on": "you chose to continue"}.get(answer, "no answer came")
        again = "" if answer == "never" else f"; the next question comes at step {self._silent_until} or later"
        self._event(step, f"{decision.reason}; {why}{again}")
        return None

    def _event_once(self, step: int, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._event(step, message)

    def _event(self, step: int, message: str) -> None:
        self._sinks.log_event(step, "warn", message)


def build_rule(config: Config) -> StoppingRule:
    """The stopping rule that a configuration asks for."""
    return StoppingRule(
        config.forecast_epsilon,
        confidence=config.forecast_confidence,
        patience=config.forecast_patience,
        min_steps=config.forecast_min_steps,
        warmup_steps=config.num_warmup_steps,
        reward_value=config.forecast_reward_value,
    )
