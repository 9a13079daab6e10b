"""Reports: a run's plots and its HTML file, the plot of a plan, and the examination of an installation.

Each name is imported when it is first used: the command line must not wait for matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fast.lazy import lazy_names

if TYPE_CHECKING:
    from grpo_fast.report.html import write_report as write_report
    from grpo_fast.report.run import Run as Run
    from grpo_fast.report.run import RunError as RunError

__getattr__, __dir__, __all__ = lazy_names(__name__, {"Run": "run", "RunError": "run", "write_report": "html"})
