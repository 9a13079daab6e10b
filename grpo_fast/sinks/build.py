"""From the names in a configuration to sinks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from rich.console import Console

from grpo_fast.sinks.console import ConsoleSink
from grpo_fast.sinks.jsonl import JsonlSink
from grpo_fast.sinks.sink import Sink, SinkSet
from grpo_fast.sinks.trackers import TensorBoardSink, TrackioSink, WandbSink

TRACKERS: Mapping[str, Callable[[], Sink]] = MappingProxyType(
    {"tensorboard": TensorBoardSink, "wandb": WandbSink, "trackio": TrackioSink}
)


def build_sinks(names: Sequence[str], run_dir: str | Path, *, console: Console | None = None) -> tuple[JsonlSink, SinkSet]:
    """Builds what a run logs to.

    Args:
        names: sinks beside the JSONL files: ``console``, ``tensorboard``, ``wandb``, ``trackio``; a repeated name counts once.
        run_dir: directory of the run.
        console: where the ``console`` sink writes; standard output without one.

    Returns:
        The sink of the JSONL files, which also truncates and saves state, and all sinks as one, it among them.

    Raises:
        ValueError: an unknown name.
        ImportError: a tracker whose package is missing; the message says how to install it.
    """
    known = ("console", *TRACKERS)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown sink {name!r}; known are {', '.join(known)} (the JSONL files are always written)")
    jsonl = JsonlSink(run_dir)
    others = [ConsoleSink(console) if name == "console" else TRACKERS[name]() for name in dict.fromkeys(names)]
    return jsonl, SinkSet([jsonl, *others], record=jsonl)
