"""Console output of a run: a live panel on a terminal, compact plain lines anywhere else."""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo_fast.sinks.quantities import duration, percent, si, significant
from grpo_fast.sinks.question import can_answer, forget_typed, read_answer
from grpo_fast.sinks.sink import RunInfo

PHASE_NAMES = ("slow start", "rapid improvement", "plateau")
TIME_PHASES = ("rollout", "reward", "score", "train", "sync", "other")

_SMOOTHED_STEPS = 10
_HISTORY = 4096
_REDRAW_S = 0.1
_PLAIN_STEPS = 10
_UNEASY = 0.5
_PLAIN_S = 5.0
_SPARKS = "▁▂▃▄▅▆▇█"
_TIME_STYLES = ("blue", "magenta", "cyan", "green", "yellow", "bright_black")
_EVENT_STYLES = {
    "warn": "yellow",
    "stop": "bold green",
    "end": "bold green",
    "budget": "bold yellow",
    "interrupt": "bold red",
    "alarm": "bold red",
}
_BUDGET_NAMES = {"gpu_hours": "device hours", "wall": "wall time", "flops": "FLOPs"}


def sparkline(values: Sequence[float], width: int) -> str:
    """At most ``width`` block characters, each the mean of its share of the values, between their least and their greatest."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    cells = min(width, len(finite))
    cuts = [round(cell * len(finite) / cells) for cell in range(cells + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    top = len(_SPARKS) - 1
    return "".join(_SPARKS[round((mean - low) / (high - low) * top) if high > low else 0] for mean in means)


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    return math.nan if value is None else float(value)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


class _Output(Console):
    """Standard output. Where nobody reads it any more, as behind ``| head``, rich would end the process without a word."""

    def on_broken_pipe(self) -> None:
        """Fails as any sink may, so that the run goes on; what else is printed goes nowhere."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise BrokenPipeError("nobody reads the standard output any more")


class ConsoleSink:
    """Shows a run on the console.

    On a terminal that understands Unicode it is a panel that stays in place. On anything else (a pipe, a CI log, a dumb
    terminal) it is one plain line for every tenth step, or every five seconds where steps are slow, and one for each event.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        stdin: TextIO | None = None,
    ) -> None:
        """Nothing is written before ``start``.

        Args:
            console: where to write; standard output without one.
            clock: seconds, for the pace of redraws and for the time left.
            stdin: where answers come from; standard input without one.
        """
        self.console = console if console is not None else _Output()
        self._clock = clock
        self._stdin = stdin
        self._info: RunInfo | None = None
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._drawn_at = -math.inf
        self._printed_step: int | None = None
        self._metrics: Mapping[str, Any] = {}
        self._forecast: Mapping[str, Any] | None = None
        self._evaluated: tuple[int, float] | None = None
        self._rewards: deque[float] = deque(maxlen=_HISTORY)
        self._laps: deque[tuple[int, float, float]] = deque(maxlen=_SMOOTHED_STEPS)
        self._times: deque[dict[str, float]] = deque(maxlen=_SMOOTHED_STEPS)
        self._tokens = math.nan
        self._events: deque[tuple[int, str, str]] = deque(maxlen=3)

    @property
    def _is_live(self) -> bool:
        console = self.console
        there = console.is_terminal and not console.is_dumb_terminal and console.file.isatty()
        return there and not console.options.ascii_only

    def start(self, info: RunInfo) -> None:
        """Opens the panel, or prints what is about to run."""
        self._info = info
        if not self._is_live:
            resumed = f", from step {info.start_step}" if info.start_step else ""
            device = f" on {info.device}" if info.device else ""
            limit = f"at most {info.max_steps} step{'' if info.max_steps == 1 else 's'}{resumed}"
            self._line(f"grpo-fast: {info.model} learns {info.dataset}, {limit}{device}; {info.run_dir}")
            return
        self._progress = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps,"),
            TimeElapsedColumn(),
            TextColumn("so far, at most"),
            TimeRemainingColumn(compact=True),
            TextColumn("to go"),
            console=self.console,
            expand=True,
            get_time=self._clock,
        )
        self._progress.add_task("steps", total=info.max_steps, completed=info.start_step)
        self._open_panel()

    def log_step(self, metrics: Mapping[str, float], forecast: Mapping[str, Any] | None = None) -> None:
        """Takes a step; redraws or prints when it is time to."""
        self._metrics = metrics
        self._forecast = forecast if forecast is not None else self._forecast
        step = int(metrics["step"])
        if "reward" in metrics:  # an evaluation before the first step has none
            self._rewards.append(metrics["reward"])
        tokens = _number(metrics, "num_tokens")
        self._laps.append((step, tokens - self._tokens, _number(metrics, "step_time")))
        self._tokens = tokens
        self._times.append({name: _number(metrics, f"time/{name}") for name in TIME_PHASES})
        if math.isfinite(_number(metrics, "eval_reward")):
            self._evaluated = (step, _number(metrics, "eval_reward"))
        now = self._clock()
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)
            if now - self._drawn_at >= _REDRAW_S:
                self._redraw(now)
        elif self._printed_step is None or step - self._printed_step >= _PLAIN_STEPS or now - self._drawn_at >= _PLAIN_S:
            self._print_step(now)

    def log_event(self, step: int, event: str, message: str) -> None:
        """Shows an event at once."""
        self._events.append((step, event, _printable(message)))
        if self._live is not None:
            self._redraw(self._clock())
        else:
            self._line(f"[{event}] step {step}: {message}")

    def log_completions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing: completions are in ``completions.jsonl`` and in the report."""

    def ask(self, question: str, answers: Mapping[str, str], *, give_up: Callable[[], bool]) -> str | None:
        """Asks below the panel, and opens a new one after the answer; None where input or output is no terminal."""
        stdin = self._stdin if self._stdin is not None else sys.stdin
        if not (self.console.is_terminal and self.console.file.isatty() and can_answer(stdin)):
            return None
        is_live = self._live is not None
        if self._live is not None:
            self._live.stop()
            self._live = None
        try:
            forget_typed(stdin)
            self._line(question)
            for answer, meaning in answers.items():
                self._line(f"- {answer}: {meaning}")
            return read_answer(stdin, answers, say=self._line, give_up=give_up)
        finally:
            if is_live:
                self._open_panel()

    def close(self) -> None:
        """Leaves the last state on the screen and gives the terminal back."""
        if self._live is not None:
            self._live.update(self._panel())
            self._live.stop()
            self._live, self._progress = None, None
        elif self._info is not None and self._metrics and self._printed_step != int(self._metrics["step"]):
            self._print_step(self._clock())
        self._info = None

    def _open_panel(self) -> None:
        self._live = Live(self._panel(), console=self.console, refresh_per_second=4)
        self._live.start()

    def _redraw(self, now: float) -> None:
        if self._live is not None:
            self._drawn_at = now
            self._live.update(self._panel())

    def _line(self, text: str) -> None:
        encoded = _printable(text).encode(self.console.encoding, "replace").decode(self.console.encoding)
        self.console.print(encoded, style=None, markup=False, highlight=False, soft_wrap=True, emoji=False)

    def _print_step(self, now: float) -> None:
        assert self._info is not None
        self._drawn_at, self._printed_step = now, int(self._metrics["step"])
        parts = [f"step {self._printed_step}/{self._info.max_steps}"] + (
            [f"reward {self._smoothed():.3f}"] if self._rewards else []
        )
        if self._evaluated is not None and self._evaluated[0] == self._printed_step:
            parts.append(f"held-out {self._evaluated[1]:.3f}")
        if self._forecast is not None:
            low, high = _number(self._forecast, "plateau_low"), _number(self._forecast, "plateau_high")
            parts.append(f"plateau {_number(self._forecast, 'plateau'):.3f} [{low:.3f}, {high:.3f}]")
            parts.append(f"phase: {self._forecast['phase']} {percent(_number(self._forecast, 'phase_probability'))}")
            gain = percent(_number(self._forecast, "p_gain_below_eps"))
            parts.append(f"P(gain<{self._info.forecast_epsilon:g}) {gain}")
        parts += [f"alarm: {words}" for words in [_alarm(self._metrics)] if words not in {"", "quiet"}]
        pace, seconds = self._pace()
        parts += [f"{si(pace)} tokens/s", f"{significant(seconds)} s/step"]
        if math.isfinite(_number(self._metrics, "flops")):
            parts.append(si(_number(self._metrics, "flops"), "FLOP"))
        left = {name: share for name, share in self._budgets().items() if name != "steps"}
        parts += [f"{name} left {percent(share)}" for name, share in left.items()]
        self._line(" | ".join(parts))

    def _smoothed(self, back: int = 0) -> float:
        rewards = list(self._rewards)
        return _mean(rewards[: len(rewards) - back][-_SMOOTHED_STEPS:])

    def _pace(self) -> tuple[float, float]:
        """Tokens a second and seconds a step, over the last steps."""
        laps = [(tokens, seconds) for _, tokens, seconds in self._laps if math.isfinite(tokens) and seconds > 0]
        total = sum(seconds for _, seconds in laps)
        rate = sum(tokens for tokens, _ in laps) / total if total > 0 else math.nan
        return rate, _mean([seconds for _, _, seconds in self._laps])

    def _budgets(self) -> dict[str, float]:
        """Share left of each limit, by its readable name."""
        shares = {key.removeprefix("budget/"): value for key, value in self._metrics.items() if key.startswith("budget/")}
        return {_BUDGET_NAMES.get(name, name): float(share) for name, share in shares.items() if share is not None}

    def _panel(self) -> RenderableType:
        assert self._info is not None
        assert self._progress is not None
        rows = Table.grid(padding=(0, 2), expand=True)
        rows.add_column(style="bright_black", no_wrap=True, width=9)
        rows.add_column(ratio=1)
        if self._metrics:
            self._add_learning(rows)
            rows.add_row("", "")
            self._add_cost(rows)
        else:
            rows.add_row("waiting", "for the first step")
        parts: list[RenderableType] = [self._progress, Text(), rows]
        if self._events:
            parts += [Text(), self._event_table()]
        title = Text.assemble((_printable(self._info.model), "bold"), " learns ", (_printable(self._info.dataset), "bold"))
        subtitle = Text(" · ".join(part for part in (self._info.device, str(self._info.run_dir)) if part), style="bright_black")
        return Panel(Group(*parts), title=title, subtitle=subtitle, box=box.ROUNDED, border_style="blue", padding=(0, 2))

    def _add_learning(self, rows: Table) -> None:
        reward = Text.assemble((f"{self._smoothed():.3f}", "bold"))
        if len(self._rewards) > 2 * _SMOOTHED_STEPS:
            reward.append(
                f"  {self._smoothed() - self._smoothed(back=_SMOOTHED_STEPS):+.3f} in {_SMOOTHED_STEPS} steps",
                style="bright_black",
            )
        width = max(8, min(32, self.console.width - 56))
        reward.append(f"  {sparkline(self._rewards, width)}", style="blue")
        rows.add_row("reward", reward)
        if self._evaluated is not None:
            held_out = Text.assemble((f"{self._evaluated[1]:.3f}", "bold"), (f"  at step {self._evaluated[0]}", "bright_black"))
            rows.add_row("held-out", held_out)
        if self._forecast is not None:
            self._add_forecast(rows, self._forecast)
        else:
            rows.add_row("plateau", Text("no forecast yet", style="bright_black"))
        alarm = _alarm(self._metrics)
        if alarm:
            rows.add_row("alarm", Text(alarm, style="bright_black" if alarm == "quiet" else "yellow"))

    def _add_forecast(self, rows: Table, forecast: Mapping[str, Any]) -> None:
        assert self._info is not None
        low, high = _number(forecast, "plateau_low"), _number(forecast, "plateau_high")
        plateau = Text.assemble(
            (f"{_number(forecast, 'plateau'):.3f}", "bold"), f"  {low:.3f} to {high:.3f}", ("  (90 % interval)", "bright_black")
        )
        rows.add_row("plateau", plateau)
        if not forecast.get("identifiable", True) and forecast.get("reason"):
            rows.add_row("", Text(f"not sure yet: {_printable(str(forecast['reason']))}", style="yellow"))
        known = [(share, forecast[key]) for share, key in ((80, "x80"), (95, "x95")) if forecast.get(key) is not None]
        if known:
            reached = ", ".join(f"{share} % by step {step:.0f}" for share, step in known)
            rows.add_row("", Text(f"of the rise {reached}", style="bright_black"))
        phase = str(forecast["phase"])
        dots = "".join("●" if name == phase else "○" for name in PHASE_NAMES)
        probability = percent(_number(forecast, "phase_probability"))
        rows.add_row("phase", Text.assemble((dots, "blue"), "  ", (phase, "bold"), (f"  {probability} sure", "bright_black")))
        gain = _number(forecast, "p_gain_below_eps")
        enough = gain >= self._info.forecast_confidence
        least, needed = f"{self._info.forecast_epsilon:g}", percent(self._info.forecast_confidence)
        words = f"{percent(gain)} sure of less than {least}; stops at {needed}"
        rows.add_row("gain left", _beside(_gauge(gain, "green" if enough else "blue"), Text(words)))
        if forecast.get("veto"):
            rows.add_row("", Text(f"no stop yet: {forecast['veto']}", style="bright_black"))

    def _add_cost(self, rows: Table) -> None:
        assert self._info is not None
        metrics = self._metrics
        money = _number(metrics, "money")
        spent = [
            si(_number(metrics, "flops"), "FLOP"),
            f"{si(_number(metrics, 'num_tokens'))} tokens",
            f"{significant(_number(metrics, 'gpu_seconds') / 3600, 2)} device-h",
            f"{significant(_number(metrics, 'energy_kwh'), 2)} kWh",
            f"{significant(money, 2)} money" if money > 0 else "",
        ]
        rows.add_row("spent", Text(" · ".join(part for part in spent if part and not part.startswith("-"))))
        if self._budgets():
            rows.add_row("left", Columns([_budget(name, share) for name, share in self._budgets().items()], padding=(0, 3)))
        pace, seconds = self._pace()
        speed = f"{si(pace)} tokens/s · {duration(seconds)} a step"
        if math.isfinite(_number(metrics, "mfu")):
            speed += f" · MFU {percent(_number(metrics, 'mfu'))}"
        rows.add_row("speed", Text(speed))
        self._add_times(rows)

    def _add_times(self, rows: Table) -> None:
        means = {name: _mean([lap[name] for lap in self._times]) for name in TIME_PHASES}
        shares = {name: value for name, value in means.items() if math.isfinite(value) and value > 0}
        total = sum(shares.values())
        if not total:
            return
        width = max(10, self.console.width - 26)
        blocks, names = Text(no_wrap=True), list[RenderableType]()
        edge, drawn = 0.0, 0
        for name, style in zip(TIME_PHASES, _TIME_STYLES, strict=True):
            if name not in shares:
                continue
            edge += shares[name] / total * width
            blocks.append("█" * (round(edge) - drawn), style=style)
            drawn = round(edge)
            names.append(Text.assemble(("■ ", style), f"{name} {percent(shares[name] / total)}"))
        rows.add_row("step time", blocks)
        rows.add_row("", Columns(names, padding=(0, 2)))

    def _event_table(self) -> Table:
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(style="bright_black", no_wrap=True, width=9)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        for age, (step, event, message) in enumerate(self._events, 1 - len(self._events)):
            style = _EVENT_STYLES.get(event, "")
            words = Text(message, style=style, no_wrap=age < 0, overflow="ellipsis" if age < 0 else "fold")
            table.add_row(f"step {step}", Text(event, style=style), words)
        return table


def _alarm(metrics: Mapping[str, Any]) -> str:
    """The collapse alarm in a few words: how near the reward has come to it, and what moves with it; empty without one."""
    levels = {name.removeprefix("alarm/"): _number(metrics, name) for name in metrics if name.startswith("alarm/")}
    if not levels.get("reward", 0.0) >= _UNEASY:
        return "quiet" if levels else ""
    told = [f"{name.replace('_', ' ')} {percent(min(level, 1.0))}" for name, level in levels.items() if level >= _UNEASY]
    return f"{', '.join(told)} of the way to a collapse"


def _gauge(share: float, style: str, *, width: int = 16) -> RenderableType:
    """A bar that is full at 1."""
    done = min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    return ProgressBar(total=1.0, completed=done, width=width, complete_style=style, finished_style=style)


def _budget(name: str, share: float) -> RenderableType:
    style = "red" if share < 0.05 else "yellow" if share < 0.2 else "green"
    return _beside(_gauge(share, style, width=8), Text(f"{percent(share)} of {name}", no_wrap=True))


def _beside(left: RenderableType, right: RenderableType) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row(left, right)
    return table


def _printable(text: str) -> str:
    """The text on one line, control characters left out: a completion or an error message may carry escape codes."""
    return "".join(character if character.isprintable() else " " for character in " ".join(text.split()))
