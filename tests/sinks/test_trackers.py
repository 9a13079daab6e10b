from __future__ import annotations

import importlib
import json
import math
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.sinks import RunInfo, Sink, TensorBoardSink, TrackioSink, WandbSink, trackers

ROWS = [{"step": 2, "prompt": [{"role": "user", "content": "2+2"}], "completion": "4", "reward": 1.0, "advantage": 0.5}]


LOGGED = [
    {**ROWS[0], "parsed": "4", "length": 1, "mixed": 0.5, "maybe": None},
    {**ROWS[0], "parsed": "5", "length": 2.5, "mixed": "half"},
    {**ROWS[0], "maybe": True},
]


def _use(sink: Sink, run: Path, *, start_step: int = 0, steps: tuple[int, ...] = (1, 2), rows: Any = ROWS) -> None:
    run.mkdir(parents=True, exist_ok=True)
    config = {"learning_rate": 1e-3, "output_dir": str(run)}
    sink.start(RunInfo(run_dir=run, model="m", dataset="d", max_steps=9, start_step=start_step, config=config))
    for step in steps:
        forecast: dict[str, Any] | None = {"median": 0.9, "x80": None, "phase": "plateau"} if step > 1 else None
        sink.log_step({"step": step, "reward": step / 10, "entropy": math.nan}, forecast)
    sink.log_event(2, "warn", "look")
    sink.log_completions([])
    sink.log_completions(rows)
    sink.close()
    sink.close()


@pytest.mark.parametrize(("sink", "module"), [(TensorBoardSink, "tensorboard"), (WandbSink, "wandb"), (TrackioSink, "trackio")])
def test_a_missing_package_is_named_with_its_cure(sink: type[Any], module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs the package '{module}'.*pip install 'grpo-fast\[tracking\]'"):
        sink()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard", "ignore::DeprecationWarning:google")
def test_tensorboard_files_hold_the_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    _use(TensorBoardSink(), tmp_path, rows=LOGGED)
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, round(event.value, 6)) for event in read.Scalars("reward")] == [(1, 0.1), (2, 0.2)]
    assert [event.step for event in read.Scalars("forecast/median")] == [2]
    assert set(read.Tags()["scalars"]) == {"reward", "forecast/median"}
    text = {tag: read.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in read.Tags()["tensors"]}
    assert text["event/warn/text_summary"] == "look"
    assert "user: 2+2" in text["completions/text_summary"]
    assert ">>> 4" in text["completions/text_summary"]
    assert "reward 1.0, advantage 0.5, parsed 4, length 1, mixed 0.5" in text["completions/text_summary"]
    assert "learning_rate = 0.001" in text["config/text_summary"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard", "ignore::DeprecationWarning:google")
def test_a_resumed_tensorboard_run_hides_what_was_undone(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    _use(TensorBoardSink(), tmp_path, steps=(1, 2, 3))
    _use(TensorBoardSink(), tmp_path, start_step=1, steps=(2,))
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Scalars("reward")] == [1, 2]


def test_a_table_has_all_columns_and_one_kind_of_cell_in_each() -> None:
    columns, data = trackers._table(LOGGED)
    assert columns == ["step", "prompt", "completion", "reward", "advantage", "parsed", "length", "mixed", "maybe"]
    assert [row[:5] for row in data] == [[2, "user: 2+2", "4", 1.0, 0.5]] * 3
    assert [row[5:] for row in data] == [["4", 1, "0.5", None], ["5", 2.5, "half", None], [None, None, None, True]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_keeps_the_run_and_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    _use(WandbSink(), run, rows=LOGGED)
    wandb.teardown()  # its service process writes the file's last block when it goes
    identity = (run / "wandb_id").read_text().strip()
    (log,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    for word in (b"reward", b"forecast/median", b"learning_rate", identity.encode()):
        assert word in content, word
    assert b"entropy" not in content
    assert (
        json.loads(next((run / "wandb").glob("offline-run-*/files/media/table/*.json")).read_text())["data"][0][1]
        == "user: 2+2"
    )
    _use(WandbSink(), run, start_step=1, steps=(2,))
    assert (run / "wandb_id").read_text().strip() == identity
    _use(WandbSink(), run)
    assert (run / "wandb_id").read_text().strip() != identity


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({}, ("grpo-fast", "run")),
        ({"WANDB_PROJECT": "mine"}, ("mine", "run")),
        ({"WANDB_PROJECT": "mine", "WANDB_NAME": "first"}, ("mine", "first")),
    ],
    ids=["neither", "project", "both"],
)
def test_what_wandb_reads_from_the_environment_wins(
    said: dict[str, str], wanted: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    wandb.teardown()  # the environment is read once
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", **said}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run").mkdir()
    sink = WandbSink()
    sink.start(RunInfo(run_dir=tmp_path / "run", model="m", dataset="d", max_steps=9))
    assert (sink._run.project, sink._run.name) == wanted
    sink.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trackio_stores_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    _use(TrackioSink(), tmp_path / "run", rows=LOGGED)
    (database,) = (tmp_path / "store").glob("grpo-fast*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics order by step, id").fetchall()
    logged = [(step, json.loads(metrics)) for step, metrics in rows]
    rewards = [(step, metrics["reward"]) for step, metrics in logged if "reward" in metrics]
    assert rewards == [(1, 0.1), (2, 0.2)]
    assert any(metrics.get("forecast/median") == 0.9 for _, metrics in logged)
    assert any("completions" in metrics for _, metrics in logged)
    assert not any("entropy" in metrics for _, metrics in logged)
    # trackio goes on with the newest run of a name, as one of a sweep with a/run and b/run
    other = tmp_path / "other" / "run"
    _use(TrackioSink(), other, rows=[])
    _use(TrackioSink(), tmp_path / "run", start_step=2, steps=(3,), rows=[])
    names = [(run / "trackio_name").read_text(encoding="utf-8").strip() for run in (tmp_path / "run", other)]
    assert all(name.startswith("run-") for name in names)
    with sqlite3.connect(database) as connection:
        found = connection.execute("select distinct run_name, step from metrics order by step").fetchall()
    assert {name: [step for of, step in found if of == name] for name in names} == {names[0]: [1, 2, 3], names[1]: [1, 2]}
