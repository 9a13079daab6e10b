from __future__ import annotations

import subprocess
import sys

from grpo_fast import __version__


def test_the_package_runs_as_the_command_does() -> None:
    done = subprocess.run([sys.executable, "-m", "grpo_fast", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__
