"""How tasks put a question to chat and base models, and where they look for the answer."""

from __future__ import annotations

from grpo_fast.types import PromptText

ANSWER_TAGS = "Think it through first. Then write the final answer, and nothing else, between <answer> and </answer>."
"""What a prompt says where :func:`tagged_answer` reads the reply."""


def ask(text: str, *, chat: bool) -> PromptText:
    """A question as one user message, or, for a model without a chat template, as text that a solution continues."""
    return [{"role": "user", "content": text}] if chat else f"{text}\n\nSolution:"


def tagged_answer(text: str) -> str | None:
    """What stands in the last ``<answer>...</answer>``, stripped; ``None`` where there is none."""
    head, closed, _ = text.rpartition("</answer>")
    _, opened, inside = head.rpartition("<answer>")
    return inside.strip() if closed and opened else None
