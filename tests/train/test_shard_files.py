"""Files of one process alone; what several write and read is in ``tests/train/distributed``."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import pytest
import torch

from grpo_fast.train.shard_files import ShardsError, load_shards, missing_shards, save_shards


def saved(directory: Path) -> Path:
    save_shards({"weight": torch.arange(6.0).view(2, 3), "more": {"step": torch.tensor(2.0)}}, directory, alone=True)
    return directory


def test_one_process_reads_what_it_wrote_in_place_and_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = {"weight": torch.zeros(2, 3), "more": {"step": torch.tensor(0.0)}}
        weight = state["weight"]
        load_shards(state, saved(tmp_path / "shards"))
    assert torch.equal(weight, torch.arange(6.0).view(2, 3))
    assert float(state["more"]["step"]) == 2.0


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    assert missing_shards(tmp_path / "nothing") == []
    directory = saved(tmp_path / "shards")
    assert missing_shards(directory) == []
    [file] = directory.glob("*.distcp")
    file.unlink()
    assert missing_shards(directory) == [file.name]


def test_what_cannot_be_read_is_told_in_one_line_with_the_rank(tmp_path: Path) -> None:
    directory = saved(tmp_path / "shards")
    [file] = directory.glob("*.distcp")
    file.unlink()
    with pytest.raises(ShardsError, match=rf"^rank 0: FileNotFoundError: .*{file.name}'$") as caught:
        load_shards({"weight": torch.zeros(2, 3)}, directory)
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value), "it goes to other ranks"


def test_what_cannot_be_written_is_told_so_too(tmp_path: Path) -> None:
    (tmp_path / "shards").write_text("a file", encoding="utf-8")
    with pytest.raises(ShardsError, match=r"^rank 0: .*Error: .*shards"):
        saved(tmp_path / "shards")
