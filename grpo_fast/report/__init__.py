"""What people read: a run's pictures and its one HTML file, the plan of one to come, and the examination of an installation.

Each name is imported when it is first used: the command line must not wait for matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_fast.report.html import write_report as write_report
    from grpo_fast.report.run import Run as Run
    from grpo_fast.report.run import RunError as RunError

_HOMES = {"Run": "run", "RunError": "run", "write_report": "html"}
__all__ = sorted(_HOMES)  # noqa: PLE0605 (the names are strings)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grpo_fast.report' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"grpo_fast.report.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
