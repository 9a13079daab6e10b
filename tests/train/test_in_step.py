"""Loops that do not do the same on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.system.command_line import CommandLine
from grpo_fast.train.distributed import World
from grpo_fast.train.in_step import InStep, Turn
from grpo_fast.train.summary import Ending
from tests.train.distributed.launches import COMMON, forked_ranks

TIMEOUT_S = 120.0


def test_one_process_is_in_step_with_itself() -> None:
    spent = Ending("max_steps", "All steps are done.")
    alone = InStep(World())
    assert all(alone.take(turn, 3) is None for turn in Turn if turn != Turn.LEAVE)
    assert alone.take(Turn.LEAVE, 3) == Ending("user", "The loop was left after step 3.")
    assert alone.take(Turn.GO_ON, 3, spent) == alone.take(Turn.LEAVE, 3, spent) == spent


@pytest.mark.slow
def test_no_rank_waits_for_one_that_does_something_else(tiny_model: Path, tmp_path: Path, forks: CommandLine) -> None:
    file = tmp_path / "case.json"
    values = COMMON | {"model": str(tiny_model), "ddp_timeout_s": TIMEOUT_S, "eval_size": 2}
    file.write_text(json.dumps(values), encoding="utf-8")
    first, second = forked_ranks(forks, 2, "tests.train.distributed.in_step_program", file, tmp_path)

    for each in (first["leaves"], second["leaves"]):
        assert each["reason"] == "The loop was left after step 2 by rank 1, and so it ended on every rank."
        assert (each["steps"], each["stopped_by"], each["then"]) == ([1, 2], "user", 4), "and both can go on together"
    for each in (first["leaves_at_the_end"], second["leaves_at_the_end"]):
        assert (each["steps"], each["stopped_by"]) == ([1, 2, 3, 4], "max_steps")

    assert second["fails"]["error"] == "KeyError: 'of one rank'"
    assert first["fails"]["reason"] == "The loop was left after step 1 by rank 1, and so it ended on every rank."
    assert (tmp_path / "fails/checkpoint-1/model.safetensors").exists()

    told = "TrainingError: after step 2 the ranks are not in step: rank 0 calls save(), rank 1 goes on with the loop. "
    assert all(rank["saves_alone"]["error"].startswith(told) for rank in (first, second))
    told = "TrainingError: after step 4 the ranks are not in step: rank 0 goes on with the loop, rank 1 calls evaluate(). "
    assert all(rank["evaluates_alone"]["error"].startswith(told) for rank in (first, second))

    for each in (rank[name] for rank in (first, second) for name in ("cannot_log", "cannot_warn", "cannot_warn_of_evaluation")):
        assert each["steps"] == [1, 2]
        assert each["error"].startswith("OSError: [Errno 27] cannot write")

    assert first["agrees"]["stopped_by"] == second["agrees"]["stopped_by"] == "max_steps"
    assert (tmp_path / "agrees/checkpoint-3").is_dir()
    assert all(case["seconds"] < TIMEOUT_S / 2 for rank in (first, second) for case in rank.values())
