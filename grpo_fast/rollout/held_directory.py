"""Files in shared memory that go with the process that made them, or, where it was killed, with the next one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from grpo_fast.rollout.shared_memory import SHARED_MEMORY

_PREFIX = "grpo_fast-held-"
_YOUNG_S = 60.0


class HeldDirectory:
    """A directory of one process, in shared memory where there is one; making one removes those that killed processes left."""

    def __init__(self) -> None:
        home = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        _sweep(home or Path(tempfile.gettempdir()))
        self._directory = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=home)
        self.path = Path(self._directory.name)
        self._lock: int | None = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def close(self) -> None:
        """Removes it with all in it; calling it twice is harmless."""
        self._directory.cleanup()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _sweep(home: Path) -> None:
    """Removes what processes that were killed left, which is memory; the kernel has let go of their locks."""
    for left in home.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or just removed
            if abs(time.time() - left.stat().st_mtime) < _YOUNG_S:  # one from the future is from before the clock was set
                continue  # it may only be about to be locked
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)
