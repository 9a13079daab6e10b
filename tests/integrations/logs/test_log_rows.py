from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from grpo_fast.config import Config
from grpo_fast.integrations.logs.log_rows import LogError, RunSettings, number, numbers_of, read_rows

STATE = {"global_step": 2, "max_steps": 50, "log_history": [{"reward": 0.1, "step": 1}, {"reward": 0.2, "step": 2}]}
ROWS = [{"reward": 0.1, "step": 1.0}, {"reward": 0.2, "step": 2.0}]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def lines(*objects: object) -> str:
    return "\n".join(json.dumps(item) for item in objects) + "\n"


def test_trainer_state(tmp_path: Path) -> None:
    found = read_rows(write(tmp_path / "trainer_state.json", json.dumps(STATE)))
    assert (found.rows, found.max_steps, found.source) == (ROWS, 50, "transformers trainer_state.json")
    found = read_rows(write(tmp_path / "state.json", json.dumps(STATE | {"max_steps": -1}, indent=2)))
    assert found.max_steps is None


def test_directories(tmp_path: Path) -> None:
    for step in (9, 10):
        write(tmp_path / "trl" / f"checkpoint-{step}" / "trainer_state.json", json.dumps(STATE | {"max_steps": step}))
    write(tmp_path / "trl" / "checkpoint-best" / "trainer_state.json", json.dumps(STATE))
    assert read_rows(tmp_path / "trl").max_steps == 10, "the newest checkpoint holds the whole history"
    assert read_rows(tmp_path / "trl" / "checkpoint-9").max_steps == 9
    write(tmp_path / "mine" / "metrics.jsonl", lines(*ROWS))
    write(tmp_path / "mine" / "config.toml", "max_steps = 77\n")
    found = read_rows(tmp_path / "mine")
    assert (found.rows, found.max_steps, found.source, found.reward_column) == (ROWS, 77, "grpo_fast run", "reward")
    assert read_rows(tmp_path / "mine" / "metrics.jsonl") == found
    with pytest.raises(LogError, match=r"holds 4 runs; name one of them: .*mine"):
        read_rows(tmp_path)
    write(tmp_path / "outer" / "one" / "metrics.jsonl", lines(*ROWS))
    assert read_rows(tmp_path / "outer").rows == ROWS
    (tmp_path / "bare").mkdir()
    with pytest.raises(LogError, match="bare holds no log"):
        read_rows(tmp_path / "bare")


def test_a_run_whose_configuration_is_broken(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", lines(*ROWS))
    write(tmp_path / "config.toml", "max_steps = \n")
    found = read_rows(tmp_path)
    assert (found.max_steps, found.notes, found.settings) == (None, ["config.toml cannot be read"], RunSettings())


def test_what_our_configuration_says(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", lines(*ROWS))
    values = {"prompts_per_step": 8, "num_generations": 4, "reward_range": (0.0, 2.0), "forecast_epsilon": 0.02}
    write(tmp_path / "config.toml", Config.parse(values | {"max_steps": 90, "forecast_patience": 5}).to_toml())
    found = read_rows(tmp_path)
    assert found.max_steps == 90
    assert found.settings == RunSettings(8, 4, (0.0, 2.0), 0.02, patience=5), "by the names of the configuration itself"


def test_json_lines(tmp_path: Path) -> None:
    verl = lines({"step": 1, "data": {"critic/rewards/mean": 0.5, "train": {"lr": 1e-6}, "note": "x"}})
    found = read_rows(write(tmp_path / "verl.jsonl", verl * 2))
    assert found.source == "verl JSON lines"
    assert found.rows[0] == {"step": 1, "critic/rewards/mean": 0.5, "train/lr": 1e-6}
    text = lines({"global_step": 3, "reward": None, "return": "NaN", "ok": True}) + "oops\n" + lines(*ROWS) + '{"step": 4, "rew'
    found = read_rows(write(tmp_path / "flat.jsonl", text))
    assert found.source == "JSON lines"
    assert len(found.rows) == 3
    assert found.rows[0].keys() == {"global_step", "reward", "return"}
    assert math.isnan(found.rows[0]["reward"])
    assert found.notes == ["1 of 5 lines are no JSON objects and were left out"], "a half-written last line is nothing to tell"
    assert read_rows(write(tmp_path / "list.json", json.dumps(ROWS))).rows == ROWS


def test_tables(tmp_path: Path) -> None:
    found = read_rows(write(tmp_path / "a.csv", "\ufeffstep,reward,name\n1,0.1,x\n2,,y\n3,nan,z\n"))
    assert found.source == "CSV"
    assert found.rows[:2] == [{"step": 1, "reward": 0.1}, {"step": 2}]
    assert math.isnan(found.rows[2]["reward"])
    for mark in ";\t":
        assert read_rows(write(tmp_path / "b.csv", f"step{mark}reward\n1{mark}0.1\n2{mark}0.2\n")).rows == ROWS
    wandb = '"Step","run - train/reward","run - train/reward__MIN","run - train/reward__MAX"\n"0","0.5","0.5","0.5"\n'
    found = read_rows(write(tmp_path / "w.csv", wandb))
    assert found.source == "W&B CSV export"
    assert found.rows[0]["run - train/reward"] == 0.5
    found = read_rows(write(tmp_path / "c.csv", "1,0.1\n2,0.2\n"))
    assert (found.rows, found.notes) == (ROWS, ["the file has no header; its columns are taken as step and reward"])
    assert read_rows(write(tmp_path / "d.csv", "0.1\n0.2\n")).rows == [{"reward": 0.1}, {"reward": 0.2}]


def test_console(tmp_path: Path) -> None:
    text = "Total training steps: 9\rbar\nstep:1 - critic/rewards/mean:0.5\nstep:2 - critic/rewards/mean:0.6\n"
    found = read_rows(write(tmp_path / "run.log", text))
    assert (found.source, found.max_steps) == ("verl console log", 9)
    assert [row["critic/rewards/mean"] for row in found.rows] == [0.5, 0.6]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b" \n", "is empty"),
        ("prose.txt", b"Once upon a time,\nthere was a reward.\n", "of no known format; known are"),
        ("numbers.csv", b"1,2,3\n4,5,6\n", "of no known format"),
        ("model.bin", b"\x00\x01\x02", "is a binary file"),
        ("run-1.wandb", b":W&B\x00", "W&B's own binary format; export"),
    ],
)
def test_nonsense(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LogError, match=message):
        read_rows(tmp_path / name)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="does not exist"):
        read_rows(tmp_path / "none.csv")


def test_events_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing", None)
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"")
    for path in (tmp_path, tmp_path / "events.out.tfevents.1.host"):
        with pytest.raises(LogError, match=r"needs tensorboard.*pip install grpo-fast\[tracking\]"):
            read_rows(path)


def test_numbers() -> None:
    assert number("1e-3") == 0.001
    assert all(math.isnan(number(value)) for value in (None, True, "x", [1], 10**400))
    assert numbers_of([{"a": {"b": 1}}, 3]) == [{"a/b": 1.0}]
    assert math.isnan(numbers_of([{"a": float("nan")}])[0]["a"])
