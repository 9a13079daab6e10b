"""Results of a device in one JSON file, rewritten whole after every case, so that nothing measured is lost."""

from __future__ import annotations

import json
import math
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpo_fast.device import DeviceFacts, versions

RESULTS = Path(__file__).parents[1] / "results"
FORMAT = 1


def default_path(facts: DeviceFacts) -> Path:
    """``benchmarks/results/<device>/ops.json``; all CPUs share a folder, the file says which one it was."""
    name = "cpu" if facts.kind == "cpu" else re.sub(r"[^a-z0-9]+", "-", facts.name.lower()).strip("-")
    return RESULTS / name / "ops.json"


def commit() -> str | None:
    """The checkout's commit, marked where tracked files other than results differ from it; ``None`` outside a checkout."""
    try:
        name = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + "-dirty" * bool(changed)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(RESULTS.parents[1]), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def today() -> str:
    """The date of a measurement, UTC."""
    return datetime.now(UTC).date().isoformat()


class Store:
    """The file of one run.

    Args:
        path: of the file.
        header: what holds for every case: device, ceilings, threads, tests.
        keep: records of an earlier run of the same file that stay; cases of the same name replace them.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, keep: list[dict[str, Any]] | None = None) -> None:
        self._path = path
        self._cases = {record["case"]: record for record in keep or []}
        self.content: dict[str, Any] = {"format": FORMAT, "versions": versions(), **header, "left_out": []}

    @property
    def done(self) -> set[str]:
        """Names of the cases that are there."""
        return set(self._cases)

    def add(self, record: dict[str, Any], *, of: dict[str, Any]) -> None:
        """Adds a case's record with where it comes from, and writes the file."""
        self._cases[record["case"]] = record | of
        self.write()

    def leave_out(self, name: str, reason: str) -> None:
        """Notes a case that was not measured."""
        self.content["left_out"].append({"case": name, "reason": reason})

    def write(self) -> None:
        """Replaces the file; a crash in between leaves the old one."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = _finite(self.content | {"cases": list(self._cases.values())})
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        scratch = self._path.with_suffix(".tmp")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(self._path)


def _finite(value: Any) -> Any:
    """The same with ``None`` for numbers that JSON has no word for, as the errors of a contender that gave NaN."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> dict[str, Any]:
    """A stored file.

    Raises:
        ValueError: it was written by another format of this suite.
    """
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {content.get('format')!r}, this suite reads {FORMAT}; measure anew without --resume"
        )
    return content
