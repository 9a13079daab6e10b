"""Settings under which every objective has something to do."""

from __future__ import annotations

from typing import Any

from grpo_fast.config import Config

LIMIT = 9
"""Tokens of a completion, at most."""


def settings(name: str, **changes: Any) -> Config:
    """A configuration of one objective; sequence ratios get ranges that suit them."""
    values: dict[str, Any] = {"loss_type": name, "epsilon": 0.2, "max_completion_length": LIMIT}
    if name == "cispo":
        values["epsilon_high"] = 1.3
    elif name in ("gspo", "luspo"):
        values |= {"epsilon": 0.1, "epsilon_high": 0.15}
    else:
        values["epsilon_high"] = 0.28
    return Config(**(values | changes))
