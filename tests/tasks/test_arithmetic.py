from __future__ import annotations

import random

import pytest

from grpo_fast.tasks.arithmetic import (
    arithmetic_accuracy,
    arithmetic_task,
    draw_problem,
    given_answer,
    is_held_out,
    problem_prompt,
)


def test_every_answer_is_the_sum_that_its_prompt_asks_for():
    task = arithmetic_task(size=500, eval_size=200, seed=3)
    assert (len(task.train), len(task.eval)) == (500, 200)
    for row in [*task.train, *task.eval]:
        first, second = row["prompt"].removesuffix("=").split("+")
        assert len(first) == len(second) == 3
        assert row["answer"] == str(int(first) + int(second))


def test_rows_are_a_function_of_seed_and_index():
    assert arithmetic_task(size=20, eval_size=5, seed=1) == arithmetic_task(size=20, eval_size=5, seed=1)
    longer, shorter = arithmetic_task(size=50, eval_size=9, seed=1), arithmetic_task(size=20, eval_size=5, seed=1)
    assert longer.train[:20] == shorter.train
    assert longer.eval[:5] == shorter.eval
    assert arithmetic_task(size=20, eval_size=5, seed=2).train != shorter.train
    assert draw_problem(1, index=7, split="train") == draw_problem(1, index=7, split="train")


def test_no_seed_trains_on_what_another_evaluates():
    def problems(rows):
        return {frozenset(row["prompt"].removesuffix("=").split("+")) for row in rows}

    trained = set().union(*(problems(arithmetic_task(size=2000, eval_size=0, seed=seed).train) for seed in range(4)))
    held_out = set().union(*(problems(arithmetic_task(size=1, eval_size=1000, seed=seed).eval) for seed in range(4)))
    assert len(trained) > 7000
    assert len(held_out) > 3000
    assert not trained & held_out


def test_one_problem_in_eight_is_held_out_whichever_summand_comes_first():
    rng = random.Random(0)
    pairs = [(rng.randrange(100, 1000), rng.randrange(100, 1000)) for _ in range(4000)]
    assert all(is_held_out(first, second) == is_held_out(second, first) for first, second in pairs)
    assert sum(is_held_out(*pair) for pair in pairs) / len(pairs) == pytest.approx(1 / 8, abs=0.02)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("#933", 1.0),
        ("7+6=13,4+8+1=13,3+5+1=9#933", 1.0),
        ("#823#933", 1.0),
        ("#933\n", 1.0),
        ("#823", 0.0),
        ("#0933", 0.0),
        ("#933#823", 0.0),
        ("#9330", 0.0),
        ("#933.", 0.0),
        ("# 933", 0.0),
        ("#-933", 0.0),
        ("933", 0.0),
        ("7+6=13,4+8+1=13,3+5+1=9#", 0.0),
        ("", 0.0),
    ],
)
def test_only_an_exact_answer_after_the_last_mark_is_rewarded(completion, reward):
    assert arithmetic_accuracy([problem_prompt(347, 586)], [completion], answer=["933"], index=[0]) == [reward]


def test_rewards_keep_the_order_of_the_completions():
    assert arithmetic_accuracy(["a", "b", "c"], ["#1", "#2", "#3"], answer=["1", "0", "3"]) == [1.0, 0.0, 1.0]


def test_completions_without_an_answer_each_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        arithmetic_accuracy(["a", "b"], ["#1", "#2"], answer=["1"])


def test_given_answer_reads_the_digits_after_the_last_mark():
    assert given_answer("1+1=2#20#31 \n") == "31"
    assert given_answer("31") is None


@pytest.mark.parametrize(("size", "eval_size"), [(0, 1), (-1, 1), (1, -1)])
def test_sizes_that_make_no_task_are_refused(size, eval_size):
    with pytest.raises(ValueError, match=f"size={size}"):
        arithmetic_task(size=size, eval_size=eval_size, seed=0)
