"""The loop: prompts, rollouts, rewards, advantages, update, meter, forecast, and the decision to continue.

``GRPOTrainer.steps`` with ``_collect`` and ``_learn`` is the whole of it. Everything it works with is handed in as ``Parts``,
so an engine, a predictor, a sink or a reward function can be replaced without touching the loop.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from grpo_fast.compute.budget import BudgetVerdict
from grpo_fast.config import Config, ConfigError
from grpo_fast.environments import EnvironmentFailedError
from grpo_fast.law import Spending
from grpo_fast.metrics import PhaseTimer, mean_known
from grpo_fast.rewards import RewardError
from grpo_fast.rollout import RolloutError, WeightSyncError
from grpo_fast.train.ahead import Rollouts
from grpo_fast.train.best import BestCheckpoints, way_back
from grpo_fast.train.checkpoint import CheckpointError, load_checkpoint, prune_checkpoints, save_checkpoint
from grpo_fast.train.collect import Collected, Collector, trainer_state
from grpo_fast.train.distributed import World
from grpo_fast.train.evaluate import evaluate, probe
from grpo_fast.train.handshake import shake_hands
from grpo_fast.train.in_step import InStep, Turn
from grpo_fast.train.interrupt import InterruptFlag
from grpo_fast.train.logged import named_apart
from grpo_fast.train.optim import build_optimizer
from grpo_fast.train.oversight import Oversight, Verdict
from grpo_fast.train.parts import Replacements, build_parts, check_given
from grpo_fast.train.policy import Policy
from grpo_fast.train.policy_source import pick_device
from grpo_fast.train.results import StepResult, UpdateResult
from grpo_fast.train.resumable import check_resumable, config_of
from grpo_fast.train.rng import load_rng_state, rng_state
from grpo_fast.train.schedule import learning_rate_at, progress_schedule
from grpo_fast.train.step import Learner, NonFiniteGradientError
from grpo_fast.train.summary import Ending, Outcome, write_summary

_STATE_VERSION = 4
_SMOOTHED_STEPS = 10
_ABSENT: Any = None  # so that check_given can say what TRL's call lacks


class GRPOTrainer:
    """Trains a policy with GRPO until a budget is spent, the plateau is forecast to be reached, or you stop it.

    Example:
        >>> with GRPOTrainer(recipe("embedded", max_steps=50)) as trainer:
        ...     for step in trainer.steps():
        ...         print(step.step, step.metrics["reward"], step.forecast.plateau)
    """

    def __init__(self, config: Config = _ABSENT, *, resume: bool = False, **given: Unpack[Replacements]) -> None:
        """Checks everything that can be checked, then loads data and model.

        Args:
            config: the whole configuration; see :func:`grpo_fast.recipe` for ready ones.
            resume: resume the run in ``config.output_dir``; see :meth:`resume` and ``config.resume_if_exists``.
            **given: parts in place of the configured ones: ``reward_funcs``, ``train_dataset``, ``eval_dataset``, ``budget``,
                ``engine``, ``predictor``, ...; see :class:`~grpo_fast.train.parts.Replacements`.

        Raises:
            ConfigError: something in the configuration cannot work; the message names it and the fix.
            TypeError: ``config`` is not a Config, or there is no such argument.
        """
        check_given(config, given)
        config = config.replace(output_dir=config.output_dir.absolute())  # the same place where a script changes its folder
        self._world = world = World.join(pick_device(config.device), timeout_s=config.ddp_timeout_s)
        resume = shake_hands(config, world, resume=resume)
        parts = self._parts = build_parts(config, given, resume=resume, world=world)
        self.config = config = parts.config
        self._optimizer = build_optimizer(parts.policy.model, config)
        self._learner = Learner(config, parts.policy, self._optimizer, reference=parts.reference, world=world)
        collector = Collector(config, parts.sampler, stream=parts.stream, rewards=parts.rewards)
        self._rollouts = Rollouts(config, collector, world=world)
        self._progress = progress_schedule(config)
        self._timer, self._interrupt, self._in_step = PhaseTimer(), InterruptFlag(tells=world.is_main), InStep(world)
        self._pending: Collected | None = None
        self._stream_state = parts.stream.state_dict()
        self._recent_rewards: list[float] = []
        self._oversight = Oversight(config, predictor=parts.predictor, sinks=parts.sinks, world=world)
        self._best = BestCheckpoints()
        self._evals: dict[str, float] = {}
        self._opened = False
        self._saved: tuple[int, bool] | None = None  # steps done, and whether the next one's groups are there
        self._stop_message = ""
        self._ending: Ending | None = None
        self._loop: Callable[[], Generator[StepResult] | None] = lambda: None
        self.global_step = 0
        """Steps done."""
        self.summary: dict[str, Any] = {}
        """Content of ``summary.json``; empty until the run has ended."""
        if resume:
            with contextlib.ExitStack() as on_error:
                on_error.callback(parts.close)
                self._restore()
                on_error.pop_all()

    @classmethod
    def resume(cls, run_dir: str | Path, *, config: Config | None = None, **given: Unpack[Replacements]) -> Self:
        """Opens a run to resume it from its newest checkpoint, or from the start if it has none yet.

        It continues as the uninterrupted run would have: bit for bit, on the same machine.

        Args:
            run_dir: the run.
            config: the run's configuration with changed limits, forecast or output settings; other changes are refused.
            **given: as for the constructor; Python reward functions and tasks must be given again.

        Raises:
            ConfigError: there is no such run, or a resumed run cannot make such a change.
            CheckpointError: the newest checkpoint is damaged.
        """
        saved = config_of(run_dir)
        wanted = (config or saved).replace(output_dir=Path(run_dir))
        check_resumable(saved, wanted)
        return cls(wanted, resume=True, **given)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the run's files: the only one, or rank 0 of several."""
        return self._world.is_main

    @property
    def policy(self) -> Policy:
        """The model in training, with its tokeniser."""
        return self._parts.policy

    def train(self) -> dict[str, Any]:
        """Runs to the end.

        Returns:
            The summary, as ``summary.json`` holds it.
        """
        for _ in self.steps():
            pass
        return self.summary

    def steps(self) -> Iterator[StepResult]:
        """Trains, and yields after each step. Leaving the loop ends the run with a checkpoint; a new call continues it.

        Raises:
            RewardError, EnvironmentFailedError: a reward function or an environment failed; what was trained is saved.
            ConfigError: a reward lies outside ``reward_range``; what was trained is saved.
            NonFiniteGradientError: training diverged; what was trained is saved.
            RolloutError: the engine died, or does not have the policy's weights; what was trained is saved.
            FloatingPointError: the policy's logits are not finite; the newest checkpoint holds.
            RankLostError: another process of the run died or hangs; the newest checkpoint holds.
            TrainingError: another process makes other calls of the trainer between two steps; the newest checkpoint holds.
            KeyboardInterrupt: Ctrl-C came twice; the newest checkpoint holds.
        """
        loop = self._steps()
        self._loop = weakref.ref(loop)  # weak, so that leaving the loop ends it
        return loop

    def _steps(self) -> Generator[StepResult]:
        with self._interrupt, self._world.watched():
            self._in_step.take(Turn.START, self.global_step)
            self._timer.lap()  # time outside the loop is not the run's
            self._open()
            try:
                self._measure_start()
                ending = self._why_end()
                self._ending = ending.again() if ending is not None and self.global_step else ending
                while self._ending is None:
                    self._collect()
                    self._ending = self._why_end()
                    if self._ending is None:
                        yield self._learn()
                        self._ending = self._in_step.take(Turn.GO_ON, self.global_step, self._ending) or self._why_end()
                self._finish(self._ending)
            except GeneratorExit:
                if (ending := self._in_step.take(Turn.LEAVE, self.global_step, self._ending)) is not None:
                    self._finish(ending)
                raise
            except (RewardError, EnvironmentFailedError, ConfigError, NonFiniteGradientError, RolloutError) as error:
                # Past the first of several iterations the weights have moved already: only an older checkpoint is whole.
                if self.config.num_iterations == 1 or not isinstance(error, NonFiniteGradientError):
                    self._save()
                raise

    def stop(self, message: str = "stop() was called") -> None:
        """Ends the run after the present step, with a checkpoint; of several processes, rank 0 is the one to call it."""
        self._stop_message = message

    def _collect(self) -> None:
        """Samples and scores the step's groups, unless a checkpoint brought them along."""
        if self._pending is not None:
            self._rollouts.go_on(self.global_step + 1)
        else:
            self._pending = self._rollouts.take(self.global_step + 1, self._timer)
            self._pending.charge(self._parts.meter)
            self._stream_state = self._pending.stream
            for problem in self._pending.problems:
                self._tell("warn", problem)
        self._oversight.within_range(self._pending.metrics["reward"], f"step {self.global_step + 1}")

    def _learn(self) -> StepResult:
        """The rest of a step: from collected groups to the decision to go on."""
        assert self._pending is not None
        parts, collected, step = self._parts, self._pending, self.global_step + 1
        learning_rate = learning_rate_at(step, self.config)
        update = self._learner.update(collected.groups, learning_rate=learning_rate, timer=self._timer)
        if parts.policy.follower is not None:
            parts.policy.follower.follow(step)
        self.global_step, self._pending = step, None
        sync, lost = self._sync()
        times = self._charge(update)
        verdict = self._world.patiently(lambda: self._observe(collected.metrics | update.metrics))
        self._ending = self._why_end(verdict)

        metrics = {"step": step, "progress": self._progress[step - 1], "learning_rate": learning_rate}
        metrics |= {"epoch": collected.epoch} | collected.metrics | update.metrics | verdict.metrics
        metrics |= sync | times | parts.meter.metrics()
        metrics |= {f"budget/{name}": left for name, left in parts.budget.remaining(parts.meter.usage(step)).items()}
        metrics |= named_apart(collected.logged, metrics)
        ends = self._ending is not None and self._ending.signal is None  # a signal is no end: the run goes on without a trace
        if self.config.eval_steps and lost is None and (ends or step % self.config.eval_steps == 0):
            metrics |= self._evaluate()
        self._world.once(lambda: self._log(metrics, verdict, collected))
        if (failure := lost or verdict.failure) is not None:
            raise failure  # the step itself is whole, and is saved
        record = self._world.once(lambda: self._best.is_better(metrics.get("eval_reward", math.nan)))
        if self._ending is not None or record or step % self.config.save_steps == 0:
            self._save()
        return StepResult(step, metrics, verdict.forecast, verdict.decision, verdict.alarm, collected.groups)

    def _sync(self) -> tuple[dict[str, float], WeightSyncError | None]:
        """Gives the engine the new weights; its failure is raised when the step's record is complete."""
        self._rollouts.hold(self._timer)
        with self._timer.phase("sync"):
            try:
                return self._parts.engine.sync_weights(self._parts.policy.whole_model(), self.global_step), None
            except WeightSyncError as error:
                return {}, error

    def evaluate(self) -> float:
        """Mean reward of answers to the held-out prompts, by the task's own measure or else by what rewards training."""
        self._in_step.take(Turn.EVALUATE, self.global_step)
        return self._evaluate()["eval_reward"]

    def _evaluate(self) -> dict[str, float]:
        state = trainer_state(self.config, self.global_step, self._stream_state)
        metrics = evaluate(self.config, self._parts, state, tell=self._tell)
        if not self.global_step:
            self._evals["first"] = metrics["eval_reward"]
        self._evals |= {"last": metrics["eval_reward"], "step": self.global_step}
        return metrics

    def save(self) -> Path:
        """Writes a checkpoint now, and gives its directory, which ``from_pretrained`` reads."""
        self._in_step.take(Turn.SAVE, self.global_step)
        self._open()
        self._save()
        return self.config.output_dir / f"checkpoint-{self.global_step}"

    def close(self) -> None:
        """Ends the loop, worker processes, the engine and the sinks; calling it twice is harmless."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._world.close)
            stack.callback(self._parts.close)
            stack.callback(self._rollouts.close)
            stack.callback(self._parts.engine.close)  # rollouts that still run end with it
            if (loop := self._loop()) is not None:
                loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._world.tell(error)
        self.close()

    def _observe(self, metrics: dict[str, float]) -> Verdict:
        """Shows the step to forecast and alarm; a collapse takes the checkpoints since its onset out of the choice."""
        self._recent_rewards = [*self._recent_rewards, metrics["reward"]][-_SMOOTHED_STEPS:]
        step, used = self.global_step, self._parts.meter.usage(self.global_step)
        spent = Spending(tokens=float(used.tokens), device_hours=used.gpu_hours, money=used.money)
        verdict = self._oversight.observe(
            step, self._progress[step - 1], metrics, spent=spent, give_up=lambda: bool(self._interrupt)
        )
        if self._oversight.collapsed:
            self._best.forget_after(self._oversight.sound_until(step))
        return verdict

    def _charge(self, update: UpdateResult) -> dict[str, float]:
        """Meters the step and returns its times."""
        update.charge(self._parts.meter, self.config)
        self._rollouts.charge(self._parts.meter)
        seconds = self._timer.lap()
        self._parts.meter.add_seconds(seconds)
        return {"step_time": sum(seconds.values())} | {f"time/{phase}": value for phase, value in seconds.items()}

    def _why_end(self, verdict: Verdict | None = None) -> Ending | None:
        """Decided by rank 0, once it knows whether a signal came to any."""
        signals = self._world.gather(lambda: self._interrupt.name)
        return self._world.once(lambda: self._reason(next(filter(None, signals), ""), verdict))

    def _reason(self, signal: str, verdict: Verdict | None) -> Ending | None:
        step, watched = self.global_step, self._oversight.ending if verdict is None else verdict.ending
        if signal:
            told = f"the run is saved. Continue it with `grpo-fast train --resume {self.config.output_dir}`."
            return Ending("interrupt", f"{signal} received after step {step}; {told}", signal)
        if self._stop_message:
            return Ending("user", f"{self._stop_message}, after step {step}.")
        if watched is not None and watched.kind == "collapse":
            return watched  # also on the last step: what to use is another question then
        spent = self._parts.budget.check(self._parts.meter.usage(step))
        if spent is None and step >= self.config.max_steps:  # a budget that was given need not know it
            spent = BudgetVerdict("steps", used=step, allowed=self.config.max_steps)
        return watched if spent is None else Ending(spent.stopped_by, spent.reason)

    def _open(self) -> None:
        """Starts the sinks."""
        if not self._opened:
            self._world.once(lambda: self._parts.open(self.global_step))
            self._opened = True

    def _measure_start(self) -> None:
        """Probes the untrained policy once, and evaluates it where evaluation is on."""
        if self.global_step:
            return
        if self.config.baseline_probe and self.config.forecast != "off" and "baseline" not in self._evals:
            self._probe()
        self._world.once(lambda: self._parts.record.save_facts(asdict(self._oversight.predictor.facts)))
        if self.config.eval_steps and "first" not in self._evals and self._why_end() is None:
            metrics = self._evaluate()
            self._world.once(lambda: self._parts.sinks.log_step({"step": 0, "progress": 0.0} | metrics, None))
            self._tell("eval", f"held-out reward before training: {metrics['eval_reward']:.3f}")

    def _probe(self) -> None:
        """Measures where the untrained policy stands, for the forecast to begin from."""
        baseline = probe(self.config, self._parts, self._timer, tell=self._tell)
        self._evals["baseline"] = self._oversight.within_range(baseline.reward, "the untrained policy")
        self._oversight.start_from(self._evals["baseline"], baseline.error)
        self._tell(*baseline.event)

    def _finish(self, ending: Ending) -> None:
        """Saves what is not saved, writes the summary and tells why the run ended; not where no step was ever rewarded."""
        self._oversight.check_rewarded(self.global_step, ending)
        self._parts.meter.add_seconds(self._timer.lap())
        if self._saved != (self.global_step, self._pending is not None):
            self._save()
        self.summary, self._stop_message = self._world.once(lambda: self._conclude(ending)), ""

    def _conclude(self, ending: Ending) -> dict[str, Any]:
        best = self._best.best()
        if ending.kind == "collapse":
            ending = Ending(ending.kind, f"{ending.message} {way_back(best)}")
        ending = replace(ending, message=ending.message + self._rollouts.left_over(self._pending))
        outcome = Outcome(self.global_step, mean_known(self._recent_rewards), best, self._evals, self._oversight.forecast)
        summary = write_summary(self.config, self._parts, ending, outcome)
        self._event(ending.event, ending.message)
        return summary

    def _log(self, metrics: dict[str, float], verdict: Verdict, collected: Collected) -> None:
        self._parts.sinks.log_step(metrics, verdict.row)
        rows = collected.samples(self.config.log_completions)
        self._parts.sinks.log_completions([{"step": self.global_step} | row for row in rows])

    def _save(self) -> None:
        """A checkpoint, the best one noted, old ones removed."""
        if self.is_main_process:
            collapsed = self._oversight.collapsed
            held_out = self._evals["last"] if self._evals.get("step") == self.global_step and not collapsed else None
            self._best.add(
                self.global_step, train=math.nan if collapsed else mean_known(self._recent_rewards), held_out=held_out
            )
        path = save_checkpoint(
            self.config.output_dir,
            self.global_step,
            policy=self._parts.policy,
            optimizer=self._optimizer,
            state=self._state_dict() if self.is_main_process else {},
            world=self._world,
        )
        self._saved = (self.global_step, self._pending is not None)
        self._world.once(lambda: self._after_save(path))

    def _after_save(self, saved: Path) -> None:
        config, step = self.config, self.global_step
        protected = self._best.protected(sound_until=self._oversight.sound_until(step))
        kept = prune_checkpoints(config.output_dir, keep=config.save_total_limit, protect=protected)
        self._best.keep_only([path.name for path in kept])
        self._parts.record.save_state(step, **self._best.facts())
        self._event("checkpoint", f"saved {saved}")

    def _state_dict(self) -> dict[str, Any]:
        parts, ahead = self._parts, self._rollouts.ready()
        return {
            "version": _STATE_VERSION,
            "step": self.global_step,
            "stream": ahead[-1].stream if ahead else self._stream_state,
            "pending": None if self._pending is None else self._pending.to_dict(),
            "ahead": [collected.to_dict() for collected in ahead],
            "oversight": self._oversight.state_dict(),
            "meter": parts.meter.state_dict(),
            "recent_rewards": self._recent_rewards,
            "best": self._best.state_dict(),
            "evals": self._evals,
            "entropy": self._learner.entropy.state_dict(),
            "rng": rng_state(),
        }

    def _restore(self) -> None:
        """Puts everything back to the newest checkpoint, and the run's record with it."""
        parts, checkpoints = self._parts, self._parts.checkpoints
        if not checkpoints:
            self._world.once(lambda: parts.record.truncate(-1))
            return
        state = load_checkpoint(
            checkpoints[-1],
            policy=parts.policy,
            optimizer=self._optimizer,
            world=self._world,
            has_weights=parts.policy.adapters is None,
        )
        if state["version"] != _STATE_VERSION:
            raise CheckpointError(f"{checkpoints[-1]} is from another version of grpo_fast (state {state['version']})")
        self.global_step = state["step"]
        parts.stream.load_state_dict(state["stream"])
        if state["pending"] is not None:
            self._pending = Collected.from_dict(state["pending"], parts.prompts.of_row)
        self._saved = (self.global_step, self._pending is not None)
        ahead = [Collected.from_dict(saved, parts.prompts.of_row) for saved in state["ahead"]]
        self._rollouts.restore(self.global_step + 1 + (self._pending is not None), ahead)
        self._stream_state, self._recent_rewards, self._evals = state["stream"], state["recent_rewards"], state["evals"]
        self._best = BestCheckpoints.from_state_dict(state["best"])
        self._best.keep_only([path.name for path in checkpoints])
        parts.meter.load_state_dict(state["meter"])
        self._learner.entropy.load_state_dict(state["entropy"])
        self._world.once(lambda: parts.record.truncate(self.global_step))
        self._oversight.restore(state["oversight"], self._progress)
        parts.engine.sync_weights(parts.policy.whole_model(), self.global_step)
        load_rng_state(state["rng"])

    def _tell(self, event: str, message: str) -> None:
        """:meth:`_event` where all ranks are: if rank 0 cannot write it, the run ends on every one."""
        self._world.once(lambda: self._event(event, message))

    def _event(self, event: str, message: str) -> None:
        self._parts.sinks.log_event(self.global_step, event, message)
