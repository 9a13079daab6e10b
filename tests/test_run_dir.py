"""A run's directory, seen by others in the middle of a write, and after a kill."""

from __future__ import annotations

import errno
import resource
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.run_dir import CONFIG_FILE, LOCK_FILE, empty_run, is_cut_short, no_run, run_of, why_unwritable, write_whole


def test_no_reader_sees_half_a_file(tmp_path: Path) -> None:
    texts = {letter * 2**20 for letter in "ab"}
    path = tmp_path / "file"
    write_whole(path, "a" * 2**20)
    done = threading.Event()

    def write() -> None:
        try:
            for turn in range(100):
                write_whole(path, "ab"[turn % 2] * 2**20)
        finally:
            done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(path.read_text(encoding="utf-8"))
    writer.join()
    assert seen <= texts
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The system's own error of a write that finds no room knows no name."""
    path, before = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_whole(path, "as it was")
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as told:
            write_whole(path, "a" * 2**20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (told.value.errno, told.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text(encoding="utf-8") == "as it was"


def test_what_a_kill_in_the_middle_of_deleting_leaves_is_still_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / CONFIG_FILE).write_text("", encoding="utf-8")
    for name in ("checkpoint-1", "checkpoint-2", "logs"):
        (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "logs")
    delete: Any = shutil.rmtree
    with monkeypatch.context() as patched:
        left = iter([delete])

        def killed(path: Path) -> None:
            next(left, _kill)(path)

        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            empty_run(tmp_path)
    assert (tmp_path / CONFIG_FILE).exists()
    assert len(list(tmp_path.iterdir())) > 1
    (tmp_path / LOCK_FILE).touch()
    empty_run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_FILE, LOCK_FILE}


def _kill(path: Path) -> None:
    raise KeyboardInterrupt


def test_leftovers_of_a_write_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda *_: _kill(tmp_path))
        with pytest.raises(KeyboardInterrupt):
            write_whole(tmp_path / CONFIG_FILE, "model = 1")
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert is_cut_short(left[0])
    assert not is_cut_short(tmp_path / CONFIG_FILE)


def test_a_checkpoint_belongs_to_the_run_that_it_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    (run / "checkpoint-2").mkdir(parents=True)
    assert run_of(run) is None
    (run / CONFIG_FILE).touch()
    assert run_of(run) == run_of(run / "checkpoint-2") == run
    assert run_of(run / "checkpoint-3") is None
    (run / "merged").mkdir()
    assert run_of(run / "merged") is None, "a model that was exported to there is no checkpoint"
    assert run_of(tmp_path) is None
    monkeypatch.chdir(run)
    assert run_of(Path("checkpoint-2")) == run
    assert run_of(Path("owner/name")) is None
    assert no_run(run / "checkpoint-2") == (
        f"{run}/checkpoint-2 is a checkpoint of a run, not a run; give {run}, which goes on from its newest checkpoint"
    )
    assert no_run(Path("owner/name")).startswith("there is no run in owner/name (it has no config.toml)")


def test_what_keeps_a_directory_from_being_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert why_unwritable(tmp_path / "to" / "be" / "made") is None
    assert why_unwritable(tmp_path / "file" / "inner") == f"{tmp_path}/file is a file"
