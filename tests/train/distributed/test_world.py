"""One process: it is alone, and its launch is known from others."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from grpo_fast.train.distributed import ALONE, World, _packed, is_restart, note_launch


def test_an_error_of_the_system_arrives_whole() -> None:
    failure = _packed(OSError(errno.ENOSPC, "No space left on device", "file"))
    assert failure is not None
    copy = failure.rebuild()
    assert isinstance(copy, OSError)
    assert (copy.errno, copy.filename) == (errno.ENOSPC, None)  # a file's name is not among the arguments
    assert "No space left" in str(copy)


def test_alone_there_is_nothing_to_exchange() -> None:
    values = [torch.ones(2)]
    ALONE.sum(values)
    assert values[0].tolist() == [1.0, 1.0]
    assert ALONE.gather(lambda: 7) == [7]
    assert ALONE.once(lambda: "x") == "x"
    assert ALONE.share(5) == slice(0, 5)
    assert ALONE.is_main
    with pytest.raises(RuntimeError, match="somebody"), ALONE.watched():
        raise RuntimeError("gloo is somebody else's here")


def test_a_process_that_nobody_launched_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert World.join(torch.device("cpu"), timeout_s=1.0).size == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert World.join(torch.device("cpu"), timeout_s=1.0).size == 1


def test_a_restart_goes_on_with_its_own_launch_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    note_launch(tmp_path)
    assert not list(tmp_path.iterdir()), "nobody launched it"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    note_launch(tmp_path)
    assert not is_restart(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert is_restart(tmp_path)
    assert not is_restart(tmp_path / "elsewhere")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 2")
    assert not is_restart(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    note_launch(tmp_path)
    assert is_restart(tmp_path)
