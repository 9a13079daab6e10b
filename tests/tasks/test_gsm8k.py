from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_fast.config import Config, ConfigError
from grpo_fast.rewards.functions import accuracy
from grpo_fast.tasks import load_task
from grpo_fast.tasks.gsm8k import INSTRUCTION


def write(directory: Path, rows: int = 12, **columns: str) -> Path:
    for split in ("train", "test"):
        lines = [
            json.dumps(columns or {"question": f"{split}: {row} + 1?", "answer": f"Add.\n#### {row + 1}"})
            for row in range(rows)
        ]
        (directory / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return directory


def test_the_real_data_is_read_and_its_own_answers_are_right(shared_data: Path) -> None:
    task = load_task(Config(dataset=f"gsm8k:{shared_data / 'gsm8k'}", eval_size=100), chat=True)
    assert (task.name, len(task.train), len(task.eval)) == ("gsm8k", 7473, 100)
    rows = [task.train[0], task.eval[0]]
    assert rows[0]["prompt"] == [{"role": "user", "content": f"{rows[0]['question']}\n\n{INSTRUCTION}"}]
    told = [[{"role": "assistant", "content": f"It is \\boxed{{{row['answer'].rpartition('#### ')[2]}}}."}] for row in rows]
    assert accuracy(told, answer=[row["answer"] for row in rows]) == [1.0, 1.0]
    assert accuracy(told[::-1], answer=[row["answer"] for row in rows]) == [0.0, 0.0]
    assert not {row["question"] for row in task.eval} & {row["question"] for row in task.train}
    assert task.reward_funcs == (task.eval_reward,) == ("accuracy",)


def test_base_models_get_text_and_a_system_prompt_takes_the_instructions_place(tmp_path: Path) -> None:
    config = Config(dataset=f"gsm8k:{write(tmp_path)}", eval_size=5)
    assert load_task(config, chat=False).train[0]["prompt"] == f"train: 0 + 1?\n\n{INSTRUCTION}\n\nSolution:"
    task = load_task(config.replace(system_prompt="Say only the number."), chat=True)
    assert task.train[0]["prompt"] == [{"role": "user", "content": "train: 0 + 1?"}]
    assert [row["question"] for row in task.eval] == [f"test: {row} + 1?" for row in (0, 2, 4, 7, 9)]


def test_splits_can_be_chosen(tmp_path: Path) -> None:
    config = Config(dataset=f"gsm8k:{write(tmp_path)}", dataset_split="test[:3]", eval_split="train")
    task = load_task(config, chat=False)
    assert [row["question"][:4] for row in task.train] == ["test"] * 3
    assert len(task.eval) == 12
    with pytest.raises(ConfigError, match=r"split 'dev'.*Should be one of \['train', 'test'\]"):
        load_task(config.replace(dataset_split="dev"), chat=False)


def test_what_is_not_gsm8k_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no directory .*nowhere; give one with train.jsonl and test.jsonl"):
        load_task(Config(dataset=f"gsm8k:{tmp_path / 'nowhere'}"), chat=True)
    with pytest.raises(ConfigError, match=r"no dataset file .*train.jsonl"):
        load_task(Config(dataset=f"gsm8k:{tmp_path}"), chat=True)
    with pytest.raises(ConfigError, match=r"no column answer, question; it has problem"):
        load_task(Config(dataset=f"gsm8k:{write(tmp_path, problem='p')}"), chat=True)


def test_without_the_hub_the_error_says_what_to_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ConfigError, match=r"'openai/gsm8k' \(configuration 'main'.*gsm8k:DIRECTORY"):
        load_task(Config(dataset="gsm8k"), chat=True)
