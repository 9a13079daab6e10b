from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.config import Config
from grpo_fast.sinks import ConsoleSink, JsonlSink, RunInfo, Sink, SinkSet


class _Recorder:
    def __init__(self, name: str, calls: list[str], *, fails: bool = False) -> None:
        self.name, self.calls, self.fails = name, calls, fails

    def start(self, info: RunInfo) -> None:
        self.calls.append(f"{self.name} start {info.max_steps}")

    def log_step(self, metrics: Mapping[str, float], forecast: Mapping[str, Any] | None = None) -> None:
        self.calls.append(f"{self.name} step {metrics['step']} {forecast}")

    def log_event(self, step: int, event: str, message: str) -> None:
        self.calls.append(f"{self.name} event {step} {event} {message}")

    def log_completions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.calls.append(f"{self.name} rows {len(rows)}")

    def close(self) -> None:
        self.calls.append(f"{self.name} close")
        if self.fails:
            raise RuntimeError(f"{self.name} cannot close")


def test_a_set_hands_everything_to_all_in_order(tmp_path: Path) -> None:
    calls: list[str] = []
    sinks = SinkSet([_Recorder("a", calls), _Recorder("b", calls)])
    sinks.start(RunInfo(run_dir=tmp_path, model="m", dataset="d", max_steps=7))
    sinks.log_step({"step": 1}, {"median": 0.5})
    sinks.log_event(1, "warn", "x")
    sinks.log_completions([{}, {}])
    wanted = ["start 7", "step 1 {'median': 0.5}", "event 1 warn x", "rows 2"]
    assert calls == [f"{name} {call}" for call in wanted for name in "ab"]
    assert [sink.name for sink in sinks] == ["a", "b"]  # type: ignore[attr-defined]


def test_all_are_closed_where_one_fails() -> None:
    calls: list[str] = []
    with pytest.raises(RuntimeError, match="b cannot close"):
        SinkSet([_Recorder("a", calls), _Recorder("b", calls, fails=True), _Recorder("c", calls)]).close()
    assert sorted(calls) == ["a close", "b close", "c close"]


class _Asking(_Recorder):
    def __init__(self, name: str, calls: list[str], answer: str | None) -> None:
        super().__init__(name, calls)
        self.answer = answer

    def ask(self, question: str, answers: Mapping[str, str], *, give_up: Callable[[], bool]) -> str | None:
        self.calls.append(f"{self.name} asks {question} {list(answers)} {give_up()}")
        return self.answer


def test_one_sink_with_somebody_there_is_asked() -> None:
    calls: list[str] = []
    nobody, one, other = _Asking("a", calls, None), _Asking("c", calls, ""), _Asking("d", calls, "yes")
    sinks = SinkSet([nobody, _Recorder("b", calls), one, other])
    assert sinks.ask("well?", {"yes": "do"}, give_up=lambda: True) == ""
    assert calls == ["a asks well? ['yes'] True", "c asks well? ['yes'] True"]
    assert SinkSet([nobody, _Recorder("b", calls)]).ask("well?", {}, give_up=bool) is None


def test_the_sinks_keep_the_protocol(tmp_path: Path) -> None:
    for sink in (JsonlSink(tmp_path), ConsoleSink(), SinkSet([])):
        assert isinstance(sink, Sink)


def test_a_run_whose_configuration_is_not_told_has_its_defaults(tmp_path: Path) -> None:
    info, config = RunInfo(run_dir=tmp_path, model="m", dataset="d", max_steps=1), Config()
    assert (info.forecast_epsilon, info.forecast_confidence) == (config.forecast_epsilon, config.forecast_confidence)
