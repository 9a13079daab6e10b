"""Where prompts come from: built-in and generated tasks, hub datasets and files, tokenised and drawn in a fixed order.

Each name is imported when it is first used, so that a reward worker that imports one task's reward loads no other.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_fast.tasks.load import load_task as load_task
    from grpo_fast.tasks.prompts import encode_prompts as encode_prompts
    from grpo_fast.tasks.stream import PromptStream as PromptStream
    from grpo_fast.tasks.task import Rows as Rows
    from grpo_fast.tasks.task import Task as Task

_HOMES = {"PromptStream": "stream", "Rows": "task", "Task": "task", "encode_prompts": "prompts", "load_task": "load"}
__all__ = sorted(_HOMES)  # noqa: PLE0605 (a list of strings)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grpo_fast.tasks' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"grpo_fast.tasks.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
