from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Image

from grpo_fast.compute import Budget
from grpo_fast.config import Config, ConfigError
from grpo_fast.run_dir import CONFIG_FILE, LOCK_FILE
from grpo_fast.tasks.task import Task
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.parts import build_parts

MakeConfig = Callable[..., Config]


def children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text(encoding="ascii").split())


def test_a_new_directory_is_claimed_when_the_run_opens(build: Any, tmp_path: Path) -> None:
    parts = build()
    run = tmp_path / "run"
    assert not run.exists(), "nothing is written before everything has been checked"
    parts.open(0)
    assert Config.from_toml(run / CONFIG_FILE) == parts.config


def test_an_empty_directory_is_fine(build: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    build()


def test_a_directory_with_a_run_is_refused_with_both_ways_out(build: Any, tmp_path: Path) -> None:
    build().open(0)
    with pytest.raises(ConfigError) as caught:
        build()
    assert f"output_dir {tmp_path / 'run'} already holds a run" in str(caught.value)
    assert f"`grpo-fast train --resume {tmp_path / 'run'}`" in str(caught.value)
    assert "--overwrite" in str(caught.value)


def test_overwrite_removes_the_old_run_and_nothing_else(build: Any, tmp_path: Path) -> None:
    build().open(0)
    (tmp_path / "run" / "checkpoint-3").mkdir()
    (tmp_path / "beside").touch()
    parts = build(overwrite=True)
    assert (tmp_path / "run" / "checkpoint-3").exists(), "as long as something may still be wrong with the new run"
    parts.open(0)
    assert (tmp_path / "beside").exists()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {CONFIG_FILE, "sources.json", "events.jsonl", LOCK_FILE}


@pytest.mark.parametrize("switch", ["overwrite", "resume_if_exists"])
def test_to_begin_another_run_from_a_runs_own_configuration_leaves_that_run_alone(
    switch: str, build: Any, tmp_path: Path
) -> None:
    parts = build(**{switch: True})
    parts.open(0)
    assert Config.from_toml(tmp_path / "run" / CONFIG_FILE) == parts.config.replace(**{switch: False})
    with pytest.raises(ConfigError, match="already holds a run"):
        build_parts(Config.from_toml(tmp_path / "run" / CONFIG_FILE), {}, resume=False)


def test_rewards_given_in_python_are_needed_again_on_resume(build: Any) -> None:
    def short(completions: list[str]) -> list[float]:
        return [-float(len(text)) for text in completions]

    build({"reward_funcs": [short]}).open(0)
    assert build({"reward_funcs": [short]}, resume=True).rewards.names == ["short"]
    with pytest.raises(ConfigError, match=r"started with reward_funcs \['short'\], but now reward_funcs is \['exact_match'\]"):
        build(resume=True)


def test_what_a_kill_left_of_a_configuration_stands_in_nobodys_way(build: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f".{CONFIG_FILE}.partial").write_text("mod", encoding="utf-8")
    parts = build()
    parts.open(0)
    assert Config.from_toml(tmp_path / "run" / CONFIG_FILE) == parts.config


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_are_no_run_are_never_deleted(overwrite: bool, build: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="contains files that are not a run; name an empty or new directory"):
        build(overwrite=overwrite)
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_a_file_is_no_directory(build: Any, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match=r"run is a file; name a directory"):
        build(overwrite=True)


def test_a_mistake_found_later_leaves_the_old_run_alone(build: Any, tmp_path: Path) -> None:
    build().open(0)
    with pytest.raises((ConfigError, ValueError)):
        build({"reward_funcs": ["no_such_reward"]}, overwrite=True)
    assert (tmp_path / "run" / CONFIG_FILE).exists()
    with pytest.raises(ConfigError):
        build(overwrite=True, model=str(tmp_path / "nowhere"))
    assert (tmp_path / "run" / CONFIG_FILE).exists()


def test_rewards_are_checked_before_the_weights_are_read(tiny_model: Path, build: Any, tmp_path: Path) -> None:
    weightless = tmp_path / "weightless"
    weightless.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (weightless / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="unknown reward 'acuracy'; did you mean 'accuracy'"):
        build({"reward_funcs": ["acuracy"]}, model=str(weightless))
    with pytest.raises(ValueError, match="has no 'nothing'"):
        build({"reward_funcs": ["math:nothing"]}, model=str(weightless))
    with pytest.raises(ConfigError, match="cannot load model"):
        build(model=str(weightless))


def test_a_build_that_fails_leaves_no_process(tiny_model: Path, build: Any, tmp_path: Path) -> None:
    weightless = tmp_path / "weightless"
    weightless.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (weightless / file.name).write_bytes(file.read_bytes())
    before = children()
    with pytest.raises(ConfigError, match="cannot load model"):
        build(model=str(weightless), reward_workers=1)
    assert children() == before


def test_closing_ends_the_workers_and_may_be_done_twice(build: Any) -> None:
    before = children()
    parts = build(reward_workers=1)
    assert len(children() - before) >= 1
    parts.close()
    assert children() == before
    parts.close()


def test_a_sink_that_is_not_installed_is_told_before_anything_is_read(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"sinks=\['wandb'\]: the sink 'wandb' needs .*pip install 'grpo-fast\[tracking\]'"):
        build(sinks=("wandb",), model=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_column_that_a_reward_needs_is_missed_before_the_weights_are_read(build: Any, workers: int) -> None:
    def close(completions: Any, anwser: Any) -> list[float]:
        return [0.0 for _ in completions]

    with pytest.raises(ValueError, match=r"'close' needs a dataset column 'anwser'; .*did you mean 'answer'\?"):
        build({"reward_funcs": [close]}, reward_workers=workers)


def test_what_is_odd_about_the_data_is_told_where_a_run_begins(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "1+1=", "answer": "2", "seen": None}]).cast_column("seen", Image())
    task = Task("own", rows, rows, reward_funcs=("exact_match",), eval_reward="exact_match")
    config = Config(output_dir=tmp_path / "run", max_completion_length=8, sinks=(), prompts_per_step=3)
    parts = build_parts(config, {"task": task}, resume=False)
    parts.open(0)
    parts.close()
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["event"] for event in events] == ["warn", "warn", "warn", "start"]
    assert "1 of 1 held-out prompts are trained on too" in events[0]["message"]
    assert "prompts_per_step=3 exceeds the number of prompts, 1" in events[1]["message"]
    assert "the column 'seen' holds images" in events[2]["message"]


@pytest.mark.parametrize(
    ("config", "given", "told"),
    [
        (Config(), {"reward_func": []}, r"no argument 'reward_func'; did you mean 'reward_funcs'\?"),
        (
            Config(),
            {"argz": 1},
            r"no argument 'argz'\. It takes: reward_funcs, train_dataset, .*other settings belong in Config",
        ),
        (
            Config(),
            {"callbacks": []},
            r"no argument 'callbacks'; it is a TRL name, which here corresponds to the loop, .*\. It takes: reward",
        ),
        (Config(), {"model": "m"}, r"no argument 'model'; it is a setting, Config\(model=\.\.\.\)\. It takes"),
        ("Qwen/Qwen3-0.6B", {}, r"first argument must be a Config, not 'Qwen/Qwen3-0.6B'; make one"),
        (
            None,
            {"args": 1, "model": "m"},
            r"must be a Config, not None; make one .*; docs/from-trl\.md says what TRL's settings",
        ),
        (type("GRPOConfig", (), {})(), {}, r"not .*GRPOConfig .*; docs/from-trl\.md says what TRL's settings are called$"),
        (None, {}, r"must be a Config, not None; make one with Config\(\.\.\.\) or recipe\(\.\.\.\)$"),
        (
            Config(),
            {"rollout_func": len},
            r"no argument 'rollout_func'; it is a TRL name; leave it out, .*engine=\.\.\.\)\. It takes",
        ),
        (Config(), {"zzzz": 1}, r"no argument 'zzzz'\. It takes: reward_funcs"),
        ({"model": "embedded"}, {}, r"not \{'model': 'embedded'\}"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(config: Any, given: dict[str, Any], told: str) -> None:
    with pytest.raises(TypeError, match=told):
        GRPOTrainer(config, **given)
    if config is None:
        with pytest.raises(TypeError, match=told):
            GRPOTrainer(**given)


def test_money_needs_a_price(build: Any) -> None:
    with pytest.raises(ConfigError, match=r"a budget of money \(5\) needs price_per_gpu_hour above 0"):
        build(max_money=5.0)
    with pytest.raises(ConfigError, match=r"a budget of money \(2\.5\) needs"):
        build({"budget": Budget(money=2.5)})
    assert build(max_money=5.0, price_per_gpu_hour=2.0).budget.money == 5.0


def test_limits_of_the_configuration_become_the_budget(build: Any) -> None:
    budget = build(
        max_steps=7, max_tokens=100.0, max_wall_hours=2.0, max_energy_kwh=0.5, max_flops=1e9, max_gpu_hours=3.0
    ).budget
    assert budget == Budget(steps=7, tokens=100.0, flops=1e9, gpu_hours=3.0, wall=2.0, energy=0.5)


def test_weights_of_rewards_reach_the_pool(build: Any) -> None:
    parts = build(reward_funcs=("exact_match", "format"), reward_weights=(1.0, 0.5))
    assert parts.rewards.names == ["exact_match", "format"]
    assert tuple(parts.rewards.weights) == (1.0, 0.5)
    assert build().rewards.names == ["exact_match"], "without a choice they are the task's"
    functions = [lambda completions: [0.0] * len(completions), lambda completions: [1.0] * len(completions)]
    assert build({"reward_funcs": functions}, reward_weights=(1.0, 0.5)).rewards.weights == (1.0, 0.5)
    with pytest.raises(ValueError, match=r"reward weights \[1.0\] are 1 for 2 reward functions; give one each"):
        build({"reward_funcs": functions}, reward_weights=(1.0,))


def test_held_out_prompts_keep_to_their_number(build: Any) -> None:
    assert len(build(eval_size=3).eval_prompts) == 3
    assert len(build(eval_size=100).eval_prompts) == 8
    assert any("only 8 of the 100 prompts of eval_size" in remark for remark in build(eval_size=100).remarks)


def test_a_reference_is_a_second_copy_of_the_weights(build: Any) -> None:
    parts = build(beta=0.1)
    ours, theirs = (dict(policy.model.named_parameters()) for policy in (parts.policy, parts.reference))
    assert all(ours[name].data_ptr() != theirs[name].data_ptr() for name in ours)
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert build().reference is None


def test_what_begins_is_told_in_one_line(build: Any) -> None:
    parts = build()
    assert "training: " in parts.describe(0)
    assert "resuming after step 4" in parts.describe(4)
    assert "24 prompts, 4 held out), rewarded by exact_match, on " in parts.describe(0)
    assert "letters" in parts.describe(0)


def test_evaluation_without_held_out_rows_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1=", "answer": "2"}]
    task = Task("own", rows, [], reward_funcs=("exact_match",), eval_reward="exact_match")
    config = Config(output_dir=tmp_path / "run", max_completion_length=8, sinks=(), eval_steps=1)
    with pytest.raises(ConfigError, match="has no held-out rows"):
        build_parts(config, {"task": task}, resume=False)
