from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grpo_fast.rewards import resolve_reward
from grpo_fast.tasks.countdown import (
    NUM_NUMBERS,
    NUMBER_RANGE,
    TARGET_RANGE,
    countdown_reward,
    countdown_task,
    given_expression,
    is_held_out,
    reaches,
)


@pytest.mark.parametrize("chat", [False, True])
def test_every_problem_has_a_solution(chat: bool) -> None:
    task = countdown_task(size=150, eval_size=40, seed=1, chat=chat)
    assert (len(task.train), len(task.eval)) == (150, 40)
    for row in [*task.train, *task.eval]:
        assert NUM_NUMBERS[0] <= len(row["numbers"]) <= NUM_NUMBERS[1]
        assert all(NUMBER_RANGE[0] <= number <= NUMBER_RANGE[1] for number in row["numbers"])
        assert TARGET_RANGE[0] <= row["target"] <= TARGET_RANGE[1]
        text = row["prompt"][0]["content"] if chat else row["prompt"]
        assert isinstance(row["prompt"], list if chat else str)
        assert str(row["target"]) in text
        assert ", ".join(map(str, row["numbers"])) in text
        answer = f"So <answer>{row['solution']}</answer>"
        completion = [{"role": "assistant", "content": answer}] if chat else answer
        assert countdown_reward([completion], numbers=[row["numbers"]], target=[row["target"]]) == [1.0]


def test_the_reward_is_found_by_its_name() -> None:
    task = countdown_task(size=1, eval_size=0, seed=0, chat=False)
    assert resolve_reward(task.reward_funcs[0]).function is countdown_reward
    assert task.eval_reward == task.reward_funcs[0]


def test_the_seed_decides_the_problems_and_no_seed_trains_on_what_is_held_out() -> None:
    one, same, other = (countdown_task(size=60, eval_size=20, seed=seed, chat=False) for seed in (5, 5, 6))
    assert one == same
    assert one.train != other.train
    assert all(is_held_out(row["numbers"][::-1], row["target"]) for task in (one, other) for row in task.eval)
    assert not any(is_held_out(row["numbers"], row["target"]) for task in (one, other) for row in task.train)


@pytest.mark.parametrize(("size", "eval_size"), [(0, 1), (1, -1)])
def test_refuses_impossible_sizes(size: int, eval_size: int) -> None:
    with pytest.raises(ValueError, match=f"size={size}"):
        countdown_task(size=size, eval_size=eval_size, seed=0, chat=False)


@pytest.mark.parametrize(
    ("expression", "right"),
    [
        ("(20 / 5) * 3", True),
        ("20/5*3", True),
        ("3 * 20 / 5", True),
        ("20 - 5 - 3", True),
        ("\u221220 + 5", False),
        ("12", False),
        ("3 * 4", False),
        ("3*20/5*1", False),
        ("3*20/5 + 20 - 20", False),
        ("-3 + 20 - 5", False),
        ("3.0 * 20 / 5", False),
        ("3 ** 20 / 5", False),
        ("3 // 20 * 5", False),
        ("(3)(20/5)", False),
        ("20 / (5 - 5) * 3", False),
        ("", False),
        ("()", False),
        ("(20 / 5) * 3)", False),
        ("__import__('os').system('true')", False),
        ("[20/5*3][0]", False),
        ("20/5*3 if 1 else 0", False),
        ("20/5*0x3", False),
        ("2_0/5*3", False),
    ],
)
def test_only_arithmetic_with_each_number_once_counts(expression: str, right: bool) -> None:
    assert reaches(expression, numbers=[3, 5, 20], target=12) is right


def test_division_is_exact_and_zero_division_is_wrong() -> None:
    assert reaches("8 / (3 - 8 / 3)", numbers=[8, 8, 3, 3], target=24)
    assert not reaches("1 / (2 - 2)", numbers=[1, 2, 2], target=1)


@pytest.mark.parametrize(
    ("completion", "expression"),
    [
        ("<answer>1 + 2</answer>", "1 + 2"),
        ("<answer>9</answer> wait <answer> 1 + 2 = 3 </answer> done", "1 + 2"),
        ("thinking\n1 \u00d7 2 \u00f7 3 \u2212 4\n", "1 * 2 / 3 - 4"),
        ("", ""),
        ("\n \n", ""),
    ],
)
def test_finds_the_expression(completion: str, expression: str) -> None:
    assert given_expression(completion) == expression


@given(st.text(alphabet="0123456789+-*/() .\n", max_size=80) | st.text(max_size=40))
@example("(" * 150 + ")" * 50)
@example("9" * 199)
@example("-" * 199 + "1")
@example("(" * 10**6)
@example("9**9**9**9")
@example("1\x00+1")
@example("\u0663+1")
def test_any_text_is_scored(text: str) -> None:
    begun = time.process_time()
    assert countdown_reward([text, f"<answer>{text}</answer>"], numbers=[[3, 5, 20]] * 2, target=[-1000] * 2) == [0.0, 0.0]
    assert time.process_time() - begun < 10
