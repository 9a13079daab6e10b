"""What started this process, and whether that has begun its run before.

``torchrun`` starts its processes again, in a run that they have begun. It is known by the directory that it makes for its logs,
whose name no other launch has; a name that is given to it (``--rdzv-id``) may be used again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from pathlib import Path

from grpo_fast.run_dir import write_whole

_NOTE = ".torchrun"


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
