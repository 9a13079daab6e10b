from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from grpo_fast.config import Config, ConfigError
from grpo_fast.tasks import load_task
from grpo_fast.tasks.files import hold_out, task_of


def write(directory: Path, *, name: str = "data.parquet", rows: int = 50, **columns: str) -> str:
    Dataset.from_list([{"prompt": f"p{row}", **columns} for row in range(rows)]).to_parquet(directory / name)
    return str(directory / name)


def test_rows_pass_through_and_answers_are_checked(tmp_path: Path) -> None:
    task = load_task(Config(dataset=write(tmp_path, answer="1", level="easy"), eval_size=4), chat=True)
    assert (len(task.train), len(task.eval)) == (46, 4)
    assert dict(task.train[0]) == {"prompt": task.train[0]["prompt"], "answer": "1", "level": "easy"}
    assert (task.reward_funcs, task.eval_reward) == (("accuracy",), "")


def test_messages_pass_through(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"q{row}"}], "answer": "1"} for row in range(3)]
    Dataset.from_list(rows).to_json(tmp_path / "chat.jsonl")
    task = load_task(Config(dataset=str(tmp_path / "chat.jsonl")), chat=False)
    assert [dict(task.train[index]) for index in range(3)] == rows
    assert len(task.eval) == 0


def test_rewards_without_an_answer_come_from_the_configuration(tmp_path: Path) -> None:
    config = Config(dataset=write(tmp_path, level="easy"))
    with pytest.raises(ConfigError, match=r"no 'answer' column .*\(it has prompt, level\); name the column by answer"):
        load_task(config, chat=True)
    for task in (
        load_task(config.replace(reward_funcs=("boxed_format", "format")), chat=True),
        load_task(config, chat=True, needs_reward=False),
    ):
        assert (task.reward_funcs, task.eval_reward) == ((), "")


def test_a_table_without_prompts_names_its_columns(tmp_path: Path) -> None:
    Dataset.from_list([{"question": "q", "answer": "a"}]).to_json(tmp_path / "data.jsonl")
    with pytest.raises(ConfigError, match=r"no 'prompt' column; it has question, answer. Name .* by prompt_column"):
        load_task(Config(dataset=str(tmp_path / "data.jsonl")), chat=True)


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    row = {"question": "q", "solution": "7", "prompt": "an older one", "level": "easy"}
    Dataset.from_list([row] * 3).to_json(tmp_path / "data.jsonl")
    config = Config(dataset=str(tmp_path / "data.jsonl"), prompt_column="question", answer_column="solution")
    task = load_task(config, chat=True)
    assert dict(task.train[0]) == {"prompt": "q", "answer": "7", "level": "easy"}
    assert task.reward_funcs == ("accuracy",)
    with pytest.raises(
        ConfigError, match=r"no 'solutoin' column; it has .*Name the one that holds the answers by answer_column"
    ):
        load_task(config.replace(answer_column="solutoin"), chat=True)


def test_the_size_of_generated_tasks_cuts_no_table(tmp_path: Path) -> None:
    config = Config(dataset=write(tmp_path, answer="1"), dataset_size=8)
    with pytest.raises(ConfigError, match=r"dataset_size=8 is for generated tasks.*dataset_split='train\[:8\]'"):
        load_task(config, chat=True)
    assert len(load_task(Config(dataset=config.dataset, dataset_split="train[:8]", eval_size=1), chat=True).train) == 7


def test_an_eval_split_is_read_instead_of_rows_held_out(tmp_path: Path) -> None:
    write(tmp_path, name="train.parquet", answer="1")
    write(tmp_path, name="validation.parquet", rows=30, answer="2")
    task = load_task(Config(dataset=str(tmp_path), eval_split="validation", eval_size=10), chat=True)
    assert (len(task.train), len(task.eval)) == (50, 10)
    assert {task.eval[index]["answer"] for index in range(10)} == {"2"}


ROWS = [{"question": f"q{row}", "answer": str(row), "level": row % 3} for row in range(30)]


@pytest.mark.parametrize("make", [list, tuple, Dataset.from_list], ids=["list", "tuple", "dataset"])
def test_rows_in_hand_are_what_a_file_of_them_is(make: Any, tmp_path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "data.parquet")
    config = Config(dataset=str(tmp_path / "data.parquet"), prompt_column="question", eval_size=4)
    task, same = task_of(config, make(ROWS), needs_reward=True), load_task(config, chat=False)
    assert (task.name, task.reward_funcs, task.eval_reward) == ("train_dataset", ("accuracy",), "")
    assert list(task.train) == list(same.train)
    assert list(task.eval) == list(same.eval)
    given = task_of(config, make(ROWS[:20]), make(ROWS[20:]), needs_reward=True)
    assert [row["prompt"] for row in given.train] == [f"q{row}" for row in range(20)]
    assert [row["prompt"] for row in given.eval] == ["q20", "q22", "q25", "q27"], "eval_size of them, evenly"


def test_rows_in_hand_keep_columns_that_the_first_row_lacks() -> None:
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d", "level": 3}]
    assert [row["level"] for row in task_of(Config(), rows, needs_reward=True).train] == [None, 3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            DatasetDict(test=Dataset.from_list(ROWS)),
            r"train_dataset holds splits \(test\); give one.* train_dataset=data\['test'\]",
        ),
        (IterableDataset.from_generator(lambda: iter(ROWS)), r"of type IterableDataset; .*list\(data.take\(1000\)\)"),
        ("data.parquet", r"train_dataset is of type str; give a datasets.Dataset or a list of rows"),
        ([], r"train_dataset has no rows"),
        (Dataset.from_list([]), r"train_dataset has no rows"),
        ([{"prompt": 1}, {"prompt": "x"}], r"train_dataset is no table: .*give rows with the same columns, of plain values"),
        (["a"], r"train_dataset is no table: row 0 is 'a' \(str\), and a row is a mapping"),
        ({"prompt": ["a"], "answer": ["b"]}, r"train_dataset is of type dict; .* Dataset.from_dict make one"),
        ([{"prompt": "a", "answer": 10**30}], r"train_dataset holds a whole number of more than 64 bits .* as text"),
        (ROWS, r"train_dataset has no 'prompt' column; it has question, answer, level"),
        ([{"prompt": "a"}], r"train_dataset has no 'answer' column .* or set reward_funcs"),
    ],
)
def test_rows_in_hand_that_cannot_be_used(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_of(Config(), given, needs_reward=True)


def test_a_hub_dataset_that_cannot_be_fetched_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'nobody/nothing-at-all'.* local directory, .parquet, .jsonl or .csv file"):
        load_task(Config(dataset="nobody/nothing-at-all"), chat=True)


@given(size=st.integers(1, 60), count=st.integers(1, 30), seed=st.integers(0, 1000))
def test_held_out_rows_are_few_disjoint_and_decided_by_the_seed(size: int, count: int, seed: int) -> None:
    kept, held_out = hold_out(size, count, seed=seed)
    assert len(held_out) == min(count, size // 5)
    assert list(kept) == sorted(set(range(size)) - set(held_out))
    assert (kept, held_out) == hold_out(size, count, seed=seed)


def test_another_seed_holds_other_rows_out() -> None:
    assert hold_out(200, 20, seed=0)[1] != hold_out(200, 20, seed=1)[1]


@pytest.mark.parametrize("apart", [False, True], ids=["held out", "given apart"])
def test_rows_are_known_by_their_numbers_in_the_table(apart: bool) -> None:
    rows = [{"prompt": str(number), "answer": ""} for number in range(50)]
    task = task_of(Config(eval_size=7), rows, rows if apart else None, needs_reward=True)
    for part, numbers in ((task.train, task.train_numbers), (task.eval, task.eval_numbers)):
        named = range(50) if numbers is None else numbers
        assert [row["prompt"] for row in part] == [str(number) for number in named]  # type: ignore[attr-defined]
    assert len(task.eval) == 7
