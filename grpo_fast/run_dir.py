"""A run's directory: files that are whole or absent, and a way to empty it that can be killed at any moment."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

CONFIG_FILE = "config.toml"
"""What makes a directory that of a run."""
SUMMARY_FILE = "summary.json"
LOCK_FILE = ".lock"
"""What the process that writes to a run keeps locked; it stays when that has ended."""
CUT_SHORT = ".partial"
"""How hidden files end that stand in nobody's way: what a kill leaves of a write counts as nothing."""


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of another once it is whole and on the disk.

    A reader, also one after a crash, sees the file as it was or as it shall be, never cut short.
    """
    partial = path.with_name(f".{path.name}{CUT_SHORT}")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file as :func:`replaced` does, in UTF-8; lone surrogates, which a model may sample, as escapes."""
    with replaced(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def run_of(path: Path) -> Path | None:
    """The run that a directory is, or is a checkpoint of; ``None`` for anything else."""
    if not path.is_dir():
        return None
    return next((place for place in (path, path.absolute().parent) if (place / CONFIG_FILE).is_file()), None)


def is_cut_short(path: Path) -> bool:
    """Whether a kill has left this while :func:`replaced` was at work."""
    return path.name.startswith(".") and path.name.endswith(CUT_SHORT)


def empty_run(run_dir: Path) -> None:
    """Deletes all of a run but its configuration, by which what is left after a kill is still known as a run, and its lock."""
    for path in run_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in {CONFIG_FILE, LOCK_FILE}:
            path.unlink()
