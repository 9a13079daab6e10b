"""Parts that people make themselves, held to what the trainer needs of them: when they are given, and what engines answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_fast.compute import Budget
from grpo_fast.config import Config, ConfigError
from grpo_fast.law import OnlinePredictor
from grpo_fast.rollout import RolloutEngine, RolloutError, SamplingParams, WeightSyncError
from grpo_fast.types import Completion, TrainingError
from grpo_fast.user_code import describe_failure, shown

if TYPE_CHECKING:
    import torch

_ENGINE_METHODS = ("generate", "sync_weights", "sleep", "close")
_SINK_METHODS = ("start", "log_step", "log_event", "log_completions", "close")
_REASONS = ("stop", "length")
_ROUNDING = 1e-3
"""Nats by which the log-probability of a sure token may exceed 0."""


def check_parts(config: Config, given: Mapping[str, Any], *, resume: bool) -> None:
    """Refuses an engine, sinks, a budget or a predictor that a run could not use to its end.

    Args:
        config: the run's configuration.
        given: of :class:`~grpo_fast.train.parts.Replacements`, those four are read.
        resume: whether the predictor gets the state of a run.

    Raises:
        TypeError: one is of another kind, or lacks a method.
        ConfigError: the predictor's horizon is too short, or it has seen another run.
    """
    if given.get("engine") is not None:
        _check_methods("engine", given["engine"], _ENGINE_METHODS, "docs/vllm.md has an example")
    sinks = given.get("sinks", ())
    if isinstance(sinks, str) or not isinstance(sinks, Sequence):
        raise TypeError(f"sinks is {shown(sinks)}; give a list of sinks, also of one")
    for sink in sinks:
        if isinstance(sink, str):
            raise TypeError(f"sinks holds the name {sink!r}; names belong in Config(sinks=...), and here stand sinks in Python")
        _check_methods("a sink", sink, _SINK_METHODS, "those of grpo_fast.sinks.Sink; one may do nothing")
    budget, predictor = given.get("budget"), given.get("predictor")
    if budget is not None and not isinstance(budget, Budget):
        raise TypeError(f"budget is {shown(budget)}; give a Budget: Budget(tokens=1e9)")
    if predictor is None:
        return
    if not isinstance(predictor, OnlinePredictor):
        raise TypeError(f"predictor is {shown(predictor)}; give an OnlinePredictor: OnlinePredictor({config.max_steps})")
    if predictor.horizon < config.max_steps:
        raise ConfigError(
            f"the predictor's horizon is {predictor.horizon}, less than max_steps={config.max_steps}; make it "
            f"OnlinePredictor({config.max_steps}), or lower max_steps"
        )
    if predictor.num_observations and not resume:
        raise ConfigError(f"the predictor has seen {predictor.num_observations} rewards of another run; make a new one")


def _check_methods(name: str, part: Any, methods: Sequence[str], where: str) -> None:
    if isinstance(part, type):
        raise TypeError(f"{name} is the class {part.__name__}; give an instance: {part.__name__}(...)")
    missing = [method for method in methods if not callable(getattr(part, method, None))]
    if missing:
        raise TypeError(f"{name} is {shown(part)}, without {', '.join(missing)}; it needs {', '.join(methods)} ({where})")


class GivenEngine:
    """An engine of somebody's own, whose answers are checked, and whose failures leave a run that can be resumed.

    Args:
        engine: theirs.
        vocab_size: V, of the policy.
    """

    def __init__(self, engine: RolloutEngine, *, vocab_size: int) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._name = f"the engine {type(engine).__name__}"

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, num_generations: int, **options: Any
    ) -> list[list[Completion]]:
        """As the engine's own; what it leaves out of its signature and is not asked for is not missed.

        Raises:
            RolloutError: it failed, or its answers are not what the protocol says; the message tells which.
        """
        try:
            answers = self._engine.generate(prompts, sampling, num_generations=num_generations, **options)
        except (TrainingError, FloatingPointError):
            raise
        except Exception as error:
            raise RolloutError(f"{self._name} {describe_failure(error)}") from error
        self._check_shape(answers, len(prompts), num_generations)
        longest = options.get("max_tokens") or [sampling.max_tokens] * len(prompts)
        for place, (group, limit) in enumerate(zip(answers, longest, strict=True)):
            for completion in group:
                if wrong := self._wrong(completion, limit):
                    raise RolloutError(f"{self._name} answered prompt {place} of {len(prompts)} with {wrong}")
        return answers

    def sync_weights(self, policy: torch.nn.Module, version: int) -> dict[str, float]:
        """As the engine's own.

        Raises:
            WeightSyncError: it failed, or did not return metrics.
        """
        try:
            metrics = self._engine.sync_weights(policy, version)
        except TrainingError:
            raise
        except Exception as error:
            raise WeightSyncError(f"{self._name} {describe_failure(error)} in sync_weights") from error
        if not isinstance(metrics, Mapping):
            raise WeightSyncError(
                f"{self._name} returned {shown(metrics)} from sync_weights; return a dict of metrics, or {{}}"
            )
        return dict(metrics)

    def sleep(self) -> None:
        """As the engine's own."""
        self._engine.sleep()

    def close(self) -> None:
        """As the engine's own."""
        self._engine.close()

    def _check_shape(self, answers: Any, num_prompts: int, num_generations: int) -> None:
        wanted = f"it must be {num_prompts} lists of {num_generations} completions"
        if not isinstance(answers, list | tuple):
            raise RolloutError(f"{self._name} returned {shown(answers)}; {wanted}")
        if len(answers) != num_prompts:
            raise RolloutError(f"{self._name} answered {len(answers)} of {num_prompts} prompts; {wanted}")
        for place, group in enumerate(answers):
            if not isinstance(group, list | tuple):
                raise RolloutError(f"{self._name} answered prompt {place} with {shown(group)}; {wanted}")
            if len(group) != num_generations:
                raise RolloutError(f"{self._name} gave {len(group)} completions for prompt {place}; {wanted}")

    def _wrong(self, completion: Any, limit: int) -> str:
        """What a completion must not be, and the fix; empty where all is right."""
        if not isinstance(completion, Completion):
            return f"{shown(completion)}; give a grpo_fast.types.Completion"
        tokens, logprobs = completion.token_ids, completion.logprobs
        for name, values, kinds in (("token_ids", tokens, {int}), ("logprobs", logprobs, {float, int})):
            if not isinstance(values, tuple | list) or set(map(type, values)) - kinds:
                return f"{name} {shown(values)}; give plain numbers: tuple(values.tolist())"
        least, most = (min(tokens), max(tokens)) if tokens else (0, 0)
        nats = np.asarray(logprobs, dtype=np.float64)
        sure = np.isfinite(nats) & (nats <= _ROUNDING)
        odd = 0 if sure.all() else int(np.argmin(sure))
        checks = (
            (len(logprobs) != len(tokens), f"{len(logprobs)} logprobs for {len(tokens)} tokens; give one each"),
            (len(tokens) > limit, f"{len(tokens)} tokens, above max_tokens={limit}; cut it there, with finish_reason='length'"),
            (
                least < 0 or most >= self._vocab_size,
                f"tokens from {least} to {most}; the policy's vocabulary goes from 0 to {self._vocab_size - 1}",
            ),
            (
                not sure.all(),
                f"the log-probability {logprobs[odd] if logprobs else 0} of its token {odd}; it is finite and at most 0 (nats)",
            ),
            (
                completion.finish_reason not in _REASONS,
                f"finish_reason={completion.finish_reason!r}; it is 'stop' or 'length'",
            ),
            (not isinstance(completion.text, str), f"the text {completion.text!r:.60}; decode it to a str"),
            (
                not isinstance(completion.weight_version, int),
                f"weight_version={completion.weight_version!r}; give the version of the last sync_weights, at first 0",
            ),
        )
        return next((told for is_wrong, told in checks if is_wrong), "")
