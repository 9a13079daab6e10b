"""Countdown: make a target from given numbers, each used exactly once, with + - * /."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from grpo_fast.config import ConfigError
from grpo_fast.tasks.task import Task
from grpo_fast.types import PromptText

INSTRUCTION = (
    "Using the numbers {numbers}, each exactly once, and the operations + - * /, write an expression that equals {target}. "
    "Reason first, then give the expression alone in <answer> </answer>."
)
_NUM_NUMBERS = 4
_LARGEST_NUMBER, _LARGEST_TARGET = 50, 200
_MAX_EXPRESSION = 200
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_EVAL_STREAM = 1


def countdown_task(*, size: int, eval_size: int, seed: int, chat: bool) -> Task:
    """Puzzles that have a solution by construction; those held out come from a stream of their own and are kept apart.

    Args:
        size: rows trained on.
        eval_size: rows held out.
        seed: decides the puzzles.
        chat: whether prompts are chat messages.
    """
    held_out = _puzzles(eval_size, random.Random(f"{seed}-{_EVAL_STREAM}"), taken=set())
    train = _puzzles(size, random.Random(f"{seed}"), taken=set(held_out))
    name = "grpo_fast.tasks.countdown:countdown_reward"
    rows = [[_row(puzzle, chat=chat) for puzzle in puzzles] for puzzles in (train, held_out)]
    return Task("countdown", rows[0], rows[1], reward_funcs=(name,), eval_reward=name)


def countdown_reward(
    prompts: Sequence[Any], completions: Sequence[Any], *, target: Sequence[int], numbers: Sequence[list[int]], **columns: Any
) -> list[float]:
    """1.0 where the last ``<answer>`` is an expression that uses each number once and equals the target (TRL's signature).

    Args:
        prompts: N prompts; not read.
        completions: N completions, text or chat messages.
        target: N targets.
        numbers: N lists of the numbers to use.
        columns: further columns; not read.

    Returns:
        N rewards, 0.0 or 1.0.
    """
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(solves(text, goal, given)) for text, goal, given in zip(texts, target, numbers, strict=True)]


def solves(completion: str, target: int, numbers: Sequence[int]) -> bool:
    """Whether a completion's answer makes the target from the numbers."""
    answers = _ANSWER.findall(completion)
    if not answers or len(answers[-1]) > _MAX_EXPRESSION:
        return False
    try:
        tree = ast.parse(answers[-1].strip(), mode="eval")
        used = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        return Counter(used) == Counter(numbers) and _value(tree.body) == target
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False


def _value(node: ast.expr) -> Fraction:
    """Exact value; only integers, the four operations and parentheses pass, so nothing is ever executed."""
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            return Fraction(number)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left) + _value(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _value(left) - _value(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left) * _value(right)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _value(left) / _value(right)
    raise ValueError(f"{ast.dump(node)[:60]} has no place in an expression")


def _puzzles(count: int, draw: random.Random, *, taken: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Distinct puzzles, each the sorted numbers and then the target."""
    found: dict[tuple[int, ...], None] = {}
    attempts = 0
    while len(found) < count:
        attempts += 1
        if attempts > 1000 + 100 * count:
            raise ConfigError(f"there are not {count} different countdown puzzles to be had; lower dataset_size or eval_size")
        numbers = [draw.randint(1, _LARGEST_NUMBER) for _ in range(_NUM_NUMBERS)]
        target = numbers[0]
        for number in numbers[1:]:
            target = draw.choice([target + number, target - number, target * number])
        puzzle = (*sorted(numbers), target)
        if 1 <= target <= _LARGEST_TARGET and puzzle not in taken:
            found[puzzle] = None
    return list(found)


def _row(puzzle: tuple[int, ...], *, chat: bool) -> dict[str, Any]:
    *numbers, target = puzzle
    text = INSTRUCTION.format(numbers=", ".join(map(str, numbers)), target=target)
    prompt: PromptText = [{"role": "user", "content": text}] if chat else f"{text}\n"
    return {"prompt": prompt, "numbers": numbers, "target": target}
