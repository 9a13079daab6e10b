"""TensorBoard, Weights & Biases and trackio: thin sinks, each behind a lazy import of its own package."""

from __future__ import annotations

import importlib
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_fast.run_dir import write_whole
from grpo_fast.sinks.sink import RunInfo
from grpo_fast.types import COMPLETION_COLUMNS

PROJECT = "grpo-fast"
_FORECAST_VALUES = ("median", "low", "high", "plateau", "plateau_low", "plateau_high", "x80", "x95", "p_gain_below_eps")


def _require(module: str, *, sink: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the sink {sink!r} needs the package {package!r} ({error}); install it with: pip install 'grpo-fast[tracking]'"
        ) from error


def _scalars(metrics: Mapping[str, float], forecast: Mapping[str, Any] | None) -> dict[str, float]:
    """Finite numbers of a step, the forecast's under ``forecast/``, without the step itself."""
    values: dict[str, Any] = {key: value for key, value in metrics.items() if key != "step"}
    values |= {f"forecast/{key}": forecast.get(key) for key in _FORECAST_VALUES} if forecast is not None else {}
    return {key: float(value) for key, value in values.items() if value is not None and math.isfinite(value)}


def _words(prompt: Any) -> str:
    """A prompt, text or chat messages, as text."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Completions as names of columns and rows of cells; a column whose cells are of several kinds is text."""
    columns = list(dict.fromkeys([*COMPLETION_COLUMNS, *(name for row in rows for name in row)]))
    cells = {name: [row.get(name) for row in rows] for name in columns}
    cells["prompt"] = [_words(prompt) for prompt in cells["prompt"]]
    for name, values in cells.items():
        kinds = {float if type(value) is int else type(value) for value in values if value is not None}
        if len(kinds) > 1:
            cells[name] = [None if value is None else str(value) for value in values]
    return columns, [list(row) for row in zip(*cells.values(), strict=True)]


class TensorBoardSink:
    """Writes event files into ``<run>/tensorboard``.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self) -> None:
        _require("tensorboard", sink="tensorboard", package="tensorboard")
        self._module = _require("torch.utils.tensorboard", sink="tensorboard", package="tensorboard")
        self._writer: Any = None

    def start(self, info: RunInfo) -> None:
        """Opens the event file; a resumed run hides what was logged after its checkpoint."""
        purge = info.start_step + 1 if info.start_step else None
        self._writer = self._module.SummaryWriter(log_dir=str(info.run_dir / "tensorboard"), purge_step=purge)
        settings = "\n".join(f"    {key} = {value!r}" for key, value in info.config.items())
        self._writer.add_text("config", settings or f"    model = {info.model!r}", info.start_step)

    def log_step(self, metrics: Mapping[str, float], forecast: Mapping[str, Any] | None = None) -> None:
        """Writes one scalar for each finite metric."""
        for name, value in _scalars(metrics, forecast).items():
            self._writer.add_scalar(name, value, int(metrics["step"]))

    def log_event(self, step: int, event: str, message: str) -> None:
        """Writes the event as text."""
        self._writer.add_text(f"event/{event}", message, step)

    def log_completions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the completions of a step as one text."""
        if rows:
            parts = [
                ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("step", "prompt", "completion"))
                + "\n\n"
                + "\n".join("    " + line for line in f"{_words(row['prompt'])}\n>>> {row['completion']}".splitlines())
                for row in rows
            ]
            self._writer.add_text("completions", "\n\n".join(parts), int(rows[0]["step"]))

    def close(self) -> None:
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbSink:
    """Logs to Weights & Biases, online or offline as ``WANDB_MODE`` and ``wandb offline`` say.

    The project is ``grpo-fast`` and the run has its directory's name, unless ``WANDB_PROJECT`` and ``WANDB_NAME`` say others.
    The run's id is kept in ``<run>/wandb_id``, so that a resumed run goes on in the same place.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self) -> None:
        self._wandb = _require("wandb", sink="wandb", package="wandb")
        self._run: Any = None

    def start(self, info: RunInfo) -> None:
        """Opens the run."""
        identity = info.run_dir / "wandb_id"
        known = identity.read_text(encoding="utf-8").strip() if info.start_step and identity.exists() else None
        ours = {"project": PROJECT, "name": info.run_dir.name}
        self._run = self._wandb.init(
            **{key: value for key, value in ours.items() if not os.environ.get(f"WANDB_{key.upper()}")},
            dir=str(info.run_dir),
            config=dict(info.config),
            id=known,
            resume="allow" if known else None,
        )
        identity.write_text(f"{self._run.id}\n", encoding="utf-8")

    def log_step(self, metrics: Mapping[str, float], forecast: Mapping[str, Any] | None = None) -> None:
        """Logs the finite metrics of a step."""
        self._run.log(_scalars(metrics, forecast), step=int(metrics["step"]))

    def log_event(self, step: int, event: str, message: str) -> None:
        """Raises a W&B alert for the end of a run and for warnings; other events are in the JSONL files."""
        if event in {"warn", "stop", "budget", "interrupt"}:
            self._run.alert(title=f"{event} at step {step}", text=message)

    def log_completions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs the completions of a step as a table, with the metrics of the same step."""
        if rows:
            columns, data = _table(rows)
            self._run.log({"completions": self._wandb.Table(columns=columns, data=data)}, step=int(rows[0]["step"]))

    def close(self) -> None:
        """Finishes the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class TrackioSink:
    """Logs to trackio's local store (``trackio show`` opens it).

    The run has its directory's name and a few letters of its own, as trackio goes on with the newest run of a name, which may
    be another one's. The whole name is kept in ``<run>/trackio_name``, by which a resumed run goes on in the same place.

    Raises:
        ImportError: trackio is not installed.
    """

    def __init__(self) -> None:
        self._trackio = _require("trackio", sink="trackio", package="trackio")
        self._started = False

    def start(self, info: RunInfo) -> None:
        """Opens the run; a resumed one goes on under the same name."""
        config = {key: str(value) if isinstance(value, Path) else value for key, value in info.config.items()}
        kept = info.run_dir / "trackio_name"
        known = kept.read_text(encoding="utf-8").strip() if info.start_step and kept.exists() else None
        name = known or f"{info.run_dir.name}-{uuid.uuid4().hex[:6]}"
        self._trackio.init(project=PROJECT, name=name, config=config, resume="allow" if known else "never", embed=False)
        write_whole(kept, f"{name}\n")
        self._started = True

    def log_step(self, metrics: Mapping[str, float], forecast: Mapping[str, Any] | None = None) -> None:
        """Logs the finite metrics of a step."""
        self._trackio.log(_scalars(metrics, forecast), step=int(metrics["step"]))

    def log_event(self, step: int, event: str, message: str) -> None:
        """Nothing: trackio has no place for events; they are in the JSONL files."""

    def log_completions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs the completions of a step as a table."""
        if rows:
            pandas = _require("pandas", sink="trackio", package="pandas")
            columns, data = _table(rows)
            frame = pandas.DataFrame(data, columns=columns).drop(columns="step")
            self._trackio.log({"completions": self._trackio.Table(dataframe=frame)}, step=int(rows[0]["step"]))

    def close(self) -> None:
        """Finishes the run."""
        if self._started:
            self._trackio.finish()
            self._started = False
