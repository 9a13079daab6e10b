from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from grpo_fast.sinks import ConsoleSink, JsonlSink, RunInfo, TensorBoardSink, build_sinks


def test_names_become_sinks_and_the_files_are_always_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    jsonl, sinks = build_sinks(["console", "tensorboard", "console"], tmp_path)
    assert [type(sink) for sink in sinks] == [JsonlSink, ConsoleSink, TensorBoardSink]
    assert next(iter(sinks)) is jsonl
    assert [type(sink) for sink in build_sinks([], tmp_path)[1]] == [JsonlSink]


def test_a_console_may_be_given(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    jsonl, sinks = build_sinks(["console"], tmp_path, console=console)
    sinks.start(RunInfo(run_dir=tmp_path, model="m", dataset="d", max_steps=3))
    sinks.log_step({"step": 1, "reward": 0.5})
    sinks.close()
    assert "step 1/3" in console.file.getvalue()  # type: ignore[attr-defined]
    assert (jsonl.run_dir / "metrics.jsonl").read_text() == '{"step": 1, "reward": 0.5}\n'


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown sink 'mlflow'; known are console, tensorboard, wandb, trackio"):
        build_sinks(["console", "mlflow"], tmp_path)
