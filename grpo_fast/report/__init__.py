"""What a run leaves behind for people: pictures, one HTML file, and the examination of an installation."""

from __future__ import annotations

from grpo_fast.report.html import write_report
from grpo_fast.report.run import Run, RunError

__all__ = ["Run", "RunError", "write_report"]
