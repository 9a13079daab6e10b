"""The commands ``grpo-fast report`` and ``grpo-fast compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from grpo_fast.cli_tables import print_json, print_notes, print_table, print_written


def report(run: Path, *, output: Path | None = None) -> int:
    """Write ``report.html`` and its plots for a run, finished or not.

    Args:
        run: Directory of the run.
        output: Write them into this directory, new or not. Default: that of the run.
    """
    from grpo_fast.report import write_report  # noqa: PLC0415 (matplotlib is slow to import)

    console = Console()
    with console.status("writing the report"):
        written = write_report(run, output)
    print_written(console, written)
    return 0


def compare(*runs: Path, json: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Compare runs, finished or not: the settings in which they differ, steps, rewards, costs, and why each ended.

    Args:
        runs: Runs, or directories of runs.
        json: Print one JSON object instead of the table.
    """
    from grpo_fast.report.compare import compare_runs, table  # noqa: PLC0415 (--help must not wait for numpy)

    found = compare_runs(runs)
    if json:
        print_json({"runs": [one.to_dict() for one in found]})
        return 0
    console = Console()
    print_table(console, *table(found))
    print_notes(console, [told for one in found for told in one.problems])
    return 0
