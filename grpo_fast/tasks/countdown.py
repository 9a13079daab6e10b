"""Countdown: reach a target from a few numbers with ``+ - * /``, each number used exactly once.

A problem is a function of (seed, split, index). Numbers and a random expression of them are drawn until its value is a target
in range, so that every problem can be solved. Which problems are held out is decided by the problem alone: no seed trains on
what another evaluates.
"""

from __future__ import annotations

import ast
import operator
import random
import re
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal

from grpo_fast.rewards.functions import completion_text
from grpo_fast.tasks.task import Task
from grpo_fast.tasks.wording import ANSWER_TAGS, ask, tagged_answer

NUM_NUMBERS = (3, 4)
"""Fewest and most numbers of a problem."""
NUMBER_RANGE = (1, 99)
"""Least and greatest number of a problem."""
TARGET_RANGE = (10, 99)
"""Least and greatest target."""

_HELD_OUT_ONE_IN = 8
_MAX_EXPRESSION_CHARACTERS = 200
_ALLOWED = re.compile(r"[\d+\-*/()\s]+")
_SIGNS = str.maketrans({"\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-", "\u2013": "-"})
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def countdown_task(*, size: int, eval_size: int, seed: int, chat: bool) -> Task:
    """Generated Countdown problems.

    Args:
        size: rows trained on.
        eval_size: rows held out; 0 for none.
        seed: decides which problems are drawn.
        chat: whether prompts are messages.

    Returns:
        Rows of ``prompt``, ``numbers`` (list of int), ``target`` (int) and ``solution`` (one expression that reaches it).

    Raises:
        ValueError: ``size`` below 1 or ``eval_size`` below 0.
    """
    if size < 1 or eval_size < 0:
        raise ValueError(f"size={size} must be at least 1 and eval_size={eval_size} at least 0")
    reward = "grpo_fast.tasks.countdown:countdown_reward"
    return Task(
        name="countdown",
        train=[_row(seed, split="train", index=index, chat=chat) for index in range(size)],
        eval=[_row(seed, split="eval", index=index, chat=chat) for index in range(eval_size)],
        reward_funcs=(reward,),
        eval_reward=reward,
        reward_range=(0.0, 1.0),
    )


def countdown_reward(
    completions: Sequence[Any], numbers: Sequence[Sequence[int]], target: Sequence[int], **columns: Any
) -> list[float]:
    """1.0 where the given expression uses each number exactly once and equals the target, else 0.0.

    The expression is what stands in the last ``<answer>...</answer>``, or else the last line; what follows an equals sign is
    left out. It may hold integers, ``+ - * /`` and parentheses; anything else is worth 0.0. Nothing is executed.

    Args:
        completions: N texts, or N message lists.
        numbers: N lists of the numbers to use.
        target: N targets.
        columns: not read.

    Returns:
        N rewards.
    """
    return [
        float(reaches(given_expression(completion_text(completion)), numbers=own, target=goal))
        for completion, own, goal in zip(completions, numbers, target, strict=True)
    ]


def given_expression(text: str) -> str:
    """The expression that a completion gives as its answer; empty where it gives none."""
    tagged = tagged_answer(text)
    lines = text.strip().splitlines()
    given = tagged if tagged is not None else (lines[-1] if lines else "")
    return given.partition("=")[0].translate(_SIGNS).strip()


def reaches(expression: str, *, numbers: Sequence[int], target: int) -> bool:
    """Whether an expression uses exactly these numbers and equals the target.

    Safe on any text: bounded in length, parsed but never executed, and computed only once its numbers are known to be the
    given ones.
    """
    if len(expression) > _MAX_EXPRESSION_CHARACTERS or not _ALLOWED.fullmatch(expression):
        return False
    try:
        tree = ast.parse(expression, mode="eval").body
        return sorted(_leaves(tree)) == sorted(numbers) and _value(tree) == target
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return False


def draw_problem(seed: int, *, split: Literal["train", "eval"], index: int) -> tuple[list[int], int, str]:
    """One problem; equal arguments draw equal problems.

    Returns:
        Its numbers, its target, and an expression that reaches it.
    """
    rng = random.Random(f"countdown/{seed}/{split}/{index}")
    while True:
        numbers = [rng.randint(*NUMBER_RANGE) for _ in range(rng.randint(*NUM_NUMBERS))]
        solution, value = _random_expression(numbers, rng)
        if value is None or value.denominator != 1 or not TARGET_RANGE[0] <= value <= TARGET_RANGE[1]:
            continue
        if is_held_out(numbers, int(value)) == (split == "eval"):
            return numbers, int(value), solution


def is_held_out(numbers: Sequence[int], target: int) -> bool:
    """Whether a problem belongs to evaluation: one in eight does, in whatever order the numbers are given."""
    return zlib.crc32(f"{sorted(numbers)}={target}".encode()) % _HELD_OUT_ONE_IN == 0


def problem_text(numbers: Sequence[int], target: int) -> str:
    """The problem in words."""
    listed = ", ".join(map(str, numbers))
    return (
        f"Write an arithmetic expression that equals {target}. Use each of the numbers {listed} exactly once, and only "
        f"+, -, *, / and parentheses. {ANSWER_TAGS}\nFor 3, 5, 20 and the target 12, for example: <answer>(20 / 5) * 3</answer>"
    )


def _row(seed: int, *, split: Literal["train", "eval"], index: int, chat: bool) -> dict[str, Any]:
    numbers, target, solution = draw_problem(seed, split=split, index=index)
    prompt = ask(problem_text(numbers, target), chat=chat)
    return {"prompt": prompt, "numbers": numbers, "target": target, "solution": solution}


def _random_expression(numbers: Sequence[int], rng: random.Random) -> tuple[str, Fraction | None]:
    """A random expression of the numbers and its value, ``None`` where it divides by zero."""
    parts = [(str(number), Fraction(number)) for number in numbers]
    while len(parts) > 1:
        (left, first), (right, second) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        sign = rng.choice("+-*/")
        if sign == "/" and second == 0:
            return "", None
        value = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}[sign]
        parts.append((f"({left} {sign} {right})", value(first, second)))
    return parts[0]


def _leaves(node: ast.expr) -> list[int]:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _leaves(node.left) + _leaves(node.right)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return [node.value]
    raise ValueError(f"{type(node).__name__} is not allowed")


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    assert isinstance(node, ast.Constant)
    assert isinstance(node.value, int)
    return Fraction(node.value)
