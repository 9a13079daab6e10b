from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.config import Config
from grpo_fast.metrics import PhaseTimer
from grpo_fast.rewards import RewardError, RewardPool
from grpo_fast.rollout.engine import SamplingParams
from grpo_fast.rollout.transformers_engine import TransformersEngine
from grpo_fast.tasks.stream import PromptStream
from grpo_fast.train.collect import Collected, Collector, describe, has_variance
from grpo_fast.train.episodes import OneTurn, Sampler
from grpo_fast.train.policy import Policy
from grpo_fast.types import Completion, Episode, Group, Prompt, Scored, TrainerState

Build = Callable[..., Collector]
PROMPTS = [Prompt(10 + i, f"{letter}=", (4 + i, 16), {"answer": letter}) for i, letter in enumerate("abcdefghi")]


def numbered(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """0, 1, 2, ... over a group: every group differs inside, whatever is sampled."""
    return [float(number % 4) for number in range(len(completions))]


def dead_for(letters: str) -> Callable[..., list[float]]:
    """Rewards without variance for prompts of these letters."""

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [0.5 if prompt[0] in letters else float(number % 4) for number, prompt in enumerate(prompts)]

    return reward


@pytest.fixture
def build(tiny_policy: Callable[..., Policy], tiny_config: Callable[..., Config]) -> Build:
    policy = tiny_policy()
    engine = TransformersEngine(policy.model, policy.tokenizer)

    def make(
        reward: Callable[..., Any] | Sequence[Callable[..., Any]] = numbered,
        *,
        prompts: Sequence[Prompt] = PROMPTS,
        on_error: str = "raise",
        sampler: Sampler | None = None,
        **settings: Any,
    ) -> Collector:
        config = tiny_config(shuffle=False, **settings)
        pool = RewardPool([reward] if callable(reward) else reward, workers=0, on_error=on_error)
        return Collector(config, sampler or OneTurn(engine), stream=PromptStream(prompts, seed=0, shuffle=False), rewards=pool)

    return make


def tokens(groups: Sequence[Group]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group.completions] for group in groups]


def test_a_step_has_p_groups_of_g_rewarded_completions(build: Build) -> None:
    timer = PhaseTimer()
    found = build().collect(1, timer)
    assert [group.prompt for group in found.groups] == PROMPTS[:3]
    assert all(len(group.completions) == 4 for group in found.groups)
    assert all(1 <= len(c.token_ids) <= 6 for group in found.groups for c in group.completions)
    assert [group.reward for group in found.groups] == [[0.0, 1.0, 2.0, 3.0]] * 3
    assert found.sampled == found.groups
    assert found.problems == []
    seconds = timer.lap()
    assert seconds["rollout"] > seconds["reward"] > 0
    assert "refilled_prompts" not in found.metrics


def test_draws_differ_by_step_and_repeat_with_the_seed(build: Build) -> None:
    one = PROMPTS[:1]
    first = tokens(build(prompts=one).collect(1, PhaseTimer()).groups)
    assert tokens(build(prompts=one).collect(1, PhaseTimer()).groups) == first
    assert tokens(build(prompts=one).collect(2, PhaseTimer()).groups) != first
    assert tokens(build(prompts=one, seed=1).collect(1, PhaseTimer()).groups) != first


def test_draws_differ_by_round(build: Build) -> None:
    found = build(dead_for("a"), prompts=PROMPTS[:1], refill_rounds=2, prompts_per_step=1).collect(1, PhaseTimer())
    assert len(found.sampled) == 3
    for one, other in itertools.combinations(tokens(found.sampled), 2):
        assert one != other


def test_refilling_replaces_dead_groups_and_the_metrics_stay_those_of_the_first_draw(build: Build) -> None:
    plain = build(dead_for("bd")).collect(1, PhaseTimer())
    found = build(dead_for("bd"), refill_rounds=3).collect(1, PhaseTimer())
    # b is dead; d takes its place and is dead too; then e
    assert [group.prompt.prompt[0] for group in found.sampled] == ["a", "b", "c", "d", "e"]
    assert [group.prompt.prompt[0] for group in found.groups] == ["a", "c", "e"]
    assert found.metrics.pop("refilled_prompts") == 2.0
    assert found.metrics == plain.metrics
    assert found.metrics["frac_reward_zero_std"] == pytest.approx(1 / 3)


def test_rewards_that_add_up_to_the_same_live_where_each_counts_by_itself(build: Build) -> None:
    def opposite(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [-value for value in numbered(prompts, completions)]

    summed = build([numbered, opposite], refill_rounds=1).collect(1, PhaseTimer())
    assert summed.metrics["frac_reward_zero_std"] == 1.0
    apart = build([numbered, opposite], refill_rounds=1, multi_objective_aggregation="normalize_then_sum")
    found = apart.collect(1, PhaseTimer())
    assert found.metrics["frac_reward_zero_std"] == 0.0
    assert found.metrics["refilled_prompts"] == 0.0


def test_what_refilling_cannot_replace_is_kept(build: Build) -> None:
    found = build(dead_for("abcdef"), refill_rounds=1).collect(1, PhaseTimer())
    assert [group.prompt.prompt[0] for group in found.groups] == ["a", "b", "c"]
    assert [group.prompt.prompt[0] for group in found.sampled] == ["a", "b", "c", "d", "e", "f"]
    partly = build(dead_for("abdf"), refill_rounds=1).collect(1, PhaseTimer())
    assert [group.prompt.prompt[0] for group in partly.groups] == ["c", "e", "a"]


def test_nothing_is_refilled_where_every_group_lives(build: Build) -> None:
    found = build(refill_rounds=3).collect(1, PhaseTimer())
    assert len(found.sampled) == 3
    assert found.metrics["refilled_prompts"] == 0.0


@pytest.mark.parametrize(("dead", "top_k"), [("", 0), ("bd", 6), ("abdf", 0)])
def test_what_is_collected_survives_json_exactly(dead: str, top_k: int, build: Build) -> None:
    found = build([dead_for(dead), nothing], refill_rounds=2, top_k=top_k).collect(1, PhaseTimer())
    assert all((completion.kept is not None) == bool(top_k) for group in found.sampled for completion in group.completions)
    found.problems.append("a call failed")
    again = Collected.from_dict(
        json.loads(json.dumps(found.to_dict())), {prompt.index: prompt for prompt in PROMPTS}.__getitem__
    )
    for one, other in ((again.groups, found.groups), (again.sampled, found.sampled)):
        assert [group.completions for group in one] == [group.completions for group in other]
        assert [group.reward for group in one] == [group.reward for group in other]
        assert [group.prompt for group in one] == [group.prompt for group in other]
        assert [[str(row) for row in group.rewards] for group in one] == [[str(row) for row in g.rewards] for g in other]
    assert str(again.metrics) == str(found.metrics)
    assert again.problems == found.problems
    assert all(any(group is other for other in again.sampled) for group in again.groups)


class Episodes(OneTurn):
    """Says of what was sampled that an environment had a part in it."""

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingParams, **options: Any) -> list[Group]:
        def episode(completion: Completion) -> Episode:
            said = tuple(place % 2 == 0 for place in range(len(completion.token_ids)))
            messages = ({"role": "assistant", "content": "a"}, {"role": "tool", "content": "b", "from": Path("c")})
            of_tools = {"judgements": (Scored([0.5]),), "num_tool_calls": 4, "num_tool_failures": 1}
            return Episode(said, messages, 2, 0.25, asked=({"role": "user", "content": "c"},), **of_tools)

        groups = super().sample(prompts, sampling, **options)
        return [
            replace(
                group,
                prompt=replace(group.prompt, token_ids=group.prompt.token_ids[:1]),
                completions=[replace(completion, episode=episode(completion)) for completion in group.completions],
            )
            for group in groups
        ]


def test_episodes_survive_json_and_are_counted(build: Build, tiny_policy: Callable[..., Policy]) -> None:
    policy = tiny_policy()
    sampler = Episodes(TransformersEngine(policy.model, policy.tokenizer))
    found = build(sampler=sampler).collect(1, PhaseTimer())
    again = Collected.from_dict(
        json.loads(json.dumps(found.to_dict())), {prompt.index: prompt for prompt in PROMPTS}.__getitem__
    )
    messages = ({"role": "assistant", "content": "a"}, {"role": "tool", "content": "b", "from": "c"})
    for group, saved in zip(found.groups, again.groups, strict=True):
        for completion, restored in zip(group.completions, saved.completions, strict=True):
            assert completion.episode is not None
            episode = replace(completion.episode, messages=messages, judgements=())  # which the rewards hold
            assert restored == replace(completion, episode=episode)
    assert [group.prompt for group in again.groups] == [group.prompt for group in found.groups]
    assert {len(group.prompt.token_ids) for group in again.groups} == {1}
    assert found.groups[0].asked(found.groups[0].completions[0]) == [{"role": "user", "content": "c"}]
    lengths = [(len(completion.token_ids) + 1) // 2 for group in found.groups for completion in group.completions]
    assert found.metrics["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert found.metrics["completions/max_length"] == max(lengths)
    assert found.metrics["num_turns/mean"] == found.metrics["num_turns/max"] == 2.0
    assert found.metrics["tools/call_frequency"] == 4.0
    assert found.metrics["tools/failure_frequency"] == 0.25


def nothing(completions: list[str], **columns: Any) -> list[None]:
    return [None] * len(completions)


def test_a_step_without_any_reward_is_told_once(build: Build) -> None:
    collector = build(nothing)
    told = [collector.collect(step, PhaseTimer()).problems for step in (1, 2)]
    assert [len(problems) for problems in told] == [1, 0]
    assert told[0] == ["reward functions gave None or NaN for every completion of step 1, so nothing is learnt from it"]
    assert build([nothing, numbered]).collect(1, PhaseTimer()).problems == []


def test_functions_are_told_apart_in_the_metrics(build: Build) -> None:
    metrics = build([numbered, nothing]).collect(1, PhaseTimer()).metrics
    assert metrics["rewards/numbered/mean"] == 1.5
    assert metrics["rewards/numbered/std"] == pytest.approx(math.sqrt(15 / 11))
    assert math.isnan(metrics["rewards/nothing/mean"])
    assert metrics["reward"] == 1.5


def logging(prompts: list[str], trainer_state: TrainerState, log_metric: Any, log_extra: Any, **columns: Any) -> list[float]:
    """Rewards of which those for ``b`` are dead."""
    log_metric("number", len(prompts))
    log_metric("kl", trainer_state.global_step)
    log_extra("letter", [prompt[0] for prompt in prompts])
    return dead_for("b")(prompts, prompts)


def test_what_functions_log_of_the_first_draw_is_measured_and_of_each_completion_shown(build: Build) -> None:
    found = build(logging, refill_rounds=1).collect(3, PhaseTimer())
    assert len(found.sampled) == 4
    assert found.logged == {"number": 12.0, "kl": 2.0}, "refilling, which asked for 4, is left out"
    assert found.logged.keys().isdisjoint(found.metrics)
    for group in found.sampled:
        group.advantages = [0.0] * 4
    assert [row["letter"] for row in found.samples(12)] == [letter for letter in "acd" for _ in range(4)]
    again = Collected.from_dict(
        json.loads(json.dumps(found.to_dict())), {prompt.index: prompt for prompt in PROMPTS}.__getitem__
    )
    assert [group.extra for group in again.sampled] == [group.extra for group in found.sampled]
    assert (again.metrics, again.logged) == (found.metrics, found.logged)


def test_reward_functions_are_told_how_far_the_run_is(build: Build) -> None:
    told: list[TrainerState] = []

    def asks(completions: list[str], trainer_state: TrainerState) -> list[float]:
        told.append(trainer_state)
        return [0.0] * len(completions)

    collector = build(asks, max_steps=7)
    for step in (1, 2, 3, 4):
        collector.collect(step, PhaseTimer())
    assert [(state.global_step, state.epoch) for state in told] == [(0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0)]
    assert {(state.max_steps, state.num_train_epochs) for state in told} == {(7, 3)}, "21 prompts are over 2 passes over 9"


def test_a_failing_reward_is_an_error_or_a_problem(build: Build) -> None:
    def fails(completions: list[str]) -> list[float]:
        raise LookupError("no such answer")

    with pytest.raises(RewardError, match="no such answer"):
        build(fails).collect(1, PhaseTimer())
    found = build(fails, on_error="none").collect(1, PhaseTimer())
    assert len(found.problems) == 1
    assert "no such answer" in found.problems[0]
    assert math.isnan(found.metrics["reward"])
    assert found.metrics["frac_reward_zero_std"] == 1.0


def answers(*lengths: int, cut: int = 0) -> list[Completion]:
    return [
        Completion((5,) * length, (-1.0,) * length, "length" if number < cut else "stop", "x")
        for number, length in enumerate(lengths)
    ]


def test_statistics_by_hand() -> None:
    groups = [
        Group(PROMPTS[0], answers(6, 2, 1, cut=1), [[1.0], [0.0], [math.nan]], [1.0, 0.0, math.nan]),
        Group(PROMPTS[1], answers(6, 3, 3, cut=1), [[0.5], [0.5], [0.5]], [0.5, 0.5, 0.5]),
    ]
    assert describe(groups) == pytest.approx(
        {
            "reward": 0.5,
            "reward_std": math.sqrt(0.5) / 2,
            "frac_reward_zero_std": 0.5,
            "frac_reward_all_wrong": 0.0,
            "completions/mean_length": 3.5,
            "completions/min_length": 1.0,
            "completions/max_length": 6.0,
            "completions/clipped_ratio": 1 / 3,
            "completions/mean_terminated_length": 2.25,
            "completions/min_terminated_length": 1.0,
            "completions/max_terminated_length": 3.0,
        }
    )


def test_groups_without_a_right_answer_are_counted() -> None:
    rewards = [[0.0, 0.0], [0.0, 1.0], [-1.0, math.nan], [math.nan, math.nan]]
    groups = [Group(PROMPTS[0], answers(3, 3), [[value] for value in row], row) for row in rewards]
    assert describe(groups)["frac_reward_all_wrong"] == 0.5
    assert describe(groups, least_reward=-1.0)["frac_reward_all_wrong"] == 0.25


def test_statistics_where_everything_is_cut_and_nothing_is_known() -> None:
    metrics = describe([Group(PROMPTS[0], answers(6, 6, cut=2), [[math.nan]] * 2, [math.nan, math.nan])])
    assert math.isnan(metrics["reward"])
    assert metrics["reward_std"] == 0.0
    assert metrics["frac_reward_zero_std"] == 1.0
    assert metrics["completions/clipped_ratio"] == 1.0
    assert "completions/mean_terminated_length" not in metrics


@pytest.mark.parametrize(
    ("rewards", "alive"),
    [
        ([0.0, 1.0], True),
        ([1.0, 1.0], False),
        ([1.0, math.nan], False),
        ([1.0, math.nan, 0.5], True),
        ([math.nan, math.nan], False),
        ([0.0, -0.0], False),
    ],
)
def test_variance_is_among_known_rewards(rewards: list[float], alive: bool) -> None:
    assert has_variance(Group(PROMPTS[0], answers(*[1] * len(rewards)), [], rewards)) is alive
    each = [[0.5, value, -value] for value in rewards]
    group = Group(PROMPTS[0], answers(*[1] * len(rewards)), each, [0.5] * len(rewards))
    assert has_variance(group) is False
    assert has_variance(group, weights=(1.0, 0.1, 0.0)) is alive
    assert has_variance(group, weights=(1.0, 0.0, 0.0)) is False, "a reward without weight teaches nothing"
