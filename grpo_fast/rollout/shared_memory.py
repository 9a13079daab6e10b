"""Room in shared memory, which is taken before it is written to: a process that writes where there is none left is killed.

``/dev/shm`` is a file system of its own, in a container often of 64 MiB. A file there that is only made longer has no pages
yet; they are taken when they are first written, and where none are left that ends in SIGBUS, not in an error.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
_EXCHANGE = f"{SHARED_MEMORY}/vllm_dist_"
_FIX = "give more shared memory (docker: --shm-size)"


def room(place: Path = SHARED_MEMORY) -> int:
    """Bytes that are left there."""
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def check_room(num_bytes: int, purpose: str, *, place: Path = SHARED_MEMORY, fix: str = _FIX) -> None:
    """Checks that there is room, where there is shared memory at all.

    Args:
        num_bytes: that are needed.
        purpose: what for, for the error.
        place: the directory.
        fix: what can be done.

    Raises:
        OSError: there is not; what is needed, what is left and the fix are told.
    """
    if place.is_dir() and room(place) < num_bytes:
        raise _full(num_bytes, purpose, place=place, fix=fix)


def reserve(handle: int, num_bytes: int, purpose: str, *, place: Path = SHARED_MEMORY, fix: str = _FIX) -> None:
    """Takes the pages of an open file, the arguments being those of :func:`check_room`.

    Raises:
        OSError: there is no room for them.
    """
    try:
        os.posix_fallocate(handle, 0, num_bytes)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _full(num_bytes, purpose, place=place, fix=fix) from error


def reserve_queues() -> None:
    """Takes the pages of the memory by which this process of vLLM's speaks to others: vLLM (0.32) takes room for granted.

    What workers exchange tensors through on a CPU loses its name, as all of them have it by now: vLLM (0.32) would leave it.

    Raises:
        OSError: there is no room.
    """
    if not SHARED_MEMORY.is_dir():
        return
    for path in {each.path for each in psutil.Process().memory_maps()}:
        if path.startswith((f"{SHARED_MEMORY}/psm_", _EXCHANGE)):
            with contextlib.suppress(FileNotFoundError), Path(path).open("r+b") as file:
                reserve(file.fileno(), os.fstat(file.fileno()).st_size, "a queue of vLLM's processes")
                if path.startswith(_EXCHANGE):
                    Path(path).unlink()


def _full(num_bytes: int, purpose: str, *, place: Path, fix: str) -> OSError:
    needed, left = num_bytes / 2**20, room(place) / 2**20
    return OSError(errno.ENOSPC, f"{place} has no room for {purpose}: {needed:.1f} MiB are needed, {left:.1f} are left; {fix}")
