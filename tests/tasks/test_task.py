from __future__ import annotations

from collections.abc import Callable

import pytest
from datasets import Dataset

import grpo_fast.tasks
from grpo_fast.tasks import Task
from grpo_fast.tasks.task import Rows, is_table


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


def test_a_reward_worker_loads_no_other_task(imported_by: Callable[[str], set[str]]) -> None:
    assert not {"torch", "datasets"} & imported_by("import grpo_fast.tasks.countdown, grpo_fast.tasks.arithmetic")


def test_generated_tasks_do_without_the_library_of_tables(imported_by: Callable[[str], set[str]]) -> None:
    code = (
        "from grpo_fast.config import Config\n"
        "from grpo_fast.tasks import encode_prompts, load_task; from grpo_fast.tasks.remarks import rounded, unseen\n"
        "for name in ('arithmetic', 'countdown'):\n"
        "    rows = load_task(Config(dataset=name), chat=False).train\n"
        "    assert len(rows) and rounded(rows) == unseen(rows) == []\n"
    )
    assert "datasets" not in imported_by(code)


def test_a_table_is_told_from_a_list() -> None:
    rows = [{"prompt": "p"}]
    assert is_table(Dataset.from_list(rows))
    assert not is_table(rows)
