"""Groups to score."""

from __future__ import annotations

from typing import Any

from grpo_fast.types import Completion, Group, Prompt

Factory = Any


def group(*texts: str, index: int = 0, **columns: Any) -> Group:
    completions = [Completion(tuple(range(len(text))), (0.0,) * len(text), "stop", text) for text in texts]
    return Group(Prompt(index, "question", (1,), columns), completions)
