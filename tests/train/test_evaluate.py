from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from grpo_fast.config import Config
from grpo_fast.metrics import PhaseTimer
from grpo_fast.rollout.engine import SamplingParams
from grpo_fast.tasks.task import Task
from grpo_fast.train import evaluate as of_policies
from grpo_fast.train.parts import Parts, build_parts
from grpo_fast.train.rng import derive_seed
from grpo_fast.types import TrainerState


def evaluate(config: Config, parts: Parts, state: TrainerState | None = None) -> dict[str, float]:
    """Where every reward call succeeds."""
    return of_policies.evaluate(config, parts, state, tell=_nothing)


def probe(config: Config, parts: Parts, timer: PhaseTimer) -> of_policies.Baseline:
    return of_policies.probe(config, parts, timer, tell=_nothing)


def _nothing(event: str, message: str) -> None:
    pytest.fail(f"{event}: {message}")


@pytest.fixture
def build(tiny_config: Callable[..., Config], letters: Task) -> Iterator[Callable[..., tuple[Config, Parts]]]:
    opened: list[Parts] = []

    def make(rows: list[dict[str, Any]] | None = None, **settings: Any) -> tuple[Config, Parts]:
        functions = settings.pop("reward_funcs_of_task", None)
        config = tiny_config(output_dir=settings.pop("output_dir", "unused"), **settings)
        held_out = letters.eval if rows is None else rows
        measure = letters.eval_reward if functions is None else None
        task = Task("letters", letters.train, held_out, functions or letters.reward_funcs, measure)
        opened.append(build_parts(config, {"task": task}, resume=False))
        return config, opened[-1]

    yield make
    for parts in opened:
        parts.close()


def greedy(config: Config, parts: Parts) -> list[str]:
    sampling = SamplingParams(max_tokens=config.max_completion_length, temperature=0.0)
    answers = parts.engine.generate([p.token_ids for p in parts.eval_prompts], sampling, num_generations=1, seed=99)
    return [completions[0].text for completions in answers]


def test_value_is_the_share_of_right_greedy_answers(build: Callable[..., tuple[Config, Parts]]) -> None:
    config, parts = build()
    said = greedy(config, parts)
    assert len(said) == config.eval_size == 4
    right = [
        {"prompt": p.prompt, "answer": text if i % 4 else "no"}
        for i, (p, text) in enumerate(zip(parts.eval_prompts, said, strict=True))
    ]
    config, parts = build(right)
    assert evaluate(config, parts)["eval_reward"] == pytest.approx(sum(bool(text) for text in said[1:]) / 4)
    assert evaluate(config, parts)["eval_reward"] > 0


def test_sampling_settings_and_seed_do_not_matter(build: Callable[..., tuple[Config, Parts]]) -> None:
    config, parts = build()
    rows = [{"prompt": p.prompt, "answer": text} for p, text in zip(parts.eval_prompts, greedy(config, parts), strict=True)]
    values = {
        evaluate(*build(rows, **settings))["eval_reward"] for settings in ({}, {"temperature": 3.0}, {"seed": 5}, {"top_k": 2})
    }
    assert len(values) == 1


def test_answers_may_be_sampled_and_several(build: Callable[..., tuple[Config, Parts]]) -> None:
    config, parts = build(eval_temperature=1.5, num_generations_eval=3, top_k=5)
    asked: list[tuple[SamplingParams, int]] = []
    seeds: set[int] = set()
    scored: list[list[str]] = []
    generate, score = parts.engine.generate, parts.eval_rewards.score

    def listening(prompts: Any, sampling: SamplingParams, *, num_generations: int, seed: int) -> Any:
        asked.append((sampling, num_generations))
        seeds.add(seed)
        return generate(prompts, sampling, num_generations=num_generations, seed=seed)

    def halves(groups: list[Any], state: Any) -> Any:
        scored.extend([completion.text for completion in group.completions] for group in groups)
        report = score(groups, state)
        for group in groups:
            group.reward = [0.0, 0.5, 1.0]
        return report

    parts.engine.generate, parts.eval_rewards.score = listening, halves  # type: ignore[method-assign]
    assert evaluate(config, parts) == evaluate(config, parts) == {"eval_reward": 0.5}
    assert asked[0] == (SamplingParams(config.max_completion_length, temperature=1.5, top_k=5), 3)
    assert len(scored) == 2 * config.eval_size
    assert scored[: config.eval_size] == scored[config.eval_size :], "the same draws each time"
    assert any(len(set(texts)) > 1 for texts in scored)
    [seed] = seeds
    turns = {seed, *(derive_seed(seed, turn) for turn in range(1, 9))}  # as episodes have them
    assert not turns & {derive_seed(config.seed, step, round_) for step in range(1, 99) for round_ in range(9)}


def test_stop_strings_hold_for_held_out_prompts_too(build: Callable[..., tuple[Config, Parts]]) -> None:
    config, parts = build()
    first = greedy(config, parts)[0]
    config, stopped = build(stop=(first[2],))
    answers: list[str] = []
    score = stopped.eval_rewards.score
    stopped.eval_rewards.score = lambda groups, state: answers.extend(g.completions[0].text for g in groups) or score(groups)  # type: ignore[method-assign]
    evaluate(config, stopped)
    assert answers[0] == first[: first.index(first[2])]


def test_without_held_out_prompts_or_rewards_there_is_no_value(build: Callable[..., tuple[Config, Parts]]) -> None:
    assert math.isnan(evaluate(*build([]))["eval_reward"])
    assert math.isnan(evaluate(*build([{"prompt": "ab=", "answer": None}]))["eval_reward"])


def test_answers_without_a_reward_are_left_out_of_the_mean(build: Callable[..., tuple[Config, Parts]]) -> None:
    config, parts = build([{"prompt": "ab=", "answer": None}, {"prompt": "ab=", "answer": "not this"}])
    assert evaluate(config, parts) == {"eval_reward": 0.0}


def test_without_a_measure_of_its_own_a_task_is_measured_by_what_rewards_training(tiny_config: Callable[..., Config]) -> None:
    rows = [{"prompt": f"{a}{b}=", "answer": a} for a in "abcdefgh" for b in "abcd"]

    def length(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    def one(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    for functions, weights in (([length], ()), ([one, length], (0.5, 0.25))):
        config = tiny_config(reward_weights=weights)
        parts = build_parts(config, {"train_dataset": rows, "reward_funcs": functions}, resume=False)
        mean = sum(map(len, greedy(config, parts))) / config.eval_size
        expected = {"eval_reward": mean}
        if weights:
            expected = {"eval_reward": 0.5 + 0.25 * mean, "eval_rewards/one/mean": 1.0, "eval_rewards/length/mean": mean}
        assert evaluate(config, parts) == pytest.approx(expected)
        assert mean > 0
        parts.close()


def test_what_rewards_log_is_told_of_the_evaluation(tiny_config: Callable[..., Config]) -> None:
    rows = [{"prompt": f"{a}{b}=", "answer": a} for a in "abcdefgh" for b in "abcd"]

    def logs(completions: list[str], trainer_state: TrainerState, log_metric: Any, **columns: Any) -> list[float]:
        log_metric("number", len(completions))
        log_metric("reward", trainer_state.global_step)
        return [0.5] * len(completions)

    config = tiny_config()
    parts = build_parts(config, {"train_dataset": rows, "reward_funcs": [logs]}, resume=False)
    expected = {"eval_reward": 0.5, "eval_number": float(config.eval_size)}
    assert evaluate(config, parts, TrainerState(global_step=4)) == expected | {"eval_logged/reward": 4.0}
    assert evaluate(config, parts) == expected | {"eval_logged/reward": 0.0}
    parts.close()


def test_a_probe_asks_training_prompts_once_each_and_is_charged_for(
    build: Callable[..., tuple[Config, Parts]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, parts = build(baseline_probe=7, temperature=1.5)
    asked: list[tuple[Any, Any, dict[str, int]]] = []
    generate = parts.engine.generate

    def listen(prompts: Any, sampling: Any, **options: int) -> Any:
        asked.append((prompts, sampling, options))
        return generate(prompts, sampling, **options)

    monkeypatch.setattr(parts.engine, "generate", listen)
    timer, before = PhaseTimer(), parts.stream.state_dict()
    found = probe(config, parts, timer)
    ((prompts, sampling, options),) = asked
    known = [prompt.token_ids for prompt in parts.prompts]
    assert len({known.index(tokens) for tokens in prompts}) == 7
    assert (sampling.temperature, options["num_generations"]) == (1.5, 1)
    assert found.num_prompts == 7
    assert parts.stream.state_dict() == before, "training reads the same prompts with and without a probe"
    metrics = parts.meter.metrics()
    assert metrics["tokens/prompt"] == sum(map(len, prompts))
    assert metrics["flops/decode"] > 0
    assert timer.lap()["rollout"] > 0
    assert probe(config, parts, timer) == found


def test_a_probe_is_scored_by_the_training_rewards(build: Callable[..., tuple[Config, Parts]]) -> None:
    config, parts = build(baseline_probe=1000, reward_funcs=("exact_match", "format"), reward_weights=(0.0, 0.25))
    groups = []
    score = parts.rewards.score
    parts.rewards.score = lambda rows, state: groups.extend(rows) or score(rows)  # type: ignore[assignment, func-returns-value]
    found = probe(config, parts, PhaseTimer())
    assert found.num_prompts == len(parts.prompts) == len(groups)
    assert found.reward == pytest.approx(sum(group.reward[0] for group in groups) / len(groups))


def test_calls_that_failed_are_told(build: Callable[..., tuple[Config, Parts]]) -> None:
    def fails(completions: list[str], **columns: object) -> list[float]:
        raise ValueError("the judge is gone")

    config, parts = build(reward_on_error="none", reward_funcs_of_task=[fails])
    told: list[tuple[str, str]] = []
    assert math.isnan(of_policies.evaluate(config, parts, tell=lambda *words: told.append(words))["eval_reward"])
    assert math.isnan(of_policies.probe(config, parts, PhaseTimer(), tell=lambda *words: told.append(words)).reward)
    assert {event for event, _ in told} == {"warn"}
    assert len(told) == 2
    assert all("the judge is gone" in message for _, message in told)
