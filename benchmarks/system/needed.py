"""What training needs and is not here: the project may run from its tree alone, where no installer has seen to that."""

from __future__ import annotations

import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
_MODULES = {"pillow": "PIL"}
"""Modules that are not called as their distribution is."""


def absent_dependencies() -> list[str]:
    """Distributions that ``pyproject.toml`` asks for and that cannot be imported, by name."""
    asked = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    names = [re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in asked]
    return [name for name in names if find_spec(_MODULES.get(name, name.replace("-", "_"))) is None]
