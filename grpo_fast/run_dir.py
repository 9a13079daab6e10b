"""A run's directory: files that are whole or absent, and a way to empty it that can be killed at any moment."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

CONFIG_FILE = "config.toml"
"""The file that makes a directory a run's."""
SUMMARY_FILE = "summary.json"
LOCK_FILE = ".lock"
"""The file that the process writing to a run keeps locked; it remains when the process has ended."""
CUT_SHORT = ".partial"
"""Ending of the hidden files that an interrupted write leaves behind; they are ignored."""


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of another once it is whole and on the disk.

    A reader, also one after a crash, sees the file as it was or as it shall be, never cut short.

    Raises:
        OSError: the disk is full or not writable; the file is named.
    """
    partial = path.with_name(f".{path.name}{CUT_SHORT}")
    with naming(path):
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Context in which a file is written whose name an error shall have: that of a write that fails has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_whole(path: Path, text: str) -> None:
    """Writes a text file as :func:`replaced` does, in UTF-8; lone surrogates, which a model may sample, as escapes."""
    with replaced(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def nearest_place(path: Path) -> Path:
    """The path itself where something is there, else the nearest place above it that is."""
    places = (path.absolute(), *path.absolute().parents)
    # Path.exists raises where links go in a circle, and in a directory that may not be entered
    return next(place for place in places if os.path.exists(place))  # noqa: PTH110


def why_unwritable(directory: Path) -> str | None:
    """Why nothing can be written into a directory that is there or is to be made; ``None`` if it can."""
    place = nearest_place(directory)
    if not place.is_dir():
        return f"{place} is a file"
    return None if os.access(place, os.W_OK | os.X_OK) else f"no permission for {place}, or a read-only file system"


def run_of(path: Path) -> Path | None:
    """The run that a directory is, or is a checkpoint of; ``None`` for anything else."""
    if not path.is_dir():
        return None
    whole = path.absolute()
    places = (path, whole.parent) if whole.name.startswith("checkpoint-") else (path,)  # a merged model may lie there too
    return next((place for place in places if (place / CONFIG_FILE).is_file()), None)


def no_run(path: Path) -> str:
    """What to say where a run was to be named, and ``path`` is none."""
    run = run_of(path)
    if run is not None:
        return f"{path} is a checkpoint of a run, not a run; give {run}, which goes on from its newest checkpoint"
    return f"there is no run in {path} (it has no {CONFIG_FILE}); give the output_dir of a run"


def is_cut_short(path: Path) -> bool:
    """Whether this is left from a kill during :func:`replaced`."""
    return path.name.startswith(".") and path.name.endswith(CUT_SHORT)


def empty_run(run_dir: Path) -> None:
    """Deletes all of a run but its configuration, by which what is left after a kill is still known as a run, and its lock."""
    for path in run_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in {CONFIG_FILE, LOCK_FILE}:
            path.unlink()
