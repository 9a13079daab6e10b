"""What the README says is run: its Python and its commands. Its figures are checked in ``benchmarks/test_tables.py``."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.system.command_line import CommandLine

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [block.replace("\\\n", " ") for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)]
COMMANDS = [line.strip() for block in SHELL for line in block.splitlines() if line.startswith("grpo-fast")]


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path, forks: CommandLine) -> None:
    assert len(PYTHON) == 1
    forks.home = tmp_path
    assert forks.run_code(PYTHON[0]) == 0, forks.log()
    told = forks.log().splitlines()
    for begins in ("1 0.", "20 0.", "max_steps=20 is reached"):
        assert any(line.startswith(begins) for line in told), told


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_of_the_embedded_model_run(tmp_path: Path, forks: CommandLine) -> None:
    local = [command for command in COMMANDS if "--model" not in command]  # those that need no hub
    assert len(local) == 3
    forks.home = tmp_path
    for command in local:
        assert forks.run(*shlex.split(command, comments=True)[1:]) == 0, f"{command}\n{forks.log()}"
    assert (tmp_path / "runs/first/report.html").exists()
    assert (tmp_path / "runs/first/checkpoint-20/model.safetensors").exists()


def test_every_flag_of_training_in_the_readme_exists() -> None:
    from grpo_fast.config import Config

    known = {name.replace("_", "-") for name in Config.model_fields} | {"config", "recipe", "resume", "help"}
    training = [command for command in COMMANDS if command.startswith("grpo-fast train")]
    assert len(training) == 2
    for command in training:
        for flag in re.findall(r"--([a-z0-9-]+)", command):
            assert flag in known, f"--{flag} in the README is no flag"
