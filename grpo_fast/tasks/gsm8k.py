"""GSM8K: grade-school word problems with a number for an answer (arXiv 2110.14168)."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from grpo_fast.config import ConfigError
from grpo_fast.tasks.files import read_hub
from grpo_fast.tasks.task import Task
from grpo_fast.types import PromptText

HUB_ID = "openai/gsm8k"
INSTRUCTION = "Reason step by step, and put the final number within \\boxed{}."


def gsm8k_task(directory: str | None = None, *, chat: bool) -> Task:
    """GSM8K with its test split held out; answers are checked by math-verify.

    Args:
        directory: holds ``train.jsonl`` and ``test.jsonl``; without one, the hub's copy is read.
        chat: whether prompts are chat messages.

    Raises:
        ConfigError: a file is missing, or the hub cannot be reached.
    """
    parts = {split: _read(directory, split) for split in ("train", "test")}
    rows = {split: part.map(lambda row: {"prompt": _phrase(row["question"], chat=chat)}) for split, part in parts.items()}
    return Task("gsm8k", rows["train"], rows["test"], reward_funcs=("accuracy",), eval_reward="accuracy")


def _read(directory: str | None, split: str) -> Dataset:
    if directory is None:
        return read_hub(HUB_ID, "main", split)
    path = Path(directory) / f"{split}.jsonl"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; gsm8k:DIRECTORY needs train.jsonl and test.jsonl in the directory")
    return Dataset.from_json(str(path))


def _phrase(question: str, *, chat: bool) -> PromptText:
    if chat:
        return [{"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}]
    return f"Question: {question}\n{INSTRUCTION}\nAnswer:"
