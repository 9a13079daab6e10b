"""Where prompts come from."""

from __future__ import annotations

from grpo_fast.tasks.load import load_task
from grpo_fast.tasks.prompts import encode_prompts
from grpo_fast.tasks.stream import PromptStream
from grpo_fast.tasks.task import Rows, Task

__all__ = ["PromptStream", "Rows", "Task", "encode_prompts", "load_task"]
