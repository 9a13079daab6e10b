from __future__ import annotations

import dataclasses
import io
import math
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from grpo_fast.sinks import ConsoleSink, RunInfo
from grpo_fast.sinks.console import sparkline

FORECAST: dict[str, Any] = {
    "plateau": 0.913,
    "plateau_low": 0.874,
    "plateau_high": 0.941,
    "x80": 84,
    "x95": None,
    "phase": "rapid improvement",
    "phase_probability": 0.83,
    "p_gain_below_eps": 0.12,
    "identifiable": True,
    "reason": "",
}


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _metrics(step: int, **more: float) -> dict[str, float]:
    row = {"step": step, "reward": step / 100, "num_tokens": 5000.0 * step, "step_time": 2.0, "flops": 6.4e9 * step}
    row |= {"gpu_seconds": 2.0 * step, "energy_kwh": 1e-4 * step, "money": 0.01 * step, "budget/steps": 1 - step / 100}
    return row | {"time/rollout": 1.5, "time/train": 0.5, "time/sync": 0.0} | more


def _info(**options: Any) -> RunInfo:
    return RunInfo(**{"run_dir": Path("runs/x"), "model": "tiny", "dataset": "sums", "max_steps": 100} | options)


def _plain(clock: Any = lambda: 0.0) -> tuple[ConsoleSink, io.StringIO]:
    file = io.StringIO()
    return ConsoleSink(Console(file=file, width=80), clock=clock), file


def _screen(width: int, *, height: int = 40, info: RunInfo | None = None) -> tuple[ConsoleSink, Console]:
    console = Console(file=_Terminal(), width=width, height=height, force_terminal=True, record=True, legacy_windows=False)
    sink = ConsoleSink(console)
    sink.start(info or _info(device="CPU"))
    return sink, console


def _shown(console: Console) -> str:
    return console.export_text().rsplit("╭", 1)[1]


def test_one_step_is_one_step() -> None:
    sink, file = _plain()
    sink.start(dataclasses.replace(_info(), max_steps=1))
    assert ", at most 1 step" in file.getvalue()
    assert "1 steps" not in file.getvalue()
    sink.close()


def test_lines_of_a_pipe_are_plain_and_few() -> None:
    sink, file = _plain()
    sink.start(_info(start_step=3, device="CPU, 2 cores"))
    sink.log_event(3, "resume", "from checkpoint-3")
    for step in range(4, 30):
        extra = {"eval_reward": 0.2} if step == 24 else {}
        sink.log_step(_metrics(step, **extra, **{"budget/gpu_hours": 0.5}), FORECAST if step > 10 else None)
    sink.log_completions([])
    sink.close()
    sink.close()
    lines = file.getvalue().splitlines()
    assert lines[0] == "grpo-fast: tiny learns sums, at most 100 steps, from step 3 on CPU, 2 cores; runs/x"
    assert lines[1] == "[resume] step 3: from checkpoint-3"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["step 4/100", "step 14/100", "step 24/100", "step 29/100"]
    assert "reward 0.095" in lines[3]
    assert "plateau 0.913 [0.874, 0.941] | phase: rapid improvement 83 % | P(gain<0.01) 12 %" in lines[3]
    assert "2.50 k tokens/s | 2 s/step | 89.6 GFLOP | device hours left 50 %" in lines[3]
    assert "held-out 0.200" in lines[4]
    assert "plateau" not in lines[2]
    assert file.getvalue().isascii()
    assert "\x1b" not in file.getvalue()


def test_slow_steps_are_told_every_five_seconds() -> None:
    seconds = iter(range(0, 100, 3))
    sink, file = _plain(clock=lambda: float(next(seconds)))
    sink.start(_info())
    for step in range(1, 6):
        sink.log_step(_metrics(step))
    assert [line.split("/")[0] for line in file.getvalue().splitlines()[1:]] == ["step 1", "step 3", "step 5"]


def test_escape_codes_and_line_breaks_of_messages_do_not_reach_the_terminal() -> None:
    sink, file = _plain()
    sink.log_event(1, "warn", "bad \x1b[31mred\x1b[0m\r\nnext [bold]markup[/bold] :smile: \x07")
    assert file.getvalue() == "[warn] step 1: bad  [31mred [0m next [bold]markup[/bold] :smile:  \n"


def test_a_stream_without_unicode_gets_question_marks_not_a_crash() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    ConsoleSink(Console(file=file, force_terminal=True)).log_event(1, "warn", "ü → ok")
    file.flush()
    assert raw.getvalue() == b"[warn] step 1: ? ? ok\n"


def test_a_forced_terminal_on_a_pipe_stays_plain() -> None:
    file = io.StringIO()
    sink = ConsoleSink(Console(file=file, force_terminal=True))
    sink.start(_info())
    sink.log_step(_metrics(1), FORECAST)
    sink.close()
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_panel_shows_what_people_ask_for(width: int) -> None:
    sink, console = _screen(width)
    sink.log_event(0, "start", "begin")
    for step in range(1, 61):
        sink.log_step(
            _metrics(step, mfu=0.38, **{"budget/money": 0.04, "eval_reward": 0.5 if step == 50 else math.nan}), FORECAST
        )
    sink.log_event(60, "warn", "look \x1b[31mhere")
    sink.close()
    screen = _shown(console)
    assert max(len(line) for line in screen.splitlines()) <= width
    assert "tiny learns sums" in console.export_text(clear=False) or "tiny learns sums" in screen
    for words in (
        "60/100 steps",
        "0.555  +0.100 in 10 steps",
        "0.500  at step 50",
        "0.913  0.874 to 0.941  (90 % interval)",
        "of the rise 80 % by step 84",
        "○●○  rapid improvement  83 % sure",
        "12 % sure of less than 0.01; stops at 78 %",
        "384 GFLOP · 300 k tokens · 0.033 device-h · 0.0060 kWh",
        "40 % of steps",
        "4.0 % of money",
        "2.50 k tokens/s · 2 s a step · MFU 38 %",
        "■ rollout 75 %",
        "■ train 25 %",
        "step 60",
        "look  [31mhere",
        "CPU · runs/x",
    ):
        assert words in screen, words
    assert "▁" in screen
    assert "█" in screen
    assert "sync" not in screen


def test_the_panel_fits_a_small_terminal() -> None:
    sink, console = _screen(80, height=24)
    for step in range(1, 41):
        sink.log_step(_metrics(step, eval_reward=0.5, **{"budget/tokens": 0.5, "budget/wall": 0.5}), FORECAST)
        sink.log_event(step, "checkpoint", "checkpoint-" + "very" * 40)
    sink._redraw(0.0)
    sink._events.append((41, "end", "short"))
    assert len(console.render_lines(sink._panel())) <= 24
    sink.close()


def test_the_panel_before_steps_and_before_a_forecast() -> None:
    sink, console = _screen(100)
    sink._redraw(0.0)
    assert "waiting" in "".join(segment.text for segment in console.render(sink._panel()))
    sink.log_step({"step": 1, "reward": math.nan})
    unsure = FORECAST | {"identifiable": False, "reason": "the rise has not begun", "x80": None}
    assert "no forecast yet" in "".join(segment.text for segment in console.render(sink._panel()))
    sink.log_step({"step": 2, "reward": 0.1}, unsure)
    sink.close()
    assert "not sure yet: the rise has not begun" in _shown(console)


def test_a_forecast_that_is_sure_enough_turns_green() -> None:
    sink, console = _screen(100)
    sink.log_step(_metrics(1), FORECAST | {"p_gain_below_eps": 0.95})
    styles = {str(segment.style) for segment in console.render(sink._panel()) if "━" in segment.text}
    assert "green" in styles
    sink.close()


def test_a_real_terminal_gets_a_live_panel_and_its_cursor_back() -> None:
    code = (
        "from pathlib import Path; from grpo_fast.sinks import ConsoleSink, RunInfo\n"
        "sink = ConsoleSink(); sink.start(RunInfo(run_dir=Path('r'), model='tiny', dataset='sums', max_steps=5))\n"
        "sink.log_step({'step': 1, 'reward': 0.5, 'step_time': 1.0}); sink.close()"
    )
    main, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", "COLUMNS": "90", "LINES": "30"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=side, stderr=subprocess.STDOUT, env=environment) as process:
        os.close(side)
        seen = b""
        try:
            while chunk := os.read(main, 65536):
                seen += chunk
        except OSError:
            pass
    os.close(main)
    assert process.returncode == 0
    assert "╭".encode() in seen
    assert b"1/5" in seen
    assert seen.index(b"\x1b[?25l") < seen.rindex(b"\x1b[?25h")


def test_a_question_on_a_real_terminal_comes_below_the_panel_which_then_goes_on() -> None:
    code = (
        "from pathlib import Path; from grpo_fast.sinks import ConsoleSink, RunInfo\n"
        "sink = ConsoleSink(); sink.start(RunInfo(run_dir=Path('r'), model='tiny', dataset='sums', max_steps=5))\n"
        "answer = sink.ask('Stop here?', {'stop': 'stop now', 'go on': 'later'}, give_up=lambda: False)\n"
        "sink.log_event(1, 'warn', f'answer <{answer}>'); sink.close()"
    )
    main, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", "COLUMNS": "90", "LINES": "30"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=side, stdout=side, stderr=subprocess.STDOUT, env=environment) as process:
        os.close(side)
        seen = b""
        try:
            while chunk := os.read(main, 65536):
                seen += chunk
                if b"go on: later" in seen and b"go\r\n" not in seen:
                    os.write(main, b"go\n")
        except OSError:
            pass
    os.close(main)
    assert process.returncode == 0
    asked = seen.index(b"Stop here?")
    assert "╭".encode() in seen[:asked]
    assert b"answer <go on>" in seen[asked:]
    assert "╭".encode() in seen[asked:]
    assert b"\x1b[1A" not in seen[asked : asked + seen[asked:].index("╭".encode())], "the question stays on the screen"
    assert seen.count(b"\x1b[?25h") >= 2, "the cursor is there for the answer too"
    assert seen.index(b"\x1b[?25l") < seen.rindex(b"\x1b[?25h")


def test_nobody_is_asked_where_there_is_no_terminal() -> None:
    sink, file = _plain()
    sink.start(_info())
    assert sink.ask("Stop here?", {"stop": "now"}, give_up=lambda: False) is None
    assert "Stop" not in file.getvalue()


def test_alarm_and_veto_are_told() -> None:
    sink, file = _plain()
    sink.start(_info())
    quiet = {"alarm/reward": 0.2, "alarm/entropy_up": 1.0}
    sink.log_step(_metrics(1, **quiet), FORECAST)
    sink.log_step(_metrics(11, **quiet | {"alarm/reward": 0.75}), FORECAST)
    first, second = file.getvalue().splitlines()[1:]
    assert "alarm" not in first
    assert "alarm: reward 75 %, entropy up 100 % of the way to a collapse" in second

    sink, console = _screen(120)
    sink.log_step(_metrics(1, **quiet), FORECAST | {"veto": "rising slope"})
    sink.close()
    shown = _shown(console)
    assert "no stop yet: rising slope" in shown
    assert "quiet" in shown


def test_sparklines_share_the_values_out() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([5, 5, math.nan], 8) == "▁▁"
    assert sparkline([math.nan], 8) == ""
    assert len(sparkline(range(1000), 30)) == 30
