"""Keeps a run going when a contender takes the process or the device down with it.

The worker says in a file beside the results what it is trying. When it dies or nothing moves for too long, it is started again
on what is left, without the contender that it was trying, or without the case where it died in the timed turns.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ops.suite import TURNS

DEAD_DEVICE = 3
"""Exit status of a worker whose device answers no more."""
_DONE = (0, 1)


def marker(path: Path) -> Path:
    """Where a worker says what it is trying, for a results file."""
    return path.with_suffix(".trying")


def sign(path: Path) -> None:
    """Says that something moves, where nothing can be told that a death would be about."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _signs(path).touch()


def _signs(path: Path) -> Path:
    return path.with_suffix(".alive")


def _forget(path: Path) -> None:
    marker(path).unlink(missing_ok=True)
    _signs(path).unlink(missing_ok=True)


def note(path: Path, case: str, contender: str) -> None:
    """Says what is tried from now on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    marker(path).write_text(json.dumps({"case": case, "contender": contender}), encoding="utf-8")


def supervise(command: Sequence[str], *, path: Path, deadline: float, stall_s: float) -> int:
    """Runs a worker until it is through.

    Args:
        command: the worker's, to which what it needs to know of earlier deaths is added.
        path: results file of the worker.
        deadline: ``time.monotonic()`` at which it should be through.
        stall_s: seconds without a sign of life after which it is stopped.

    Returns:
        Exit status of the last worker.
    """
    known: list[str] = []
    while True:
        _forget(path)
        left = max(0.0, deadline - time.monotonic())
        worker = subprocess.Popen([*command, "--worker", "--budget", f"{left:.1f}", *known])
        code, why = _watch(worker, path, stall_s)
        if code in _DONE or not marker(path).exists():
            _forget(path)
            return code
        found = json.loads(marker(path).read_text(encoding="utf-8"))
        print(f"{found['case']}, {found['contender']}: {why}; going on without", flush=True)
        if not known:
            known += ["--resume", "--no-tests"]
        if found["contender"] == TURNS:
            known += ["--skip", found["case"]]
        else:
            known += ["--ban", f"{found['contender']}={why} in {found['case']}"]


def _watch(worker: subprocess.Popen[bytes], path: Path, stall_s: float) -> tuple[int, str]:
    """Waits for a worker; its status and, where it is not through, what happened."""
    begun = time.time()
    while True:
        try:
            code = worker.wait(timeout=min(1.0, stall_s))
        except subprocess.TimeoutExpired:
            signs = [begun, *(file.stat().st_mtime for file in (path, marker(path), _signs(path)) if file.exists())]
            if time.time() - max(signs) > stall_s:
                worker.kill()
                return worker.wait(), f"no sign of life for {stall_s:.0f} s"
            continue
        if code == DEAD_DEVICE:
            return code, "took the device down"
        return code, f"ended the process with {code}"
