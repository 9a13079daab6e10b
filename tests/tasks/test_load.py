from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.config import Config, ConfigError
from grpo_fast.tasks import load_task


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("dataset", ["arithmetic", "countdown", "reasoning_gym:gcd"])
def test_generated_tasks_have_the_sizes_of_the_configuration(dataset: str, chat: bool) -> None:
    task = load_task(Config(dataset=dataset, dataset_size=30, eval_size=7), chat=chat)
    assert (task.name, len(task.train), len(task.eval)) == (dataset, 30, 7)
    assert isinstance(task.train[0]["prompt"], list) is (chat and dataset != "arithmetic")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("countdwn", "unknown dataset 'countdwn'; did you mean 'countdown'. A dataset is arithmetic"),
        ("gsm8:data", "did you mean 'gsm8k'"),
        ("zzz", "unknown dataset 'zzz'; A dataset is arithmetic, countdown, gsm8k"),
        ("", "dataset='' names nothing"),
        ("./nowhere", "no such file or directory"),
        ("/nowhere/at/all", "no such file or directory"),
        ("nowhere.jsonl", "no dataset file nowhere.jsonl"),
        ("arithmetic:hard", "'arithmetic:hard' is not understood. A dataset is"),
        ("countdown:", "not understood"),
        ("gsm8k:", "not understood"),
        ("reasoning_gym", "not understood. .*reasoning_gym:TASK"),
        ("reasoning_gym:", "not understood"),
        ("reasoning_gym:gdc", "did you mean .*'gcd'"),
    ],
)
def test_a_name_that_stands_for_nothing_is_explained(dataset: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task(Config(dataset=dataset), chat=True)


@pytest.mark.parametrize("option", [{"dataset_config": "main"}, {"dataset_split": "test"}, {"eval_split": "test"}])
def test_generated_tasks_have_no_splits(option: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))}='.*' has no effect on the generated task 'countdown'"):
        load_task(Config(dataset="countdown", **option), chat=True)


@pytest.mark.parametrize(
    ("dataset", "option"),
    [("arithmetic", {"prompt_column": "question"}), ("gsm8k", {"answer_column": "solution"}), ("gsm8k", {"dataset_size": 8})],
)
def test_what_is_for_other_data_is_refused(dataset: str, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))}=.* has no effect on .*{dataset!r}; leave it out"):
        load_task(Config.parse({"dataset": dataset} | option), chat=True)


def test_a_directory_may_be_named_like_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "countdown").mkdir()
    (tmp_path / "countdown" / "train.jsonl").write_text('{"prompt": "p", "answer": "a"}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_task(Config(dataset="./countdown"), chat=True).train[0]["answer"] == "a"
    assert "numbers" in load_task(Config(dataset="countdown", dataset_size=1), chat=True).train[0]


@pytest.mark.slow
def test_offline_a_hub_id_fails_at_once_and_says_why() -> None:
    code = (
        "from grpo_fast import Config; from grpo_fast.tasks import load_task; load_task(Config(dataset='nobody/x'), chat=True)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert "ConfigError: cannot read the hub dataset 'nobody/x'" in done.stderr
    assert "give the path of a local directory" in done.stderr
