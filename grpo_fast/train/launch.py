"""What started this process: whether others belong to it, which device it is to take, and whether it is a restart.

``torchrun`` starts its processes again, in a run that they have begun. It is known by the directory that it makes for its logs,
whose name no other launch has; a name that is given to it (``--rdzv-id``) may be used again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from grpo_fast.config import ConfigError
from grpo_fast.run_dir import write_whole

_NOTE = ".torchrun"


def refuse_lone_tasks(environment: Mapping[str, str] = os.environ) -> None:
    """Refuses to train alone, in each of several tasks that ``srun`` has started.

    Raises:
        ConfigError: this is such a task, and nothing says that it is to be on its own.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")  # of the step; a script of sbatch and a shell of salloc are no steps
    if tasks != "1" and "SLURM_PROCID" in environment and "WORLD_SIZE" not in environment:
        raise ConfigError(
            f"srun has started {tasks} tasks, and each would train alone: have it start one torchrun on each node "
            "(--ntasks-per-node=1), which starts the processes; for independent runs set WORLD_SIZE=1"
        )


def device_number(num_devices: int, environment: Mapping[str, str] = os.environ) -> int:
    """Which of the GPUs that this process sees is its own.

    Args:
        num_devices: how many it sees.
        environment: with ``LOCAL_RANK`` or, without it, ``RANK``.

    Raises:
        ConfigError: there are fewer than the number of the process says; only where it sees a single one, that is its own.
    """
    name = "LOCAL_RANK" if "LOCAL_RANK" in environment else "RANK"
    number = int(environment[name])
    if number < num_devices:
        return number
    if num_devices == 1:
        return 0
    raise ConfigError(
        f"{name}={number}, and this process sees {num_devices} GPUs: start as many processes on a node as it has GPUs "
        "(torchrun --nproc-per-node), and look at CUDA_VISIBLE_DEVICES"
        + ("" if name == "LOCAL_RANK" else "; what starts them should tell each its LOCAL_RANK")
    )


def check_devices(devices: list[str]) -> None:
    """Refuses one GPU for two processes.

    Args:
        devices: what identifies each rank's.

    Raises:
        ConfigError: two are the same.
    """
    for rank, device in enumerate(devices):
        first = devices.index(device)
        if first != rank:
            raise ConfigError(
                f"ranks {first} and {rank} have the same GPU ({device}): start as many processes on a node as it has GPUs "
                "(torchrun --nproc-per-node), and look at CUDA_VISIBLE_DEVICES"
            )


def launcher() -> str:
    """Names the ``torchrun`` that started this process: a restart has the same, each launch another; empty without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    # DIRECTORY/attempt_0/0/error.json; /dev/null where no logs are wanted
    logs = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", os.devnull))
    name = logs.parents[2] if len(logs.parents) > 3 else f"process {os.getppid()}"
    return f"{name} on {socket.gethostname()}"


def note_launch(run_dir: Path, launchers: Collection[str]) -> None:
    """Leaves word in a run's directory of what began it, or has gone on with it.

    Args:
        run_dir: the run.
        launchers: each rank's :func:`launcher`; without any, nothing is left.
    """
    if any(launchers):
        write_whole(run_dir / _NOTE, "\n".join(sorted({*filter(None, launchers)})))


def is_restart(run_dir: Path, launchers: Collection[str]) -> bool:
    """Whether a ``torchrun`` has started this process again after earlier ones, that it started too, began the run.

    Args:
        run_dir: the run.
        launchers: each rank's :func:`launcher`; after the loss of a node one of those that began it is enough.
    """
    note = run_dir / _NOTE
    # a node counts the restarts for which its own processes were the cause
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 or int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    return again and note.is_file() and not {*filter(None, launchers)}.isdisjoint(note.read_text(encoding="utf-8").split("\n"))


def in_words(ranks: Sequence[int]) -> str:
    """Numbers of ranks, as in ``ranks 0-3, 7``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    told = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank {told}" if len(ranks) == 1 else f"ranks {told}"
