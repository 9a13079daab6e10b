"""The run's own record: JSON Lines that survive a kill, and Hugging Face's ``trainer_state.json``.

A row is one write of one whole line, so that a killed process leaves at most one half line at a file's end; the next
writer cuts it off. Nothing is flushed to the disk before a checkpoint is, which is what a resumed run goes back to.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_fast.run_dir import replaced
from grpo_fast.sinks.sink import RunInfo

METRICS = "metrics.jsonl"
FORECASTS = "forecasts.jsonl"
EVENTS = "events.jsonl"
COMPLETIONS = "completions.jsonl"
STREAMS = (METRICS, FORECASTS, EVENTS, COMPLETIONS)
TRAINER_STATE = "trainer_state.json"
FACTS = "facts.json"


def plain(value: Any) -> Any:
    """The value in JSON's terms: NaN and infinities become null, NumPy scalars numbers, tuples lists.

    Raises:
        TypeError: a value of another kind.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"cannot write {value!r} of type {type(value).__name__} as JSON; give a number, a string or lists of them")


class _Stream:
    """One append-only file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._close: Callable[[], Any] = lambda: None

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if not rows:
            return
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._close = weakref.finalize(self, os.close, self._descriptor)  # also where nobody calls close
            os.ftruncate(self._descriptor, _whole_lines(self.path.read_bytes()))
        lines = (json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        left = memoryview("".join(lines).encode("utf-8", "backslashreplace"))
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:
            raise OSError(error.errno, f"cannot write the run's record ({error.strerror})", str(self.path)) from error

    def flush(self) -> None:
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        self._close()
        self._descriptor = None


def _whole_lines(content: bytes) -> int:
    """Bytes up to the end of the last whole line."""
    return content.rfind(b"\n") + 1


class JsonlSink:
    """Writes ``metrics``, ``forecasts``, ``events`` and ``completions`` as ``.jsonl`` files into the run's directory."""

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self._streams = {name: _Stream(self.run_dir / name) for name in STREAMS}
        self._info: RunInfo | None = None

    def start(self, info: RunInfo) -> None:
        """Makes the directory where there is none."""
        self._info = info
        self.run_dir.mkdir(parents=True, exist_ok=True)

    def log_step(self, metrics: Mapping[str, float], forecast: Mapping[str, Any] | None = None) -> None:
        """Appends the row of one step, and that of its forecast.

        Raises:
            ValueError: the metrics name no step.
            OSError: the disk is full or not writable; the file is named.
        """
        if "step" not in metrics:
            raise ValueError(f"metrics of a step need 'step'; got {sorted(metrics)}")
        step = int(metrics["step"])
        self._streams[METRICS].append([{"step": step} | {k: v for k, v in metrics.items() if k != "step"}])
        if forecast is not None:
            self._streams[FORECASTS].append([{"step": step} | {k: v for k, v in forecast.items() if k != "step"}])

    def log_event(self, step: int, event: str, message: str) -> None:
        """Appends an event."""
        self._streams[EVENTS].append([{"step": step, "event": event, "message": message}])

    def log_completions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends sample completions."""
        self._streams[COMPLETIONS].append(rows)

    def truncate(self, after_step: int) -> None:
        """Drops every row newer than a checkpoint, and a half-written last line, from all four files.

        Args:
            after_step: step of the checkpoint; its own rows stay. 0 keeps only what was logged before the first step.

        Raises:
            ValueError: a line inside a file is not a JSON row with a step; the file and the line are named.
        """
        for stream in self._streams.values():
            stream.close()
            if not stream.path.exists():
                continue
            content = stream.path.read_bytes()
            lines = content[: _whole_lines(content)].splitlines(keepends=True)
            kept = [line for number, line in enumerate(lines, 1) if _step_of(line, stream.path, number=number) <= after_step]
            with replaced(stream.path) as file:
                file.writelines(kept)

    def save_state(
        self, step: int, *, best_metric: float | None = None, best_step: int | None = None, best_checkpoint: str | None = None
    ) -> Path:
        """Flushes the rows to the disk and rewrites ``trainer_state.json`` atomically.

        It holds what Hugging Face's ``TrainerState`` would after ``step`` steps, ``log_history`` under TRL's names. As there,
        an evaluation is a row of its own, with the ``eval_`` metrics of its step. Rows go from file to file one by one, so
        that a long run needs no more memory than a short one.

        Args:
            step: steps done; later rows are left out.
            best_metric: best reward so far.
            best_step: the step that reached it.
            best_checkpoint: directory that keeps it.

        Returns:
            The file, which may be copied into a checkpoint.

        Raises:
            ValueError: the sink was never started.
        """
        if self._info is None:
            raise ValueError("save_state needs a started sink; call start(info) first")
        for stream in self._streams.values():
            stream.flush()
        last: dict[str, Any] = {}
        comma = ""
        path = self.run_dir / TRAINER_STATE
        with replaced(path) as file:
            file.write(b'{\n "log_history": [')
            for row in self._rows(METRICS):
                if row["step"] > step:
                    continue
                for part in _split_evaluation(row):
                    file.write(f"{comma}\n  {json.dumps(part, ensure_ascii=False, allow_nan=False)}".encode())
                    last, comma = row, ","
            state = _counters(self._info, step, last) | {
                "best_global_step": best_step,
                "best_metric": best_metric if best_metric is None or math.isfinite(best_metric) else None,
                "best_model_checkpoint": best_checkpoint,
            }
            file.write(b"\n ]," + json.dumps(state, indent=1, ensure_ascii=False, allow_nan=False).encode()[1:])
        return path

    def save_facts(self, facts: Mapping[str, Any]) -> Path:
        """Writes ``facts.json``: what the forecast knew of the run before step 1.

        Returns:
            The file.
        """
        path = self.run_dir / FACTS
        with replaced(path) as file:
            file.write(json.dumps(facts, indent=1, allow_nan=False).encode())
        return path

    def close(self) -> None:
        """Closes the files."""
        for stream in self._streams.values():
            stream.close()

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.run_dir / name
        if path.exists():
            with path.open("rb") as file:
                yield from (json.loads(line) for line in file if line.endswith(b"\n"))


def _step_of(line: bytes, path: Path, *, number: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path}, line {number} is not a JSON row with a step: {line[:60]!r}; the file is damaged, delete that line"
        ) from None


def _split_evaluation(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    training = {key: value for key, value in row.items() if not key.startswith("eval_")}
    evaluation = {key: value for key, value in row.items() if key.startswith("eval_") and value is not None}
    if not evaluation:
        return [training]
    return [training, evaluation | {key: row[key] for key in ("epoch", "step") if key in row}]


def _counters(info: RunInfo, step: int, last: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``TrainerState`` that tell how far a run is, from the last row of its metrics."""
    config = info.config
    return {
        "epoch": last.get("epoch"),
        "eval_steps": config.get("eval_steps") or None,
        "global_step": step,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "logging_steps": 1,
        "max_steps": info.max_steps,
        "num_input_tokens_seen": int(last.get("num_tokens") or 0),
        "num_train_epochs": 1,
        "save_steps": config.get("save_steps", 500),
        "stateful_callbacks": {},
        "total_flos": float(last.get("flops") or 0.0),
        "train_batch_size": config.get("prompts_per_step", 1) * config.get("num_generations", 1),
        "trial_name": None,
        "trial_params": None,
    }
