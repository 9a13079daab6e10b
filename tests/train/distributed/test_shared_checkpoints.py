"""Checkpoints that one of two ranks cannot write or read: all are told which rank, why, and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.system.command_line import CommandLine
from tests.train.distributed.launches import forked_pair


@pytest.fixture(scope="module")
def both(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, forks: CommandLine) -> list[dict[str, str]]:
    """What each rank was told; rank 1 dies in the end."""
    output = tmp_path_factory.mktemp("checkpoints")
    codes, told = forked_pair(forks, output, "tests.train.distributed.checkpoint_program", str(tiny_model), str(output))
    assert codes == [0, 7], told
    return [json.loads((output / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.fixture
def found(both: list[dict[str, str]]) -> dict[str, str]:
    """What rank 0 was told."""
    return both[0]


@pytest.mark.slow
def test_what_both_ranks_write_both_read(found: dict[str, str]) -> None:
    assert found["saved"].startswith("gave ")
    assert found["loaded"] == "gave {'step': 1}"


@pytest.mark.slow
def test_a_checkpoint_whose_parts_are_on_two_file_systems_is_not_sealed(found: dict[str, str]) -> None:
    assert found["apart"].startswith("CheckpointError: cannot save ")
    assert "of the optimiser's state, __1_0.distcp did not arrive; no earlier checkpoint exists" in found["apart"]
    assert "a file system that all nodes share" in found["apart"]
    assert found["left apart"] == "[]"


@pytest.mark.slow
def test_a_part_that_cannot_be_written_is_told_in_one_line_with_its_rank(found: dict[str, str]) -> None:
    assert found["blocked"].startswith("CheckpointError: cannot save ")
    assert "writing failed (rank 1: " in found["blocked"]
    assert "blocked 1" in found["blocked"], "what is in the way"
    assert "Traceback" not in found["blocked"]
    assert len(found["blocked"].splitlines()) == 1


@pytest.mark.slow
def test_why_nothing_was_written_is_asked_once_and_told_once(both: list[dict[str, str]]) -> None:
    """Each for itself could find another cause: what one removes makes room."""
    assert both[0]["blocked"] == both[1]["blocked"]
    assert [rank["blocked is a copy"] for rank in both] == ["False", "True"]


@pytest.mark.slow
def test_what_a_rank_lacks_or_loses_is_no_damage_to_the_checkpoint(found: dict[str, str]) -> None:
    assert found["too large"] == "MemoryError: no memory"
    assert found["lost"].startswith("RankLostError: rank 0 of 2 lost another rank")
    assert "--overwrite" not in found["lost"]


@pytest.mark.slow
def test_a_file_that_one_rank_cannot_read_is_told_to_all(found: dict[str, str]) -> None:
    assert "checkpoint-1 cannot be read (stale handle); no other checkpoint is left" in found["unreadable"]
