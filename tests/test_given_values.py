from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.config import Config, ConfigError
from grpo_fast.given_values import dataset_anywhere, model_anywhere
from grpo_fast.train.resumable import check_resumable


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reward_funcs", "accuracy"),
        ("sinks", "wandb"),
        ("stop", "</answer>"),
        ("lora_target_modules", "q_proj"),
        ("vllm_server_urls", "http://127.0.0.1:8000"),
    ],
)
def test_one_string_may_stand_alone_where_several_may_be_given(field: str, value: str) -> None:
    beside: dict[str, Any] = {
        "lora_target_modules": {"use_peft": True},
        "vllm_server_urls": {"rollout": "vllm-http"},
    }.get(field, {})
    assert Config(**{field: value} | beside) == Config(**{field: (value,)} | beside)


def test_a_string_that_stands_alone_is_checked_as_the_others() -> None:
    with pytest.raises(ConfigError, match=r"sinks\.0: .*did you mean 'wandb'"):
        Config(sinks="wandbb")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["", ("",), ["a", ""]])
@pytest.mark.parametrize("field", ["reward_funcs", "sinks", "stop", "lora_target_modules", "vllm_server_urls"])
def test_an_empty_string_among_several_is_refused(field: str, value: Any) -> None:
    with pytest.raises(
        ConfigError, match=rf"^{field}: an empty string has no meaning; leave it out \(got {re.escape(repr(value))}\)$"
    ):
        Config(**{field: value})
    assert Config(stop=()) == Config(stop=[]) == Config()  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["model", "dataset", "output_dir"])
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_name_is_refused(field: str, value: str) -> None:
    """As a path it would be the current folder."""
    with pytest.raises(ConfigError, match=rf"^{field}='{value}' names nothing; give a name"):
        Config.parse({field: value})


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"log_completions": True}, "log_completions=True is not a number; give one, such as log_completions=4"),
        ({"eval_steps": False}, "eval_steps=False is not a number; give one, such as eval_steps=1"),
        ({"max_tokens": True}, "max_tokens=True is not a number; give one, such as max_tokens=1"),
        ({"learning_rate": True}, "learning_rate=True is not a number; give one, such as learning_rate=1e-06"),
    ],
)
def test_a_switch_is_no_number(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"^{told}$"):
        Config(**values)
    assert Config(padding_free=True, report=False).padding_free


def test_what_is_on_this_disk_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("mine/model", "arithmetic", "embedded", "home/data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "sums.jsonl").touch()
    assert model_anywhere("mine/model") == model_anywhere("./mine/model") == str(tmp_path / "mine" / "model")
    assert dataset_anywhere("sums.jsonl") == str(tmp_path / "sums.jsonl")
    assert dataset_anywhere("~/data") == str(tmp_path / "home" / "data")
    assert dataset_anywhere("gsm8k:mine") == f"gsm8k:{tmp_path / 'mine'}"
    assert dataset_anywhere("./arithmetic") == str(tmp_path / "arithmetic")
    for name in ("arithmetic", "gsm8k", "gsm8k:none", "reasoning_gym:mine", "openai/gsm8k", ""):
        assert dataset_anywhere(name) == name
    for name in ("embedded", "mine/other", "sums.jsonl", ""):
        assert model_anywhere(name) == name
    config = Config(output_dir="~/runs/one", forecast_prior="~/prior.json")  # type: ignore[arg-type]
    assert (config.output_dir, config.forecast_prior) == (tmp_path / "home/runs/one", tmp_path / "home/prior.json")
    with pytest.raises(ConfigError, match=r"^output_dir: Could not determine home directory \(got '~nobody-here/run'\)$"):
        Config(output_dir="~nobody-here/run")  # type: ignore[arg-type]


def test_a_run_is_gone_on_with_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("begun", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "begun" / "model").mkdir()
    (tmp_path / "begun" / "sums.csv").touch()
    monkeypatch.chdir(tmp_path / "begun")
    config = Config(model="model", dataset="sums.csv")
    older = tmp_path / "older.toml"
    older.write_text('model = "model"\ndataset = "sums.csv"\n', encoding="utf-8")  # as runs had it that are older than this
    check_resumable(Config.from_toml(older), config)
    (tmp_path / "run.toml").write_text(config.to_toml(), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = Config.from_toml(tmp_path / "run.toml")
    check_resumable(config, again)
    assert Path(again.model).is_dir()
    assert Path(again.dataset).is_file()
