from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch

from grpo_fast.config import Config
from grpo_fast.rewards import RewardError, RewardPool
from grpo_fast.rollout.engine import RolloutError, SamplingParams
from grpo_fast.rollout.transformers_engine import TransformersEngine
from grpo_fast.train import shares
from grpo_fast.train.distributed import World
from grpo_fast.train.policy import Policy
from grpo_fast.train.shares import MainEngine, SharedEngine, SharedRewards, idle_ranks
from grpo_fast.types import Completion, Group, TrainerState

T = TypeVar("T")
SAMPLING = SamplingParams(max_tokens=5)
PROMPTS = [[4, 5], [6], [7, 8, 9], [10, 4], [5]]


class ThreadWorld(World):
    """A rank that is a thread, and exchanges through a list."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(board))
        self._board = board
        self._barrier = barrier

    def gather(self, make: Callable[[], T]) -> list[T]:
        try:
            self._board[self.rank] = make()
        except Exception as error:
            self._board[self.rank] = error
        self._barrier.wait()
        told = list(self._board)
        self._barrier.wait()
        for one in told:
            if isinstance(one, Exception):
                raise one
        return told

    def once(self, make: Callable[[], T]) -> T:
        return self.gather(make if self.is_main else lambda: None)[0]  # type: ignore[return-value]


def on_ranks(count: int, work: Callable[[World], T]) -> list[T | Exception]:
    """What ``work`` gives or raises on each of several ranks."""
    board, barrier = [None] * count, threading.Barrier(count, timeout=60)
    found: list[Any] = [None] * count

    def run(rank: int) -> None:
        try:
            found[rank] = work(ThreadWorld(rank, board, barrier))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("count", [2, 3, 7])
def test_ranks_sample_together_what_one_would(count: int, tiny_policy: Callable[..., Policy]) -> None:
    policies = [tiny_policy() for _ in range(count)]
    engines = [TransformersEngine(policy.model, policy.tokenizer) for policy in policies]
    expected = engines[0].generate(PROMPTS, SAMPLING, num_generations=3, seed=11)

    def sample(world: World) -> list[list[Completion]]:
        engine = SharedEngine(engines[world.rank], world)
        engine.sync_weights(policies[world.rank].model, 4)
        return engine.generate(PROMPTS, SAMPLING, num_generations=3, seed=11)

    for found in on_ranks(count, sample):
        assert not isinstance(found, Exception)
        assert [[c.token_ids for c in group] for group in found] == [[c.token_ids for c in group] for group in expected]
        assert {c.weight_version for group in found for c in group} == {4}


class Counting:
    """An engine that counts its calls, and fails when told."""

    def __init__(self, *, broken: bool = False) -> None:
        self.calls = 0
        self.closed = False
        self.sleeps = False
        self.broken = broken

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, **_: Any) -> list[list[Completion]]:
        self.calls += 1
        if self.broken:
            raise RolloutError("the server is gone")
        return [[Completion((1,), (0.0,), "stop", str(len(prompt)))] for prompt in prompts]

    def sync_weights(self, policy: torch.nn.Module, version: int) -> dict[str, float]:
        return {"sync/version": float(version)}

    def sleep(self) -> None:
        if self.broken:
            raise RolloutError("the server is gone")
        self.sleeps = True

    def close(self) -> None:
        self.closed = True


def test_servers_are_spoken_to_by_rank_0() -> None:
    engines: list[Counting] = []

    def build() -> Counting:
        engines.append(Counting())
        return engines[-1]

    def use(world: World) -> Any:
        engine = MainEngine(build, world)
        found = engine.generate(PROMPTS, SAMPLING, num_generations=1, seed=1), engine.sync_weights(torch.nn.Module(), 3)
        engine.sleep()
        engine.close()
        return found

    first, second = on_ranks(2, use)
    assert first == second
    assert first[1] == {"sync/version": 3.0}
    assert [[c.text for c in group] for group in first[0]] == [[str(len(prompt))] for prompt in PROMPTS]
    assert [(engine.calls, engine.sleeps, engine.closed) for engine in engines] == [(1, True, True)]


def test_every_rank_makes_room_before_servers_that_sleep_wake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's GPUs are those of several ranks, and each process alone can give back what it holds of its own."""
    told: list[str] = []
    monkeypatch.setattr(shares, "free_unused", lambda: told.append("room"))

    class Waking(Counting):
        def sync_weights(self, policy: torch.nn.Module, version: int) -> dict[str, float]:
            told.append(f"sync {version}")
            return super().sync_weights(policy, version)

    def use(world: World) -> None:
        engine = MainEngine(Waking, world)
        engine.sync_weights(torch.nn.Module(), 1)
        engine.sleep()
        engine.sync_weights(torch.nn.Module(), 2)
        engine.sync_weights(torch.nn.Module(), 3)

    on_ranks(3, use)
    assert told == ["sync 1", "room", "room", "room", "sync 2", "sync 3"]


@pytest.mark.parametrize("broken", [0, 1])
def test_an_engine_that_fails_on_one_rank_fails_on_all(broken: int) -> None:
    def use(world: World) -> Any:
        engine = SharedEngine(Counting(broken=world.rank == broken), world)
        return engine.generate(PROMPTS, SAMPLING, num_generations=1, seed=1)

    assert [str(error) for error in on_ranks(2, use)] == ["the server is gone"] * 2


def test_ranks_go_to_sleep_together_or_fail_together() -> None:
    engines = [Counting() for _ in range(2)]
    on_ranks(2, lambda world: SharedEngine(engines[world.rank], world).sleep())
    assert [engine.sleeps for engine in engines] == [True, True]
    engines[1].broken = True
    told = on_ranks(2, lambda world: SharedEngine(engines[world.rank], world).sleep())
    assert [str(error) for error in told] == ["the server is gone"] * 2


def test_a_rank_without_prompts_asks_nothing() -> None:
    engines = [Counting() for _ in range(3)]

    def use(world: World) -> Any:
        return SharedEngine(engines[world.rank], world).generate(PROMPTS[:2], SAMPLING, num_generations=1, seed=1)

    assert all(not isinstance(found, Exception) for found in on_ranks(3, use))
    assert sorted(engine.calls for engine in engines) == [0, 1, 1]


def test_rewards_of_all_ranks_are_those_of_one(make_group: Callable[..., Group]) -> None:
    def lengths(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        return [None if len(ids) == 4 else float(len(ids)) for ids in completion_ids]

    def groups() -> list[Group]:
        return [make_group(index, [0.0] * 3) for index in range(5)]

    def score(world: World) -> Any:
        rewards = SharedRewards(RewardPool([lengths], weights=[0.5], workers=0), world)
        rewards.start()
        own = groups()
        report = rewards.score(own)
        rewards.close()
        return [group.reward for group in own], report

    alone = groups()
    report = RewardPool([lengths], weights=[0.5], workers=0).score(alone)
    assert report.nones["lengths"] > 0
    for found in on_ranks(3, score):
        assert not isinstance(found, Exception)
        assert str(found[0]) == str([group.reward for group in alone])
        assert found[1] == report


def test_what_is_logged_on_any_rank_is_known_to_all(make_group: Callable[..., Group]) -> None:
    def logs(
        completions: list[str], trainer_state: TrainerState, log_metric: Any, log_extra: Any, environment_rewards: Any
    ) -> list[float]:
        log_metric("global mean", sum(range(len(completions))) / len(completions))
        if trainer_state.is_world_process_zero:
            log_metric("of the main process", trainer_state.global_step)
        else:
            log_extra("elsewhere", range(len(completions)))
        log_extra("everywhere", ["x"] * len(completions))
        return [1.0] * len(completions)

    def score(world: World) -> Any:
        rewards = SharedRewards(RewardPool([logs], workers=0), world)
        own = [make_group(index, [0.0] * 2) for index in range(5)]
        return rewards.score(own, TrainerState(global_step=6)).logged, [group.extra for group in own]

    by_rank = [1, 2, 2]  # groups, of two completions each
    mean = sum(2 * groups * (2 * groups - 1) / 2 for groups in by_rank) / 10
    for found in on_ranks(3, score):
        assert not isinstance(found, Exception)
        logged, extra = found
        assert logged == {"global mean": pytest.approx(mean), "of the main process": 6.0}
        assert [columns["everywhere"] for columns in extra] == [["x", "x"]] * 5
        assert [columns["elsewhere"] for columns in extra] == [[None, None], [0, 1], [2, 3], [0, 1], [2, 3]]


def test_a_reward_that_fails_is_told_on_all_ranks_or_counted(make_group: Callable[..., Group]) -> None:
    def picky(completions: list[str], **columns: Any) -> list[float]:
        if threading.current_thread() is not first:
            raise ValueError("not here")
        return [1.0] * len(completions)

    first = threading.current_thread()

    def score(world: World, on_error: Any) -> Any:
        rewards = SharedRewards(RewardPool([picky], workers=0, on_error=on_error), world)
        return rewards.score([make_group(index, [0.0] * 2) for index in range(4)])

    raised = on_ranks(2, lambda world: score(world, "raise"))
    assert all(isinstance(error, RewardError) and "not here" in str(error) for error in raised)
    counted = on_ranks(2, lambda world: score(world, "none"))
    assert [report.errors for report in counted] == [{"picky": 2}] * 2  # type: ignore[union-attr]
    assert [len(report.problems) for report in counted] == [2, 2]  # type: ignore[union-attr]


def test_only_ranks_without_a_prompt_are_idle() -> None:
    assert idle_ranks(Config(prompts_per_step=4), 4) == []
    [told] = idle_ranks(Config(prompts_per_step=4), 6)
    assert told.startswith("prompts_per_step=4 with 6 ranks: in each step 2 sample nothing")
