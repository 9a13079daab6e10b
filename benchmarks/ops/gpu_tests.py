"""How pytest runs the tests of the ops on a GPU: those that run kernels, breadth first, each told as it ends.

:mod:`benchmarks.ops.checks` gives it to pytest, ``-p benchmarks.ops.gpu_tests --told FILE``. A line of JSON is written and
flushed for every event, so that who stops pytest, or outlives it, knows what ran, what failed and why, and what was running.

Every variant of a kernel is compiled anew, so that time is up before all tests have run. Each test function therefore has its
turn with its first parameters before any of them has a second one, those at real sizes and in bfloat16 first.
"""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pytest

_REASON_LENGTH = 200


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--told``: where events are written."""
    parser.addoption("--told", type=Path, required=True, help="file that gets a line of JSON for every event")


def pytest_configure(config: pytest.Config) -> None:
    """Opens the file."""
    config.pluginmanager.register(Teller(config.getoption("--told")))


class Teller:
    """Chooses the tests and their order, and writes what becomes of them.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def _tell(self, **event: Any) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leaves out what runs no kernel, which any CPU can test as well."""
        chosen = [item for item in items if _is_real(item) or "device" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = breadth_first(chosen)
        self._tell(total=len(items))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is a failure."""
        if report.failed:
            self._tell(test=report.nodeid, outcome="failed", reason=_reason(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Which test a process died in."""
        self._tell(test=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of each phase of a test, what says how the test ended."""
        if report.failed:
            self._tell(test=report.nodeid, outcome="failed", reason=_reason(report))
        elif report.skipped or report.when == "call":
            self._tell(test=report.nodeid, outcome=report.outcome)


def breadth_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """The first of every test function, then the second of each; of equal ones those that need a GPU first."""
    seen: collections.Counter[tuple[Path, str]] = collections.Counter()
    keyed = []
    for item in items:
        function = item.path, item.name.partition("[")[0]
        keyed.append(((seen[function], not _is_real(item)), item))
        seen[function] += 1
    return [item for _, item in sorted(keyed, key=lambda pair: pair[0])]


def _is_real(item: pytest.Item) -> bool:
    return item.get_closest_marker("gpu") is not None


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    """What was raised, in a line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (report.longreprtext if crash is None else crash.message).strip().splitlines() or ["no reason"]
    return (lines[0] if crash is not None else lines[-1])[:_REASON_LENGTH]
