"""Files that a command writes when its work is done: whether they can be written is found out before it begins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter


def can_be_written(kind: Any, path: Any) -> None:
    """Checks a file to write, as a validator of cyclopts.

    Args:
        kind: the parameter's type.
        path: the file, or ``None`` for none.

    Raises:
        ValueError: it cannot be written where it is to be.
    """
    if path is None:
        return
    place = Path(path).absolute()
    if place.is_dir():
        raise ValueError("this is a directory; name a file")
    if not place.parent.is_dir():
        raise ValueError(f"there is no directory {Path(path).parent}; make it first")
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise ValueError("this cannot be written (no permission, or a read-only file system); name another place")


def is_png(kind: Any, path: Any) -> None:
    """Checks a picture's name, as a validator of cyclopts.

    Args:
        kind: the parameter's type.
        path: the file, or ``None`` for none.

    Raises:
        ValueError: it does not end in ``.png``.
    """
    if path is not None and Path(path).suffix.lower() != ".png":
        raise ValueError("it must end in .png: that is what is written")


ToWrite = Annotated[Path, Parameter(validator=can_be_written)]
"""A file that a command writes."""
ToDraw = Annotated[Path, Parameter(validator=(is_png, can_be_written))]
"""A picture that a command writes."""
