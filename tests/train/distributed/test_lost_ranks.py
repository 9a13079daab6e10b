"""A rank that is killed, or hangs, in the middle of a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from grpo_fast.config import Config
from grpo_fast.train import GRPOTrainer
from tests.train.distributed.launches import torchrun, trace, two_ranks
from tests.train.distributed.rank_program import vowels

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


def program_path() -> str:
    found = shutil.which("grpo-fast", path=Path(sys.executable).parent)
    assert found is not None
    return found


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed(fatal: Callable[..., list[str]], tmp_path: Path) -> None:
    """What was sampled ahead, by weights that the checkpoint no longer has, is in it and is not sampled again."""
    done = torchrun(2, program_path(), *fatal(max_staleness=1), cwd=tmp_path, options=("--no-python", "--max-restarts", "1"))
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
def test_a_rank_that_dies_or_hangs_ends_the_others_in_time(fate: str, fatal: Callable[..., list[str]], tmp_path: Path) -> None:
    # the launcher keeps the store, as torchrun's does: a port that is only looked for may be another process's by then
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = two_ranks(store, tmp_path) | {"FATAL_SIGNAL": fate}
    command = [program_path(), *fatal(ddp_timeout_s=1800 if fate == "SIGKILL" else 20)]
    ranks = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, told = ranks[0].communicate(timeout=180)
        ended = time.time()
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ended - (tmp_path / "killed").stat().st_mtime < DEADLINE_S
    assert [rank.returncode for rank in ranks] == [1, -9]
    assert "rank 0 of 2 lost another rank" in " ".join(told.split())
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
