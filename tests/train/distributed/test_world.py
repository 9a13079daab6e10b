"""One process: it is alone."""

from __future__ import annotations

import errno

import pytest
import torch

from grpo_fast.train.distributed import ALONE, World, _packed


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
