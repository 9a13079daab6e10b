"""Wording of questions for chat and base models, and the place of the answer in the reply."""

from __future__ import annotations

from grpo_fast.types import PromptText

ANSWER_TAGS = "Think it through first. Then write the final answer, and nothing else, between <answer> and </answer>."
"""Instruction in prompts whose replies :func:`tagged_answer` reads."""


def ask(text: str, *, chat: bool) -> PromptText:
    """A question as one user message, or, for a model without a chat template, as text that a solution continues."""
    return [{"role": "user", "content": text}] if chat else f"{text}\n\nSolution:"


def tagged_answer(text: str) -> str | None:
    """Content of the last ``<answer>...</answer>``, stripped; ``None`` if there is none."""
    head, closed, _ = text.rpartition("</answer>")
    _, opened, inside = head.rpartition("<answer>")
    return inside.strip() if closed and opened else None
