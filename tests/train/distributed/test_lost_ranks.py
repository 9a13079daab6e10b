"""A rank that is killed, or hangs, in the middle of a run."""

from __future__ import annotations

import json
import shutil
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.system.command_line import CommandLine
from grpo_fast.config import Config
from grpo_fast.train import GRPOTrainer
from tests.train.distributed.launches import forked_pair, torchrun, trace
from tests.train.trainer.runs import vowels

DEADLINE_S = 60.0
KILLER = """
import os, signal, time
from pathlib import Path

CALLS = []
Path(f"started-{os.environ['RANK']}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 'alone')}").touch()


def vowels(completions, **columns):
    CALLS.append(1)
    if len(CALLS) == 5 and os.environ["RANK"] == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        Path("killed").touch()
        os.kill(os.getpid(), getattr(signal, os.environ.get("FATAL_SIGNAL", "SIGKILL")))
    return [sum(letter in "aei" for letter in text) / max(1, len(text)) for text in completions]
"""


@pytest.fixture
def fatal(tiny_model: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Makes the arguments of a run in which rank 1 is killed in its fifth step."""

    def make(**changes: Any) -> list[str]:
        (tmp_path / "killer.py").write_text(KILLER, encoding="utf-8")
        rows = [{"prompt": f"{a}{b}=", "answer": a} for a in "abcdefgh" for b in "abcd"]
        (tmp_path / "letters.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        settings = {
            "model": tiny_model,
            "dataset": "letters.jsonl",
            "reward_funcs": "killer:vowels",
            "reward_workers": 0,
            "prompts_per_step": 4,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 3e-3,
            "adam_epsilon": 1e-4,
            "max_steps": 7,
            "save_steps": 3,
            "forecast": "warn",
            "baseline_probe": 0,
            "output_dir": "run",
        } | changes
        flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        return ["train", *flags, "--sinks", "console", "--no-report", "--no-share-prompts"]

    return make


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed(fatal: Callable[..., list[str]], tmp_path: Path) -> None:
    """What was sampled ahead, by weights that the checkpoint no longer has, is in it and is not sampled again."""
    program = shutil.which("grpo-fast", path=Path(sys.executable).parent)
    assert program is not None
    done = torchrun(2, program, *fatal(max_staleness=1), cwd=tmp_path, options=("--no-python", "--max-restarts", "1"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "started-1-1").stat().st_mtime - (tmp_path / "killed").stat().st_mtime < DEADLINE_S
    rows = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["step"], row["event"]) for row in rows if row["event"] in {"start", "resume"}] == [(0, "start"), (3, "resume")]
    settings = tomllib.loads((tmp_path / "run/config.toml").read_text(encoding="utf-8"))
    changes = {"output_dir": tmp_path / "straight", "dataset": str(tmp_path / "letters.jsonl")}
    with GRPOTrainer(Config.parse(settings | changes), reward_funcs=[vowels]) as trainer:
        trainer.train()
    for row, true in zip(trace(tmp_path / "run"), trace(tmp_path / "straight"), strict=True):
        assert row == pytest.approx(true, rel=1e-5, abs=1e-6, nan_ok=True)
    assert json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))["stopped_by"] == "max_steps"


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_dies_or_hangs_ends_the_others_in_time(
    fate: str, fatal: Callable[..., list[str]], tmp_path: Path, forks: CommandLine
) -> None:
    command = fatal(ddp_timeout_s=1800 if fate == "SIGKILL" else 20)
    codes, told = forked_pair(forks, tmp_path, "grpo_fast.cli", command, environment={"FATAL_SIGNAL": fate})
    assert time.time() - (tmp_path / "killed").stat().st_mtime < DEADLINE_S
    assert codes == [1, -9], told
    assert "rank 0 of 2 lost another rank" in " ".join(told[0].split())
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
