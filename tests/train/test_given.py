from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from grpo_fast.compute import Budget
from grpo_fast.config import Config, ConfigError
from grpo_fast.law import OnlinePredictor
from grpo_fast.rollout import RolloutError, SamplingParams, WeightSyncError
from grpo_fast.tasks.task import Task
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.given import GivenEngine, check_parts
from grpo_fast.types import Completion

SAID = Completion((4, 2), (-1.0, -0.5), "stop", "a")


class Saying:
    """An engine that gives one answer to everything, or fails."""

    def __init__(self, answer: Any = SAID, *, raises: Exception | None = None, synced: Any = None) -> None:
        self.answer, self.raises, self.synced = answer, raises, {} if synced is None else synced

    def generate(self, prompts: Any, sampling: Any, *, num_generations: int, seed: int) -> Any:
        if self.raises is not None:
            raise self.raises
        return [[self.answer] * num_generations for _ in prompts]

    def sync_weights(self, policy: torch.nn.Module, version: int) -> Any:
        if isinstance(self.synced, Exception):
            raise self.synced
        return self.synced

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass


class Quiet:
    """A sink that shows nothing."""

    def start(self, info: Any) -> None: ...

    def log_step(self, metrics: Any, forecast: Any = None) -> None: ...

    def log_event(self, step: int, event: str, message: str) -> None: ...

    def log_completions(self, rows: Any) -> None: ...

    def close(self) -> None: ...


class Stepping:
    """Half a sink."""

    def log_step(self, metrics: Any, forecast: Any = None) -> None: ...


def seen() -> OnlinePredictor:
    predictor = OnlinePredictor(500)
    predictor.observe(1, 0.1, 0.5, num_prompts=1, num_generations=2)
    return predictor


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"engine": Saying}, TypeError, r"engine is the class Saying; give an instance: Saying\(\.\.\.\)"),
        ({"engine": Stepping()}, TypeError, r"without generate, sync_weights, sleep, close; it needs generate"),
        ({"sinks": Quiet()}, TypeError, r"sinks is .*Quiet.*; give a list of sinks, also of one"),
        ({"sinks": "console"}, TypeError, r"sinks is 'console' \(str\); give a list"),
        ({"sinks": [Quiet(), "console"]}, TypeError, r"the name 'console'; names belong in Config\(sinks=\.\.\.\)"),
        ({"sinks": [Quiet]}, TypeError, r"a sink is the class Quiet; give an instance"),
        ({"sinks": [Stepping()]}, TypeError, r"without start, log_event, log_completions, close; it needs start, log_step"),
        ({"budget": {"tokens": 9}}, TypeError, r"budget is \{'tokens': 9\} \(dict\); give a Budget"),
        ({"predictor": OnlinePredictor}, TypeError, r"predictor is .*; give an OnlinePredictor: OnlinePredictor\(500\)"),
        ({"predictor": OnlinePredictor(499)}, ConfigError, r"horizon is 499, less than max_steps=500; make it .*\(500\), or"),
        ({"predictor": seen()}, ConfigError, r"has seen 1 rewards of another run; make a new one"),
    ],
)
def test_a_part_that_would_fail_a_run_is_refused_with_the_fix(
    given: dict[str, Any], kind: type[Exception], message: str, build: Any
) -> None:
    with pytest.raises(kind, match=message):
        check_parts(Config(), given, resume=False)
    with pytest.raises(kind, match=message):
        build(given, model="no/such/model", max_steps=500)


def test_parts_that_do_pass() -> None:
    fitting = {"engine": Saying(), "sinks": [Quiet()], "budget": Budget(tokens=9), "predictor": OnlinePredictor(900)}
    check_parts(Config(), fitting, resume=False)
    check_parts(Config(), {"predictor": seen()}, resume=True)
    check_parts(Config(), {}, resume=False)


def test_no_part_is_the_configured_one(build: Any) -> None:
    parts = build({"engine": None, "sinks": None, "budget": None, "predictor": None})
    assert type(parts.engine).__name__ == "TransformersEngine"
    assert (parts.budget.steps, parts.predictor.horizon) == (parts.config.max_steps, parts.config.max_steps)


def ask(answer: Any, *, limit: int = 8, **options: Any) -> list[list[Completion]]:
    engine = GivenEngine(Saying(answer), vocab_size=10)
    return engine.generate([[1], [1, 1]], SamplingParams(limit), num_generations=2, seed=0, **options)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"token_ids": (1,)}, r"\(dict\); give a grpo_fast\.types\.Completion"),
        (replace(SAID, token_ids=torch.tensor([4, 2])), r"token_ids tensor.*; give plain numbers: tuple\(values\.tolist\(\)\)"),
        (replace(SAID, logprobs=tuple(torch.zeros(2))), r"logprobs \(tensor.*; give plain numbers"),
        (replace(SAID, logprobs=(-1.0,)), r"1 logprobs for 2 tokens; give one each"),
        (replace(SAID, token_ids=(4,) * 9, logprobs=(-1.0,) * 9), r"9 tokens, above max_tokens=8; cut it there"),
        (replace(SAID, token_ids=(4, 10)), r"tokens from 4 to 10; the policy's vocabulary goes from 0 to 9"),
        (replace(SAID, token_ids=(-1, 2)), r"tokens from -1 to 2; the policy's vocabulary"),
        (replace(SAID, logprobs=(-1.0, math.nan)), r"log-probability nan of its token 1; it is finite and at most 0"),
        (replace(SAID, logprobs=(-math.inf, -1.0)), r"log-probability -inf of its token 0"),
        (replace(SAID, logprobs=(0.5, -1.0)), r"log-probability 0\.5 of its token 0"),
        (replace(SAID, finish_reason="eos"), r"finish_reason='eos'; it is 'stop' or 'length'"),
        (replace(SAID, text=None), r"the text None; decode it"),
        (replace(SAID, weight_version=None), r"weight_version=None; give the version of the last sync_weights"),
    ],
)
def test_an_answer_that_is_none_is_told_with_the_prompt_and_the_fix(answer: Any, message: str) -> None:
    with pytest.raises(RolloutError, match=rf"^the engine Saying answered prompt 0 of 2 with .*{message}"):
        ask(answer)


def test_answers_that_are_right_pass_as_they_are() -> None:
    nothing = Completion((), (), "stop", "")
    rounded = Completion([4], [1e-7], "length", "")  # type: ignore[arg-type]
    for answer in (SAID, nothing, rounded):
        assert ask(answer) == [[answer] * 2] * 2


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (None, r"returned None \(NoneType\); it must be 2 lists of 2 completions"),
        ([[SAID, SAID]], r"answered 1 of 2 prompts; it must be 2 lists of 2"),
        ([[SAID, SAID], [SAID]], r"gave 1 completions for prompt 1; it must be 2 lists of 2"),
        ([SAID, SAID], r"answered prompt 0 with Completion.*; it must be 2 lists of 2"),
    ],
)
def test_answers_to_other_than_what_was_asked_are_told(answers: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Saying()
    monkeypatch.setattr(engine, "generate", lambda *given, **options: answers)
    with pytest.raises(RolloutError, match=message):
        GivenEngine(engine, vocab_size=10).generate([[1], [1]], SamplingParams(8), num_generations=2, seed=0)


def test_each_prompt_has_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Saying()
    monkeypatch.setattr(engine, "generate", lambda *given, **options: [[SAID], [SAID]])
    with pytest.raises(RolloutError, match=r"prompt 1 of 2 with 2 tokens, above max_tokens=1"):
        GivenEngine(engine, vocab_size=10).generate([[1], [1]], SamplingParams(8), num_generations=1, seed=0, max_tokens=[2, 1])


def test_what_an_engine_raises_is_a_failed_rollout_or_sync() -> None:
    own = RolloutError("the server is gone")
    for raised, told in (
        (TimeoutError("gone"), "the engine Saying raised TimeoutError: gone .*in generate"),
        (own, "^the server"),
    ):
        engine = GivenEngine(Saying(raises=raised), vocab_size=10)
        with pytest.raises(RolloutError, match=told):
            engine.generate([[1]], SamplingParams(8), num_generations=2, seed=0)
    with pytest.raises(FloatingPointError, match="not finite"):
        GivenEngine(Saying(raises=FloatingPointError("not finite")), vocab_size=10).generate(
            [[1]], SamplingParams(8), num_generations=2, seed=0
        )
    for synced, told in (
        (OSError("no way"), r"the engine Saying raised OSError: no way .* in sync_weights$"),
        (WeightSyncError("half of it"), "^half of it$"),
        ([3], r"the engine Saying returned \[3\] \(list\) from sync_weights; return a dict of metrics, or \{\}"),
    ):
        with pytest.raises(WeightSyncError, match=told):
            GivenEngine(Saying(synced=synced), vocab_size=10).sync_weights(torch.nn.Linear(1, 1), 1)


def test_a_run_whose_own_engine_fails_keeps_what_it_has_learnt(tiny_config: Callable[..., Config], letters: Task) -> None:
    engine = Saying()

    def count(completions: list[str], **columns: Any) -> list[float]:
        return [float(place) for place in range(len(completions))]

    config = tiny_config(max_steps=4, save_steps=100)
    with GRPOTrainer(config, task=letters, reward_funcs=[count], engine=engine) as trainer:
        loop = trainer.steps()
        assert [next(loop).step, next(loop).step] == [1, 2]
        engine.raises = ConnectionError("gone")
        with pytest.raises(RolloutError, match="raised ConnectionError: gone"):
            next(loop)
    assert (config.output_dir / "checkpoint-2" / "manifest.json").exists()
