"""A run's directory: files that are whole or absent, and a way to empty it that can be killed at any moment."""

from __future__ import annotations

import shutil
from pathlib import Path

CONFIG_FILE = "config.toml"
"""What makes a directory that of a run."""
_PARTIAL = ".partial"


def write_whole(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 that a reader, also one after a crash, sees as it was or as it shall be, never cut short."""
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def is_cut_short(path: Path) -> bool:
    """Whether a kill has left this while :func:`write_whole` was at work."""
    return path.name.startswith(".") and path.name.endswith(_PARTIAL)


def empty_run(run_dir: Path) -> None:
    """Deletes all of a run but its configuration, by which what is left after a kill is still known as a run."""
    for path in run_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != CONFIG_FILE:
            path.unlink()
