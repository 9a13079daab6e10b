"""Destinations of a run's numbers: JSON Lines always, and a live console, TensorBoard, W&B or trackio as well."""

from __future__ import annotations

from grpo_fast.sinks.build import build_sinks
from grpo_fast.sinks.console import ConsoleSink
from grpo_fast.sinks.jsonl import JsonlSink
from grpo_fast.sinks.sink import Asks, RunInfo, Sink, SinkSet
from grpo_fast.sinks.trackers import TensorBoardSink, TrackioSink, WandbSink

__all__ = [
    "Asks",
    "ConsoleSink",
    "JsonlSink",
    "RunInfo",
    "Sink",
    "SinkSet",
    "TensorBoardSink",
    "TrackioSink",
    "WandbSink",
    "build_sinks",
]
