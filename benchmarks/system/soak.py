"""Long and broken runs: does anything grow over 2,000 steps, and is a run that was killed 100 times still the same run?

``make soak`` runs both and ends with an error where one fails. What it measures is written to ``--output`` either way.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, track
from safetensors.torch import load_file

from benchmarks.system.command_line import CommandLine
from grpo_fast import Config, GRPOTrainer, recipe
from grpo_fast.train.checkpoint import list_checkpoints

MAX_GROWTH_MIB = 8.0
"""Resident memory that the second half of a run may have over its second quarter, in the median."""
MAX_LOG_GROWTH = 1.1
"""Bytes that a step of the last quarter may write over those of the second quarter, as a ratio."""
_TIMED = ("time/", "overlap/", "budget/", "step_time", "gpu_seconds", "energy_kwh", "money", "mfu")
_QUARTERS = 4
_KILLS_OF_A_RUN = 10
_AT_START = 0.25
"""Share of the kills that come while a run starts, the others while it trains."""
_FURTHEST_KILL = 0.4
"""Share of a run's steps: most kills come before its end, many after a new checkpoint."""


@dataclass(frozen=True)
class Growth:
    """What a process held while it trained; one number for each sample."""

    step: list[int]
    resident_mib: list[float]
    open_files: list[int]
    threads: list[int]
    log_bytes: list[int]

    def faults(self) -> list[str]:
        """What grew that must not, in sentences."""
        found = []
        memory = self._median("resident_mib", 2, 4) - self._median("resident_mib", 1, 2)
        if memory > MAX_GROWTH_MIB:
            found.append(f"resident memory grew by {memory:.1f} MiB after the first quarter; {MAX_GROWTH_MIB:g} are allowed")
        for name in ("open_files", "threads"):
            before, after = max(self._part(name, 1, 2)), max(self._part(name, 3, 4))
            if after > before:
                found.append(f"{name.replace('_', ' ')} grew from {before} to {after}")
        early, late = (self._bytes_a_step(part) for part in (1, 3))
        if late > MAX_LOG_GROWTH * early:
            found.append(f"a step writes {late:.0f} bytes at the end and {early:.0f} in the second quarter")
        return found

    def _part(self, name: str, first: int, last: int) -> list[Any]:
        """Samples of the quarters ``first`` to ``last``, counted from 0."""
        values = getattr(self, name)
        return values[len(values) * first // _QUARTERS : len(values) * last // _QUARTERS]

    def _median(self, name: str, first: int, last: int) -> float:
        return statistics.median(self._part(name, first, last))

    def _bytes_a_step(self, quarter: int) -> float:
        steps, written = self._part("step", quarter, quarter + 1), self._part("log_bytes", quarter, quarter + 1)
        return (written[-1] - written[0]) / (steps[-1] - steps[0])


def tiny_run(output_dir: Path, **changes: Any) -> Config:
    """The embedded model with few and short completions: every part of the loop at work, in some 50 ms a step."""
    settings = {
        "prompts_per_step": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "eval_size": 8,
        "baseline_probe": 8,
        "forecast": "warn",
        "collapse_action": "warn",
        "report": False,
        "sinks": (),
        "output_dir": output_dir,
    }
    return recipe("embedded", **settings | changes)


def long_run(output_dir: Path, *, num_steps: int, num_samples: int = 80) -> Growth:
    """Trains in this process and samples what it holds.

    Args:
        output_dir: of the run.
        num_steps: steps to train.
        num_samples: samples over the run.
    """
    every = max(1, num_steps // num_samples)
    growth = Growth([], [], [], [], [])
    config = tiny_run(output_dir, max_steps=num_steps, save_steps=max(2, every // 2), eval_steps=every)
    with GRPOTrainer(config) as trainer:
        for done in track(trainer.steps(), total=num_steps, description="steps"):
            if done.step % every == 0:
                growth.step.append(done.step)
                growth.resident_mib.append(_resident_mib())
                growth.open_files.append(len(list(Path("/proc/self/fd").iterdir())))
                growth.threads.append(len(list(Path("/proc/self/task").iterdir())))
                growth.log_bytes.append(sum(path.stat().st_size for path in output_dir.glob("*.jsonl")))
    return growth


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True)
class Kills:
    """What became of runs that were killed and resumed."""

    num_kills: int
    num_runs: int
    after_steps: list[int]
    faults: list[str]


def killed_runs(home: Path, *, num_kills: int, num_steps: int = 60, seed: int = 0) -> Kills:
    """Kills runs at random moments, resumes them to the end and compares each with one that nothing disturbed.

    Args:
        home: an empty folder.
        num_kills: kills in all.
        num_steps: steps of a run.
        seed: decides the moments.
    """
    draw = random.Random(seed)
    (home / "run.toml").write_text(tiny_run(home / "unused", max_steps=num_steps, save_steps=5).to_toml(), encoding="utf-8")
    shell = CommandLine(home)
    straight = home / "straight"
    moments = [time.monotonic()]

    def sees_first_step() -> bool:
        if len(moments) == 1 and _num_rows(straight):
            moments.append(time.monotonic())
        return False

    if shell.run(*_go_on(straight), until=sees_first_step, signals=()) != 0:
        raise RuntimeError(f"the run that nothing disturbs failed:\n{shell.log()}")
    begun, first, ended = *moments, time.monotonic()
    start_s, step_s = first - begun, (ended - first) / num_steps
    after_steps: list[int] = []
    faults: list[str] = []
    runs = 0
    with Progress() as progress:
        bar = progress.add_task("kills", total=num_kills)
        while len(after_steps) < num_kills:
            run, runs = home / f"run-{runs}", runs + 1
            for _ in range(min(num_kills - len(after_steps), _KILLS_OF_A_RUN)):
                if draw.random() < _AT_START:
                    moment = _later(draw.uniform(0.0, start_s))
                else:
                    num_rows = _num_rows(run) + draw.randint(1, round(_FURTHEST_KILL * num_steps))
                    moment = _later(draw.uniform(0.0, step_s), once=partial(_has_rows, run, num_rows))
                if shell.run(*_go_on(run), until=moment) == 0:
                    break
                after_steps.append(_num_rows(run))
                progress.advance(bar)
            code = shell.run(*_go_on(run))
            if code == 0:
                faults += [f"{run.name}: {fault}" for fault in differences(straight, run)]
            else:
                faults.append(f"{run.name} could not be resumed (exit code {code}):\n{shell.log()[-2000:]}")
    left = shell.left_over()
    if left:
        faults.append(f"processes were left behind: {left}")
    shell.close()
    return Kills(len(after_steps), runs, after_steps, faults)


def _go_on(run: Path) -> tuple[str, ...]:
    if (run / "config.toml").exists():
        return ("train", "--resume", str(run))
    return ("train", "--config", "run.toml", "--output-dir", str(run))


def _later(seconds: float, *, once: Callable[[], bool] = lambda: True) -> Callable[[], bool]:
    """Whether so many seconds have passed since something was so."""
    since: list[float] = []

    def has_come() -> bool:
        if not since and once():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() >= since[0] + seconds

    return has_come


def _has_rows(run: Path, count: int) -> bool:
    return _num_rows(run) >= count


def _num_rows(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def differences(straight: Path, run: Path) -> list[str]:
    """Where two runs differ, but for what a clock says; in sentences."""
    found = []
    ours, theirs = trace(run), trace(straight)
    if len(ours) != len(theirs):
        found.append(f"{len(ours)} rows of metrics instead of {len(theirs)}")
    wrong = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if wrong is not None:
        names = [name for name in theirs[wrong] if ours[wrong].get(name) != theirs[wrong][name]]
        found.append(f"step {theirs[wrong]['step']} differs in {', '.join(names)}")
    ours_at, theirs_at = (load_file(list_checkpoints(one)[-1] / "model.safetensors") for one in (run, straight))
    found += [f"{name} differs in the last checkpoint" for name in theirs_at if not torch.equal(ours_at[name], theirs_at[name])]
    return found + [f"{path.name} was left behind" for path in run.glob(".checkpoint-*")]


def trace(run: Path) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl`` without what a clock says."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in row.items() if not name.startswith(_TIMED)} for row in rows]


def main() -> int:
    """Runs both and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kills").mkdir()
        kills = killed_runs(Path(folder) / "kills", num_kills=options.kills)
        growth = long_run(Path(folder) / "long", num_steps=options.steps)
    faults = [*kills.faults, *growth.faults()]
    if options.output is not None:
        result = {"steps": options.steps, "growth": asdict(growth), "kills": asdict(kills), "faults": faults}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        f"{kills.num_kills} kills in {kills.num_runs} runs; {options.steps} steps: {growth.resident_mib[0]:.0f} MiB at step "
        f"{growth.step[0]}, {growth.resident_mib[-1]:.0f} MiB at the end, {growth.open_files[-1]} open files"
    )
    print("\n".join(faults) or "nothing grew, and every killed run ended as the one that nothing disturbed")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
