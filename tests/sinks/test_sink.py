from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.config import Config
from grpo_fast.sinks import ConsoleSink, JsonlSink, RunInfo, Sink, SinkSet


class _Recorder:
    def __init__(self, name: str, calls: list[str], *, fails_to: tuple[str, ...] = ()) -> None:
        self.name, self.calls, self.fails_to = name, calls, fails_to

    def _call(self, kind: str, *told: object) -> None:
        self.calls.append(" ".join(map(str, (self.name, kind, *told))))
        if kind in self.fails_to:
            raise RuntimeError(f"{self.name} cannot {kind}")

    def start(self, info: RunInfo) -> None:
        self._call("start", info.max_steps)

    def log_step(self, metrics: Mapping[str, float], forecast: Mapping[str, Any] | None = None) -> None:
        self._call("step", metrics["step"], forecast)

    def log_event(self, step: int, event: str, message: str) -> None:
        self._call("event", step, event, message)

    def log_completions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._call("rows", len(rows))

    def close(self) -> None:
        self._call("close")


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


def test_what_a_sink_does_to_what_it_gets_reaches_no_other() -> None:
    class Rounds(_Recorder):
        def log_step(self, metrics: Any, forecast: Any = None) -> None:
            self.calls.append(f"{metrics} {forecast}")
            metrics["reward"] = round(metrics["reward"])
            metrics.pop("step")
            forecast["band"]["low"].clear()

        def log_completions(self, rows: Any) -> None:
            self.calls.append(f"{rows}")
            rows.pop()["reward"] = None

    calls: list[str] = []
    metrics, forecast, rows = {"step": 3, "reward": 0.4}, {"band": {"low": [0.1]}}, [{"reward": 0.5}]
    sinks = SinkSet([Rounds("a", calls), Rounds("b", calls)])
    sinks.log_step(metrics, forecast)
    sinks.log_completions(rows)
    assert calls == [f"{metrics} {forecast}"] * 2 + [f"{rows}"] * 2
    assert (metrics, forecast, rows) == ({"step": 3, "reward": 0.4}, {"band": {"low": [0.1]}}, [{"reward": 0.5}])


def test_all_are_closed_where_one_fails(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []
    sinks = [_Recorder("a", calls), _Recorder("b", calls, fails_to=("close",)), _Recorder("c", calls)]
    SinkSet(sinks).close()
    assert calls == ["c close", "b close", "a close"]
    [told] = [record.message for record in caplog.records]
    assert told.startswith("the sink _Recorder raised RuntimeError: b cannot close (")
    assert told.endswith(" when it was closed")
    with pytest.raises(RuntimeError, match="b cannot close"):
        SinkSet(sinks, record=sinks[1]).close()
    assert calls == ["c close", "b close", "a close"] * 2


@pytest.mark.parametrize("fails_to", ["step", "event", "rows"])
def test_a_sink_that_fails_is_told_once_and_left_out(fails_to: str, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []
    record, failing, other = _Recorder("a", calls), _Recorder("b", calls, fails_to=(fails_to, "close")), _Recorder("c", calls)
    sinks = SinkSet([record, failing, other], record=record)

    def run() -> None:
        sinks.log_step({"step": 3})
        sinks.log_event(3, "eval", "x")
        sinks.log_completions([{}])

    run()
    warned = [call for call in calls if " warn " in call]
    assert [call.partition(" raised ")[0] for call in warned] == [f"{name} event 3 warn the sink _Recorder" for name in "ac"]
    assert f"RuntimeError: b cannot {fails_to} (" in warned[0]
    assert warned[0].endswith("; the run continues without it")
    assert calls.count("b close") == 1
    assert [record.message.rpartition(" when ")[2] for record in caplog.records] == ["it was closed"]
    calls.clear()
    run()
    sinks.close()
    assert calls == [f"{name} {call}" for call in ("step 3 None", "event 3 eval x", "rows 1") for name in "ac"] + [
        "c close",
        "a close",
    ]


def test_a_sink_that_fails_to_tell_of_anothers_failure_is_left_out_at_once() -> None:
    calls: list[str] = []
    fails_to = ("step", "event")
    record, other = _Recorder("a", calls), _Recorder("d", calls)
    sinks = SinkSet(
        [record, _Recorder("b", calls, fails_to=fails_to), _Recorder("c", calls, fails_to=fails_to), other], record=record
    )
    sinks.log_step({"step": 1})
    assert list(sinks) == [record, other]
    assert [call.partition(" warn ")[0] for call in calls] == [
        *("a step 1 None", "b step 1 None"),
        *("a event 1", "c event 1", "a event 1", "d event 1", "c close"),  # c fails to tell of b
        *("d event 1", "b close"),
        "d step 1 None",
    ]


def test_where_no_sink_shows_a_warning_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    record = _Recorder("a", [])
    SinkSet([record, _Recorder("b", [], fails_to=("step",))], record=record).log_step({"step": 1})
    assert "b cannot step" in caplog.text


def test_what_the_record_raises_is_raised_and_so_is_what_keeps_a_sink_from_starting(tmp_path: Path) -> None:
    record = _Recorder("a", [], fails_to=("step", "start"))
    with pytest.raises(RuntimeError, match="a cannot step"):
        SinkSet([record], record=record).log_step({"step": 1})
    with pytest.raises(RuntimeError, match="a cannot start"):
        SinkSet([record]).start(RunInfo(run_dir=tmp_path, model="m", dataset="d", max_steps=7))


class _Asking(_Recorder):
    def __init__(self, name: str, calls: list[str], answer: str | None, *, fails_to: tuple[str, ...] = ()) -> None:
        super().__init__(name, calls, fails_to=fails_to)
        self.answer = answer

    def ask(self, question: str, answers: Mapping[str, str], *, give_up: Callable[[], bool]) -> str | None:
        self._call("asks", question, list(answers), give_up())
        return self.answer


def test_one_sink_with_somebody_there_is_asked() -> None:
    calls: list[str] = []
    nobody, one, other = _Asking("a", calls, None), _Asking("c", calls, ""), _Asking("d", calls, "yes")
    sinks = SinkSet([nobody, _Recorder("b", calls), one, other])
    assert sinks.ask("well?", {"yes": "do"}, give_up=lambda: True) == ""
    assert calls == ["a asks well? ['yes'] True", "c asks well? ['yes'] True"]
    assert SinkSet([nobody, _Recorder("b", calls)]).ask("well?", {}, give_up=bool) is None


def test_a_sink_that_fails_to_ask_is_left_out_and_the_next_one_asked() -> None:
    calls: list[str] = []
    record = _Recorder("a", calls)
    failing, other = _Asking("b", calls, "no", fails_to=("asks",)), _Asking("c", calls, "yes")
    sinks = SinkSet([record, failing, other], record=record)
    assert sinks.ask("well?", {}, give_up=bool) == "yes"
    assert list(sinks) == [record, other]
    told = [call.partition(" raised ")[0] for call in calls]
    warned = "event 0 warn the sink _Asking"
    assert told == ["b asks well? [] False", f"a {warned}", f"c {warned}", "b close", "c asks well? [] False"]


def test_the_sinks_keep_the_protocol(tmp_path: Path) -> None:
    for sink in (JsonlSink(tmp_path), ConsoleSink(), SinkSet([])):
        assert isinstance(sink, Sink)


def test_a_run_whose_configuration_is_not_told_has_its_defaults(tmp_path: Path) -> None:
    info, config = RunInfo(run_dir=tmp_path, model="m", dataset="d", max_steps=1), Config()
    assert (info.forecast_epsilon, info.forecast_confidence) == (config.forecast_epsilon, config.forecast_confidence)
