from __future__ import annotations

import subprocess
import sys

import pytest
from datasets import Dataset

import grpo_fast.tasks
from grpo_fast.tasks import Task
from grpo_fast.tasks.task import Rows


def first_prompt(rows: Rows) -> str:
    return str(rows[0]["prompt"]) if len(rows) else ""


def test_lists_and_tables_are_rows() -> None:
    rows = [{"prompt": "p"}]
    task = Task(name="t", train=rows, eval=Dataset.from_list(rows), reward_funcs=(), eval_reward="")
    assert first_prompt(task.train) == first_prompt(task.eval) == "p"


def test_the_folder_exports_what_it_says() -> None:
    for name in dir(grpo_fast.tasks):
        assert getattr(grpo_fast.tasks, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = grpo_fast.tasks.nothing


def test_a_reward_worker_loads_no_other_task() -> None:
    code = "import sys, grpo_fast.tasks.countdown, grpo_fast.tasks.arithmetic; print({'torch', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
