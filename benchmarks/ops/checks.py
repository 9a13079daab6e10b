"""The project's own GPU tests, run before anything is timed."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = "tests/ops"
_PLUGIN = "benchmarks.ops.gpu_tests"
_THROUGH = (0, 1)
"""Exit statuses of pytest when it ran what there is."""


def run_gpu_tests(limit_s: float, *, root: Path = ROOT, alive: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Runs the tests of the ops on the GPU in a process of their own, the most telling first.

    Args:
        limit_s: seconds after which they are stopped; how many ran of how many is told.
        root: of the checkout.
        alive: called once a second, for whoever waits for a sign of life.

    Returns:
        One line for people; what failed, each with a reason, also where the tests were stopped or their process died; and how
        many there are and how many of them ran.
    """
    if importlib.util.find_spec("pytest") is None:
        return {"summary": "not run: pytest is not installed", "failed": [], "total": 0, "ran": 0}
    with tempfile.TemporaryDirectory() as folder:
        told, log = Path(folder) / "told", Path(folder) / "log"
        code = _run(told, log, root, limit_s, alive)
        events = [json.loads(line) for line in told.read_text(encoding="utf-8").splitlines()] if told.exists() else []
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return _summary(events, code, limit_s, lines[-1] if lines else "no output")


def _run(told: Path, log: Path, root: Path, limit_s: float, alive: Callable[[], None]) -> int | None:
    """Exit status of pytest, ``None`` where it was stopped."""
    command = [sys.executable, "-m", "pytest", FOLDER, "-q", "--tb=line", "-m", "not slow", "-p", "no:cacheprovider"]
    command += ["-W", "default", "--continue-on-collection-errors", "-p", _PLUGIN, "--told", str(told)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("wb") as output:
        running = subprocess.Popen(
            command, cwd=root, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": paths}
        )
        deadline = time.monotonic() + limit_s
        while (left := deadline - time.monotonic()) > 0:
            alive()
            try:
                return running.wait(timeout=min(1.0, left))
            except subprocess.TimeoutExpired:
                continue
        running.kill()
        running.wait()
        return None


def _summary(events: list[dict[str, Any]], code: int | None, limit_s: float, last: str) -> dict[str, Any]:
    total = max((event["total"] for event in events if "total" in event), default=0)
    outcomes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for event in events:
        if "test" in event and outcomes.get(event["test"]) != "failed":
            outcomes[event["test"]] = event["outcome"]
            reasons |= {event["test"]: event["reason"]} if event["outcome"] == "failed" else {}
    running = next((name for name, outcome in outcomes.items() if outcome == "begun"), None)
    if code is not None and code not in _THROUGH:
        reasons[running or "pytest"] = f"the tests ended with {code}: {last[:200]}"
    counts = collections.Counter(outcome for outcome in outcomes.values() if outcome != "begun")
    ran = sum(counts.values())
    if code is None and not ran:
        reasons["pytest"] = f"no test was through after {limit_s:.0f} s"
    told = ", ".join(f"{counts[name]} {name}" for name in ("failed", "passed", "skipped") if counts[name]) or "none ran"
    where = f" in {running}" if running else ""
    late = f", stopped after {limit_s:.0f} s{where}" if code is None else ""
    summary = f"{told}, of {total}{late}"
    return {"summary": summary, "failed": [f"{name}: {reason}" for name, reason in reasons.items()], "total": total, "ran": ran}
