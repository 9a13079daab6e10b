from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.config import Config, ConfigError
from grpo_fast.run_dir import CONFIG_FILE, SUMMARY_FILE
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.launch import note_launch
from grpo_fast.train.resumable import check_resumable, has_ended, takes_up_run


def test_what_makes_another_run_is_refused_on_resume() -> None:
    saved = Config(max_steps=10, seed=1)
    with pytest.raises(ConfigError, match=r"a resumed run cannot change learning_rate \(1e-06 -> 0\.1\), seed \(1 -> 2\)"):
        check_resumable(saved, saved.replace(seed=2, learning_rate=0.1, max_steps=20))


def test_limits_and_output_may_change_on_resume() -> None:
    saved = Config(max_steps=10)
    changes: dict[str, Any] = {
        "max_steps": 20,
        "max_money": 3.0,
        "price_per_gpu_hour": 1.0,
        "forecast": "off",
        "forecast_epsilon": 0.5,
        "save_steps": 1,
        "sinks": (),
        "reward_workers": 0,
        "tokens_per_microbatch": 64,
    }
    check_resumable(saved, saved.replace(**changes))


def test_where_there_is_no_run_none_is_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no run in .* \(it has no config.toml\); give the output_dir"):
        GRPOTrainer.resume(tmp_path)


def test_a_run_is_taken_up_where_there_is_one_and_it_is_wanted(tmp_path: Path) -> None:
    config = Config(output_dir=tmp_path, resume_if_exists=True, seed=3)
    assert not takes_up_run(config)
    (tmp_path / CONFIG_FILE).write_text(config.to_toml(), encoding="utf-8")
    assert takes_up_run(config.replace(max_steps=7))
    assert not takes_up_run(config.replace(resume_if_exists=False))
    with pytest.raises(ConfigError, match=r"cannot change seed \(3 -> 4\); .* with --model .*/checkpoint-N it begins from"):
        takes_up_run(config.replace(seed=4))


def test_a_run_that_had_ended_ends_at_once_unless_its_limits_change(tmp_path: Path) -> None:
    config = Config(output_dir=tmp_path, max_steps=4, reward_range=(0.0, 1.0))
    (tmp_path / CONFIG_FILE).write_text(config.to_toml(), encoding="utf-8")
    newest = tmp_path / "checkpoint-4"
    assert not has_ended(config, newest), "it was killed"
    for ended, step, over in (("max_steps", 4, True), ("forecast", 4, True), ("interrupt", 4, False), ("max_steps", 3, False)):
        (tmp_path / SUMMARY_FILE).write_text(json.dumps({"stopped_by": ended, "step": step}), encoding="utf-8")
        assert has_ended(config, newest) == has_ended(config.replace(reward_range=None, save_steps=1), newest) == over
        assert not has_ended(config.replace(max_steps=5), newest)
        assert not has_ended(config.replace(forecast="off"), newest)
    (tmp_path / SUMMARY_FILE).write_text('{"stopped_by": "max_st', encoding="utf-8")
    assert not has_ended(config, newest), "that it ended cannot be read"


def test_a_restart_of_the_same_launch_cannot_change_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(output_dir=tmp_path, overwrite=True, seed=3)
    (tmp_path / CONFIG_FILE).write_text(config.to_toml(), encoding="utf-8")
    note_launch(tmp_path, ["a launch"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert takes_up_run(config, ["a launch"])
    assert not takes_up_run(config, ["another"]), "overwrite holds"
    with pytest.raises(ConfigError, match=r"a resumed run cannot change seed \(3 -> 4\)"):
        takes_up_run(config.replace(seed=4), ["a launch"])
