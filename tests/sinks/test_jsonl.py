from __future__ import annotations

import errno
import gc
import json
import math
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from transformers import TrainerState

from grpo_fast.sinks import JsonlSink, RunInfo
from grpo_fast.sinks.jsonl import plain


def _info(path: Path, **options: object) -> RunInfo:
    return RunInfo(run_dir=path, model="m", dataset="d", max_steps=9, **options)  # type: ignore[arg-type]


def _rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def sink(tmp_path: Path) -> JsonlSink:
    sink = JsonlSink(tmp_path / "run")
    sink.start(_info(tmp_path / "run", config={"save_steps": 3, "eval_steps": 2, "prompts_per_step": 4, "num_generations": 8}))
    return sink


def test_what_goes_in_comes_out(sink: JsonlSink) -> None:
    metrics = {"reward": 0.1, "step": 1, "entropy": math.nan, "kl": math.inf, "eval_reward": np.float32(0.5)}
    sink.log_step(metrics)
    sink.log_step(
        {"step": 2, "reward": 0.25}, {"median": 0.9, "x80": None, "band": {"low": [0.1, math.nan]}, "identifiable": True}
    )
    sink.log_event(2, "warn", "a line\nand 'ü' and \udc80")
    sink.log_completions(
        [{"step": 2, "prompt": [{"role": "user", "content": "é"}], "completion": "x", "reward": None, "advantage": 1}]
    )
    sink.log_completions([])
    sink.close()
    run = sink.run_dir
    assert _rows(run / "metrics.jsonl") == [
        {"step": 1, "reward": 0.1, "entropy": None, "kl": None, "eval_reward": 0.5},
        {"step": 2, "reward": 0.25},
    ]
    assert next(iter(_rows(run / "metrics.jsonl")[0])) == "step"
    assert _rows(run / "forecasts.jsonl") == [
        {"step": 2, "median": 0.9, "x80": None, "band": {"low": [0.1, None]}, "identifiable": True}
    ]
    assert _rows(run / "events.jsonl") == [{"step": 2, "event": "warn", "message": "a line\nand 'ü' and \udc80"}]
    assert _rows(run / "completions.jsonl")[0]["prompt"] == [{"role": "user", "content": "é"}]


def test_every_row_is_on_its_way_at_once(sink: JsonlSink) -> None:
    sink.log_step({"step": 1, "reward": 0.1})
    assert _rows(sink.run_dir / "metrics.jsonl") == [{"step": 1, "reward": 0.1}]


def test_values_that_json_has_no_word_for_are_refused(sink: JsonlSink) -> None:
    assert plain({"a": (np.int64(3), np.bool_(True), np.float64("nan")), 4: None}) == {"a": [3, True, None], "4": None}
    with pytest.raises(TypeError, match="object"):
        plain([object()])
    with pytest.raises(ValueError, match="need 'step'"):
        sink.log_step({"reward": 1.0})
    assert not (sink.run_dir / "metrics.jsonl").exists()


def test_truncation_drops_what_is_newer_than_the_checkpoint(sink: JsonlSink) -> None:
    for step in range(1, 7):
        sink.log_step({"step": step, "reward": step / 10}, {"median": 0.5})
        sink.log_event(step, "checkpoint", "")
    (sink.run_dir / "completions.jsonl").write_text('{"step": 4}\n{"step": 5}\n{"st')
    sink.truncate(4)
    for name in ("metrics", "forecasts", "events"):
        assert [row["step"] for row in _rows(sink.run_dir / f"{name}.jsonl")] == [1, 2, 3, 4]
    assert _rows(sink.run_dir / "completions.jsonl") == [{"step": 4}]
    sink.log_step({"step": 5, "reward": 9.0})
    assert [row["step"] for row in _rows(sink.run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert not list(sink.run_dir.glob(".*"))


def test_truncation_names_a_damaged_line(sink: JsonlSink) -> None:
    (sink.run_dir / "metrics.jsonl").write_text('{"step": 1}\n{"reward": 1}\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not a JSON row with a step"):
        sink.truncate(1)


def test_a_half_written_line_is_cut_before_the_next(sink: JsonlSink) -> None:
    (sink.run_dir / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "rew')
    sink.log_step({"step": 2})
    assert _rows(sink.run_dir / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_killed_process_leaves_whole_lines(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from grpo_fast.sinks.jsonl import JsonlSink\n"
        "sink = JsonlSink(sys.argv[1]); step = 0\n"
        "while True:\n"
        "    step += 1; sink.log_step({'step': step} | {f'm{i}': i / 7 for i in range(2000)})\n"
        "    if step == 3: print('ready', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    sink = JsonlSink(tmp_path)
    sink.truncate(3)
    assert [row["step"] for row in _rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_files_that_nobody_closed_are_closed_with_the_sink(tmp_path: Path) -> None:
    def opened() -> list[str]:
        places = [entry.resolve() for entry in Path("/proc/self/fd").iterdir()]
        return sorted(place.name for place in places if place.parent == tmp_path)

    sink = JsonlSink(tmp_path)
    sink.log_step({"step": 1}, {"median": 0.5})
    sink.log_event(1, "warn", "attention")
    assert opened() == ["events.jsonl", "forecasts.jsonl", "metrics.jsonl"]
    del sink
    gc.collect()
    assert opened() == []


def test_a_full_disk_is_named(sink: JsonlSink, monkeypatch: pytest.MonkeyPatch) -> None:
    (sink.run_dir / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(os, "ftruncate", lambda *_: None)
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"")
    with pytest.raises(OSError, match="cannot write the run's record") as caught:
        sink.log_step({"step": 1})
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(sink.run_dir / "metrics.jsonl")


def test_trainer_state_is_what_transformers_reads(sink: JsonlSink) -> None:
    sink.log_step({"step": 1, "reward": 0.1, "num_tokens": 100.0, "flops": 5e9})
    sink.log_step({"step": 2, "reward": 0.2, "eval_reward": 0.3, "num_tokens": 200.0, "flops": 1e10})
    sink.log_step({"step": 3, "reward": math.nan, "num_tokens": 300.0, "flops": 2e10})
    path = sink.save_state(2, best_metric=0.2, best_step=2, best_checkpoint="best")
    assert path == sink.run_dir / "trainer_state.json"
    state = TrainerState.load_from_json(str(path))
    assert (state.global_step, state.max_steps, state.best_metric, state.best_global_step) == (2, 9, 0.2, 2)
    assert (state.train_batch_size, state.save_steps, state.eval_steps) == (32, 3, 2)
    assert (state.num_input_tokens_seen, state.total_flos) == (200, 1e10)
    assert [row["step"] for row in state.log_history] == [1, 2, 2]
    assert state.log_history[1] == {"step": 2, "reward": 0.2, "num_tokens": 200.0, "flops": 1e10}
    assert state.log_history[2] == {"eval_reward": 0.3, "step": 2}
    assert not list(sink.run_dir.glob(".*"))


def test_the_memory_for_the_trainer_state_is_that_of_a_row(sink: JsonlSink) -> None:
    peaks = []
    for last in (200, 2000):
        for step in range(last // 2, last):
            sink.log_step({"step": step} | {f"metric/{number}": step / 7 for number in range(40)})
        tracemalloc.start()
        sink.save_state(last)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_trainer_state_before_anything(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    with pytest.raises(ValueError, match="started sink"):
        sink.save_state(0)
    sink.start(_info(tmp_path))
    state = TrainerState.load_from_json(str(sink.save_state(0, best_metric=math.nan)))
    assert (state.log_history, state.best_metric) == ([], None)
    sink.close()
    sink.close()
