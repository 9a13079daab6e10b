"""A run's claim on its directory: an existing run is reported, and a second process is kept out."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from grpo_fast.config import Config, ConfigError
from grpo_fast.rewards import names_model
from grpo_fast.run_dir import CONFIG_FILE, LOCK_FILE, empty_run, is_cut_short, nearest_place, why_unwritable
from grpo_fast.train.checkpoint import leftovers

_log = logging.getLogger(__name__)
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class _Lock:
    """A file that this process has locked, until the last claim that has this lets go of it."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        weakref.finalize(self, file.close)


_locks: weakref.WeakValueDictionary[tuple[int, int], _Lock] = weakref.WeakValueDictionary()
"""Locks of this process, by device and inode of the file."""


def _leave_to_parent() -> None:
    """A fork would have the lock too, and keep it when the process that took it has ended."""
    for lock in _locks.values():
        lock.file.close()
    _locks.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


class Claim:
    """A process's claim on the directory that its run writes to.

    The lock is the system's (``flock``), on a file in the directory: it is free once the process has ended, however it did, and
    processes that it started do not have it. It is taken before anything is read where there is a run already, and where there
    is none when the first file is written. A second trainer of the same process is let in: notebooks leave the first one open.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._run = config.output_dir
        self._replaces_run = False
        self._lock: _Lock | None = None

    def stake(self, *, resume: bool) -> None:
        """Checks what is in the directory, and locks it where that is a run; writes nothing else.

        Args:
            resume: whether the existing run is resumed.

        Raises:
            ConfigError: the directory cannot be used, or another process does.
        """
        self._check_place()
        self._replaces_run = not resume and self._holds_run()
        if self._replaces_run or (resume and self._run.is_dir()):
            self._take()

    def spare(self, base: str, given: Mapping[str, Any]) -> None:
        """Refuses to delete what the new run begins from; to be called before :meth:`open`.

        Args:
            base: directory or hub id of the model, or of the one under the adapters that the run begins from.
            given: what the trainer was given in place of configured parts.

        Raises:
            ConfigError: it lies in the run that is to be replaced.
        """
        config, run = self._config, self._run.resolve()
        sources: list[tuple[str, str | Path | None]] = [
            ("model", config.model),
            ("base model", base),
            ("dataset", config.dataset.removeprefix("gsm8k:")),
            ("forecast_prior", config.forecast_prior),
            *(("reward model", spec) for spec in config.reward_funcs if names_model(spec)),
        ]
        for name in ("train_dataset", "eval_dataset"):  # a datasets.Dataset tells its files
            sources += [(name, file["filename"]) for file in getattr(given.get(name), "cache_files", ())]
        for name, place in sources if self._replaces_run else ():
            if place and (path := Path(place).expanduser()).exists() and run in (found := path.resolve(), *found.parents):
                raise ConfigError(
                    f"overwrite would delete {self._run}, where this run's {name} is ({place}); name another output_dir, or "
                    "move that out of it first"
                )

    def freed(self) -> list[Path]:
        """What will be deleted before the first checkpoint is written: all of a run that is replaced, else leftovers in it."""
        return list(self._run.iterdir()) if self._replaces_run else leftovers(self._run)

    def open(self) -> None:
        """Makes the directory, locks it and deletes the run that was in it, if it is to be replaced.

        Raises:
            ConfigError: another process uses it, or has since left a run there.
        """
        self._run.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._take()
            self._replaces_run = self._holds_run()
        if self._replaces_run:
            empty_run(self._run)
            self._replaces_run = False

    def release(self) -> None:
        """Releases the directory; calling it twice is harmless."""
        self._lock = None

    def _check_place(self) -> None:
        """Finds out before anything is loaded what could not be made or written after it."""
        run = self._run
        places = (run.absolute(), *run.absolute().parents)
        for path in places:
            if os.path.islink(path) and not os.path.exists(path):  # noqa: PTH110, PTH114 (see nearest_place)
                raise ConfigError(
                    f"output_dir {run} cannot be made: {path} is a link to {path.readlink()}, where nothing is; make that "
                    "directory, remove the link, or name another"
                )
        place = nearest_place(run)
        if not place.is_dir():
            named = f"{run} is a file" if place == run.absolute() else f"{run} cannot be made, because {place} is a file"
            raise ConfigError(f"output_dir {named}; name a directory")
        why = why_unwritable(run)
        if why is not None:
            raise ConfigError(f"output_dir {run} cannot be written ({why}); name another")

    def _holds_run(self) -> bool:
        """Whether there is a run that may be replaced; anything else that stands in the way is an error."""
        run = self._run
        if not run.is_dir() or all(is_cut_short(path) or path.name == LOCK_FILE for path in run.iterdir()):
            return False
        if not (run / CONFIG_FILE).exists():
            raise ConfigError(f"output_dir {run} contains files that are not a run; name an empty or new directory")
        if not self._config.overwrite:
            raise ConfigError(
                f"output_dir {run} already holds a run; resume it with `grpo-fast train --resume {run}` or, in repeated "
                "commands, --resume-if-exists, replace it with --overwrite, or name another directory (in Python: "
                "GRPOTrainer.resume, overwrite=True)"
            )
        return True

    def _take(self) -> None:
        file = (self._run / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            found = os.fstat(file.fileno())
            place = found.st_dev, found.st_ino
            self._lock = _locks.get(place)
            if self._lock is not None:
                file.close()
                return
            self._lock_file(file)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        except BaseException as error:
            if isinstance(error, OSError):
                error.filename = error.filename or str(self._run)
            with contextlib.suppress(OSError):  # it writes again what could not be written
                file.close()
            raise
        self._lock = _locks[place] = _Lock(file)

    def _lock_file(self, file: TextIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # that of lockf goes when any handle of the file is closed
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ConfigError(
                f"output_dir {self._run} is in use by {file.read() or 'another process'}; wait until that has ended, end "
                "it, or name another directory"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _log.warning(
                "%s cannot be locked (%s): make sure that no second process works on this run", self._run, error.strerror
            )
