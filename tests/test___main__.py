from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_fast import __version__

COMMAND = """
import signal
from grpo_fast.__main__ import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests were started in the background it is ignored
main()
"""
INTERRUPTED = """
import os
import signal

os.kill(os.getpid(), signal.SIGINT)
"""
LOST = """
import os
import signal

try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    raise RuntimeError("already imported") from None
"""


def test_the_package_runs_as_the_command_does() -> None:
    done = subprocess.run([sys.executable, "-m", "grpo_fast", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__


@pytest.mark.parametrize(("library", "code"), [("cyclopts", INTERRUPTED), ("matplotlib", INTERRUPTED), ("matplotlib", LOST)])
def test_ctrl_c_during_an_import_is_one_line(library: str, code: str, tmp_path: Path) -> None:
    (tmp_path / f"{library}.py").write_text(code, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "report", "run"],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert (done.returncode, done.stderr) == (130, "error: stopped at once\n")


def test_an_error_without_an_interrupt_is_shown_whole(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise RuntimeError('broken')\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    line = [sys.executable, "-c", COMMAND, "report", "run"]
    done = subprocess.run(line, check=False, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("RuntimeError: broken\n")
