from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from grpo_fast.config import Config
from grpo_fast.integrations.logs.log_rows import read_rows
from grpo_fast.integrations.logs.raw_log import LogError, Names, RawLog, RunSettings

STATE = {"global_step": 2, "max_steps": 50, "log_history": [{"reward": 0.1, "step": 1}, {"reward": 0.2, "step": 2}]}
ROWS = [{"reward": 0.1, "step": 1.0}, {"reward": 0.2, "step": 2.0}]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path) -> RawLog:
    return read_rows(path, Names())


def lines(*objects: object) -> str:
    return "\n".join(json.dumps(item) for item in objects) + "\n"


def test_trainer_state(tmp_path: Path) -> None:
    found = read(write(tmp_path / "trainer_state.json", json.dumps(STATE)))
    assert (found.rows, found.max_steps, found.source) == (ROWS, 50, "transformers trainer_state.json")
    found = read(write(tmp_path / "state.json", json.dumps(STATE | {"max_steps": -1}, indent=2)))
    assert found.max_steps is None


def test_directories(tmp_path: Path) -> None:
    for step in (9, 10):
        write(tmp_path / "trl" / f"checkpoint-{step}" / "trainer_state.json", json.dumps(STATE | {"max_steps": step}))
    write(tmp_path / "trl" / "checkpoint-best" / "trainer_state.json", json.dumps(STATE))
    assert read(tmp_path / "trl").max_steps == 10, "the newest checkpoint holds the whole history"
    assert read(tmp_path / "trl" / "checkpoint-9").max_steps == 9
    write(tmp_path / "mine" / "metrics.jsonl", lines(*ROWS))
    write(tmp_path / "mine" / "config.toml", "max_steps = 77\n")
    found = read(tmp_path / "mine")
    assert (found.rows, found.max_steps, found.source, found.reward_column) == (ROWS, 77, "grpo_fast run", "reward")
    assert read(tmp_path / "mine" / "metrics.jsonl") == found
    with pytest.raises(LogError, match=r"contains 4 runs; name one of them: .*mine"):
        read(tmp_path)
    write(tmp_path / "outer" / "one" / "metrics.jsonl", lines(*ROWS))
    assert read(tmp_path / "outer").rows == ROWS
    write(tmp_path / "wandb" / "wandb-history.jsonl", lines(*ROWS))
    write(tmp_path / "printed" / "output.log", "{'reward': 0.1, 'step': 1}\n{'reward': 0.2, 'step': 2}\n")
    assert read(tmp_path / "wandb").rows == read(tmp_path / "printed").rows == ROWS
    (tmp_path / "bare").mkdir()
    with pytest.raises(LogError, match="bare contains no log"):
        read(tmp_path / "bare")


def test_a_run_whose_configuration_is_broken(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", lines(*ROWS))
    write(tmp_path / "config.toml", "max_steps = \n")
    found = read(tmp_path)
    assert (found.max_steps, found.notes, found.settings) == (None, ["config.toml cannot be read"], RunSettings())


def test_what_our_configuration_says(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", lines(*ROWS))
    values = {"prompts_per_step": 8, "num_generations": 4, "reward_range": (0.0, 2.0), "forecast_epsilon": 0.02}
    law = {"forecast_patience": 5, "forecast_confidence": 0.7, "forecast_min_steps": 9, "forecast_reward_value": 12.5}
    rest = {"max_steps": 90, "warmup_steps": 0.115, "price_per_gpu_hour": 2.0, "forecast_prior": "priors/mine.json"}
    config = Config.parse(values | law | rest)
    write(tmp_path / "config.toml", config.to_toml())
    found = read(tmp_path)
    assert found.max_steps == 90
    assert found.settings == RunSettings(
        8,
        4,
        (0.0, 2.0),
        0.02,
        confidence=0.7,
        patience=5,
        min_steps=9,
        warmup_steps=config.num_warmup_steps,
        reward_value=12.5,
        prior=str(config.forecast_prior),
    ), "by the names of the configuration itself"
    assert config.num_warmup_steps == 11
    facts = {"size_b": 0.5, "start": 0.25, "start_error": None, "lora": False, "validation": False}
    write(tmp_path / "facts.json", json.dumps(facts))
    assert read(tmp_path).settings.facts == facts


@pytest.mark.parametrize("text", ['{"size_b": 0.5', "[0.5]"])
def test_a_run_whose_facts_are_broken(tmp_path: Path, text: str) -> None:
    write(tmp_path / "metrics.jsonl", lines(*ROWS))
    write(tmp_path / "config.toml", "max_steps = 5\nwarmup_steps = 2\n")
    write(tmp_path / "facts.json", text)
    found = read(tmp_path)
    assert found.settings == RunSettings(warmup_steps=2)
    assert found.notes == ["facts.json cannot be read; the forecast does without the facts in it"]


def test_every_format_is_found(tmp_path: Path) -> None:
    texts = {
        "a.csv": "step,reward\n1,0.1\n2,0.2\n",
        "a.txt": "step reward\n1   0.1\n2   0.2\n",
        "a.jsonl": lines(*ROWS),
        "a.json": json.dumps(ROWS, indent=1),
        "run.log": "noise\nstep:1 - reward:0.1\nstep:2 - reward:0.2\n",
        "trl.log": "{'reward': '0.1', 'step': 1}\r{'reward': '0.2', 'step': 2}",
    }
    for name, text in texts.items():
        assert read(write(tmp_path / name, text)).rows == ROWS, name
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        assert read(tmp_path / f"{name}.gz").rows == ROWS, name


def test_bytes_between_the_lines(tmp_path: Path) -> None:
    text = "step,reward,größe\n1,0.1,1\n2,0.2,2\n"
    path = tmp_path / "a.csv"
    for encoding in ("utf-16", "utf-8-sig"):
        path.write_bytes(text.encode(encoding))
        found = read(path)
        assert (found.rows, found.notes) == (ROWS, [])
    path.write_bytes(text.encode("latin-1"))
    found = read(path)
    assert (found.rows, found.notes) == (
        ROWS,
        ["some bytes are not UTF-8; they were skipped, and names of columns may be damaged"],
    )
    path.write_bytes(b"step,reward\n1,0.1\n" + bytes(9) + b"2,0.2\n")
    found = read(path)
    assert (found.rows, found.notes) == (ROWS, ["9 zero bytes were left out"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b" \n", "is empty"),
        ("prose.txt", b"Once upon a time,\nthere was a reward.\n", "has an unknown format; known are"),
        ("numbers.csv", b"1,2,3\n4,5,6\n", "has an unknown format"),
        ("model.bin", b"\x00\x01\x02", "is a binary file"),
        ("run-1.wandb", b":W&B\x00", "W&B's own binary format; export"),
        ("plot.png", b"\x89PNG\r\n\x1a\n" + bytes(range(1, 256)) * 9, "is a binary file"),
        ("cut.csv.gz", b"\x1f\x8b\x08\x00", "cannot be unpacked"),
        ("head.csv", b"step,reward\n", "has a header but no rows"),
        ("trainer_state.json", b'{"log_history": [{"reward": 1}', "is not complete JSON with rows; was it cut off"),
    ],
)
def test_nonsense(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LogError, match=message):
        read(tmp_path / name)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="does not exist"):
        read(tmp_path / "none.csv")


def test_events_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing", None)
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"")
    for path in (tmp_path, tmp_path / "events.out.tfevents.1.host"):
        with pytest.raises(LogError, match=r"needs tensorboard.*pip install 'grpo-fast\[tracking\]'"):
            read(path)
