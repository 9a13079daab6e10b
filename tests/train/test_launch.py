from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from grpo_fast.train.launch import is_restart, launcher, note_launch
from tests.train.distributed.launches import torchrun


def test_without_torchrun_nothing_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launcher() == ""
    note_launch(tmp_path, [launcher()])
    assert not list(tmp_path.iterdir())


def test_a_launch_without_logs_is_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", os.devnull)
    assert launcher() == f"process {os.getppid()} on {socket.gethostname()}"


@pytest.mark.parametrize("environment", [{"TORCHELASTIC_RESTART_COUNT": "1"}, {"GROUP_WORLD_SIZE": "2"}])
def test_one_launcher_of_those_that_began_a_run_starts_it_again(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("TORCHELASTIC_RESTART_COUNT", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    note_launch(tmp_path, ["first on a", "second on b", "first on a"])
    assert not is_restart(tmp_path, ["first on a"]), "it may as well be another trainer of the same process"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_restart(tmp_path, ["first on a", "second on b"])
    assert is_restart(tmp_path, ["second on b", "third on c"]), "a node was replaced"
    assert not is_restart(tmp_path, ["third on a", "fourth on b"]), "another launch, which may bear the same name"
    assert not is_restart(tmp_path, ["", ""])
    assert not is_restart(tmp_path / "elsewhere", ["first on a"])


TELLING = """
import os, sys
from pathlib import Path
from grpo_fast.train.launch import launcher

Path(sys.argv[1] + os.environ["TORCHELASTIC_RESTART_COUNT"]).write_text(launcher())
sys.exit(sys.argv[1] == "first" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
"""


@pytest.mark.slow
def test_a_launch_is_the_same_after_a_restart_and_another_under_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "telling.py").write_text(TELLING, encoding="utf-8")
    for launch in ("first", "second"):
        options = ("--max-restarts", "1", "--rdzv-id", "one name")
        done = torchrun(1, "telling.py", launch, cwd=tmp_path, options=options)
        assert done.returncode == 0, done.stderr
    first, again, second = ((tmp_path / name).read_text(encoding="utf-8") for name in ("first0", "first1", "second0"))
    assert first == again != second
