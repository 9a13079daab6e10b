"""Sources of prompts: built-in and generated tasks, hub datasets and files, tokenised and drawn in a fixed order.

Each name is imported when it is first used, so that a reward worker that imports one task's reward loads no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fast.lazy import lazy_names

if TYPE_CHECKING:
    from grpo_fast.tasks.files import task_of as task_of
    from grpo_fast.tasks.load import load_task as load_task
    from grpo_fast.tasks.prompts import encode_prompts as encode_prompts
    from grpo_fast.tasks.stream import PromptStream as PromptStream
    from grpo_fast.tasks.task import Rows as Rows
    from grpo_fast.tasks.task import Task as Task

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "PromptStream": "stream",
        "Rows": "task",
        "Task": "task",
        "encode_prompts": "prompts",
        "load_task": "load",
        "task_of": "files",
    },
)
