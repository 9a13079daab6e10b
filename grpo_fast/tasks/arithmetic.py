"""The embedded task: add two three-digit numbers, ``347+586=``, and mark the answer with ``#``, ``...#933``.

A solver may write what it likes before the mark; only the number after the last mark counts, and it is compared exactly.
A problem is a function of (seed, split, index). Which problems are held out is decided by the problem alone, so that no
seed trains on what another evaluates, nor does pre-training see it (``pretrain_arithmetic``).
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from typing import Any, Literal

from grpo_fast.tasks.task import Task

ANSWER_MARK = "#"
NUM_DIGITS = 3
_HELD_OUT_ONE_IN = 8
_ANSWER = re.compile(rf"{ANSWER_MARK}(\d+)\s*\Z")


def arithmetic_task(*, size: int, eval_size: int, seed: int) -> Task:
    """Addition problems to train on and others held out.

    Args:
        size: Rows trained on.
        eval_size: Rows held out; 0 for none.
        seed: Decides which problems are drawn.

    Returns:
        A task whose rows are ``{"prompt": "347+586=", "answer": "933"}``.

    Raises:
        ValueError: ``size`` below 1 or ``eval_size`` below 0.
    """
    if size < 1 or eval_size < 0:
        raise ValueError(f"size={size} must be at least 1 and eval_size={eval_size} at least 0")
    return Task(
        name="arithmetic",
        train=[_row(*draw_problem(seed, index=index, split="train")) for index in range(size)],
        eval=[_row(*draw_problem(seed, index=index, split="eval")) for index in range(eval_size)],
        reward_funcs=("grpo_fast.tasks.arithmetic:arithmetic_accuracy",),
        eval_reward="grpo_fast.tasks.arithmetic:arithmetic_accuracy",
        reward_range=(0.0, 1.0),
    )


def arithmetic_accuracy(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **columns: Any
) -> list[float]:
    """1.0 where a completion ends in ``#`` and the right number, 0.0 elsewhere (TRL's reward signature).

    Args:
        prompts: N prompts; not read.
        completions: N completions as text, special tokens removed.
        answer: N right answers.
        columns: Further columns; not read.

    Returns:
        N rewards.

    Raises:
        ValueError: the numbers of answers and completions differ.
    """
    return [float(given_answer(text) == right) for text, right in zip(completions, answer, strict=True)]


def given_answer(completion: str) -> str | None:
    """The digits after the last answer mark, or ``None`` where the completion does not end in an answer."""
    match = _ANSWER.search(completion)
    return match.group(1) if match else None


def draw_problem(seed: int, *, index: int, split: Literal["train", "eval"]) -> tuple[int, int]:
    """The two summands of one problem, each of ``NUM_DIGITS`` digits; equal arguments draw equal problems."""
    rng = random.Random(f"{seed}/{split}/{index}")
    low, high = 10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS
    while True:
        first, second = rng.randrange(low, high), rng.randrange(low, high)
        if is_held_out(first, second) == (split == "eval"):
            return first, second


def is_held_out(first: int, second: int) -> bool:
    """Whether a problem belongs to evaluation: one in eight does, whichever summand comes first."""
    pair = f"{min(first, second)}+{max(first, second)}"
    return zlib.crc32(pair.encode()) % _HELD_OUT_ONE_IN == 0


def problem_prompt(first: int, second: int) -> str:
    """The prompt of a problem, ``347+586=``."""
    return f"{first}+{second}="


def _row(first: int, second: int) -> dict[str, str]:
    return {"prompt": problem_prompt(first, second), "answer": str(first + second)}
