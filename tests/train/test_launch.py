from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from grpo_fast.config import ConfigError
from grpo_fast.train.launch import (
    check_devices,
    device_number,
    in_words,
    is_restart,
    launcher,
    note_launch,
    refuse_lone_tasks,
)
from tests.train.distributed.launches import torchrun

STEP = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}


def test_tasks_of_srun_do_not_train_alone() -> None:
    with pytest.raises(ConfigError, match=r"srun has started 2 tasks, .* one torchrun on each node .* set WORLD_SIZE=1"):
        refuse_lone_tasks(STEP)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},  # in a script of sbatch, outside a step
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # in a shell of salloc, which is a step of one task
        STEP | {"WORLD_SIZE": "1"},
    ],
)
def test_a_single_process_under_slurm_trains(environment: dict[str, str]) -> None:
    refuse_lone_tasks(environment)


@pytest.mark.parametrize(
    ("num_devices", "environment", "number"),
    [
        (8, {"LOCAL_RANK": "3", "RANK": "11"}, 3),
        (1, {"LOCAL_RANK": "3", "RANK": "11"}, 0),  # each task sees its own GPU alone
        (4, {"RANK": "2"}, 2),
        (1, {"RANK": "11"}, 0),
    ],
)
def test_a_rank_takes_the_gpu_of_its_local_number(num_devices: int, environment: dict[str, str], number: int) -> None:
    assert device_number(num_devices, environment) == number


@pytest.mark.parametrize(
    ("num_devices", "environment", "told"),
    [
        (4, {"LOCAL_RANK": "4", "RANK": "4"}, r"LOCAL_RANK=4, and this process sees 4 GPUs: .*CUDA_VISIBLE_DEVICES$"),
        (4, {"RANK": "5"}, r"RANK=5, and this process sees 4 GPUs: .*should tell each its LOCAL_RANK$"),
        (0, {"LOCAL_RANK": "0", "RANK": "0"}, r"LOCAL_RANK=0, and this process sees 0 GPUs"),
    ],
)
def test_more_ranks_than_gpus_are_refused(num_devices: int, environment: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        device_number(num_devices, environment)


def test_two_ranks_on_one_gpu_are_refused() -> None:
    check_devices(["a of one", "b of one", "a of two"])
    with pytest.raises(ConfigError, match=r"ranks 0 and 2 have the same GPU \(a of one\)"):
        check_devices(["a of one", "b of one", "a of one"])


@pytest.mark.parametrize(
    ("ranks", "words"), [([2], "rank 2"), ([0, 1, 2, 3], "ranks 0-3"), ([0, 2, 3, 7], "ranks 0, 2-3, 7"), ([1, 2], "ranks 1-2")]
)
def test_ranks_are_named_in_spans(ranks: list[int], words: str) -> None:
    assert in_words(ranks) == words


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
