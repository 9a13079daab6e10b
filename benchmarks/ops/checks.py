"""The project's own GPU tests, run before anything is timed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = "tests/ops"


def run_gpu_tests(limit_s: float) -> dict[str, Any]:
    """Runs the tests of the ops on the GPU in a process of their own.

    Args:
        limit_s: seconds after which they are stopped; what has not run by then is told.

    Returns:
        Counts, the names of failed tests, and one line for people.
    """
    if importlib.util.find_spec("pytest") is None:
        return {"summary": "not run: pytest is not installed", "failed": []}
    command = [sys.executable, "-m", "pytest", FOLDER, "-q", "-m", "not slow", "-p", "no:cacheprovider", "-W", "default"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False)
        output, late = done.stdout + done.stderr, ""
    except subprocess.TimeoutExpired as stopped:
        output = (stopped.stdout or b"").decode(errors="replace")
        late = f", stopped after {limit_s:.0f} s"
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, flags=re.MULTILINE)
    last = output.strip().splitlines()[-1] if output.strip() else "no output"
    return {"summary": last.strip("= ") + late, "failed": failed}
