"""Whole configurations, chosen by name: each is a TOML file beside this module."""

from __future__ import annotations

import difflib
import tomllib
from importlib.resources import files
from typing import Any

from grpo_fast.config import Config, ConfigError


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.name.removesuffix(".toml") for path in files(__name__).iterdir() if path.name.endswith(".toml"))


def recipe_values(name: str) -> dict[str, Any]:
    """The settings of a recipe, only those it changes.

    Raises:
        ConfigError: no recipe of that name; the nearest one is named.
    """
    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no recipe {name!r}{hint} Recipes: {', '.join(recipe_names())}")
    return tomllib.loads((files(__name__) / f"{name}.toml").read_text(encoding="utf-8"))


def recipe(name: str, **changes: Any) -> Config:
    """A recipe's configuration with your changes.

    Args:
        name: one of :func:`recipe_names`.
        **changes: fields of :class:`~grpo_fast.config.Config`.

    Raises:
        ConfigError: unknown recipe or field, bad type, value out of range.
    """
    return Config.parse(recipe_values(name) | changes)
