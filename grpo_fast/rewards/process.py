"""The pool's side of one worker process: start it, hand it a call, read its answer, end it."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Literal, TextIO, TypeAlias

from grpo_fast.rewards.worker import HEADER, Reply, pack

State: TypeAlias = Literal["starting", "idle", "busy"]

START_TIMEOUT_S = 120.0
"""Longest time a worker may take to import the modules of its reward functions; not part of a call's deadline."""

_GRACE_S = 2.0
_CHUNK_BYTES = 1 << 20
# -P keeps the current folder off the path until the parent's own path is taken over: a socket.py there must not come first.
_BOOT = (
    "import sys; descriptor, parent = map(int, sys.argv[1:3]); sys.path[:] = sys.argv[3:]; "
    "sys.stdout.reconfigure(line_buffering=True); from grpo_fast.rewards.worker import serve; serve(descriptor, parent)"
)


class WorkerDiedError(RuntimeError):
    """The worker's process ended by itself; the message says how."""


class WorkerProcess:
    """One worker process and the socket to it.

    Args:
        specs: the reward functions by their numbers, names as they are and callables pickled.
        columns: of the dataset, the prompt's left out, to hold the functions against; ``None`` holds them against none.
    """

    def __init__(self, specs: Mapping[int, str | bytes], columns: Sequence[str] | None = None) -> None:
        self.channel, theirs = socket.socketpair()
        path = [entry for entry in sys.path if isinstance(entry, str)]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, str(theirs.fileno()), str(os.getpid()), *path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                text=True,
                errors="backslashreplace",
            )
        self._printed = threading.Thread(target=_pass_on, args=(self._process.stdout,), daemon=True)
        self._printed.start()
        self.state: State = "starting"
        self._expected = 1
        self.deadline = time.monotonic() + START_TIMEOUT_S
        self._received = bytearray()
        self._open = True
        self.channel.settimeout(START_TIMEOUT_S)
        with contextlib.suppress(OSError):  # a worker that is dead already is noticed where its answer is read
            self.channel.sendall(pack(pickle.dumps((dict(specs), columns))))

    @property
    def process_id(self) -> int:
        """Process id, which is also the id of the process group that the worker leads."""
        return self._process.pid

    def submit(self, functions: Sequence[int], arguments: bytes, *, timeout_s: float) -> None:
        """Hands an idle worker a call, whose deadline starts now.

        Args:
            functions: number of the reward function, or those of several async ones.
            arguments: their pickled keyword arguments.
            timeout_s: deadline of the call, in seconds.

        Raises:
            WorkerDiedError: the process had ended before.
            TimeoutError: it does not read its socket.
        """
        self.deadline = time.monotonic() + timeout_s
        self.state, self._expected = "busy", len(functions)
        self.channel.settimeout(timeout_s)
        try:
            self.channel.sendall(pack(pickle.dumps((list(functions), timeout_s, arguments))))
        except TimeoutError:
            raise
        except OSError:
            raise WorkerDiedError(self._cause_of_death()) from None

    def receive(self) -> list[Reply]:
        """Reads what has arrived; to be called when the socket is readable.

        Returns:
            The answers that are complete, one a function; the worker is idle when all have come.

        Raises:
            WorkerDiedError: the process has ended.
        """
        try:
            part = self.channel.recv(_CHUNK_BYTES)
        except ConnectionError:
            part = b""
        if not part:
            raise WorkerDiedError(self._cause_of_death())
        self._received += part
        replies: list[Reply] = []
        while len(self._received) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self._received)[0]
            if len(self._received) < end:
                break
            replies.append(pickle.loads(bytes(self._received[HEADER.size : end])))
            del self._received[:end]
        self._expected -= len(replies)
        if not self._expected:
            self.state = "idle"
        return replies

    def kill(self) -> None:
        """Ends the worker and whatever its reward functions started, at once; calling it twice is harmless."""
        if not self._open:
            return
        self._open = False
        self.channel.close()
        # The group first: once the leader is waited for, its id may be another process's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._printed.join(_GRACE_S)  # what has left the process group may still hold the other end

    def close(self) -> None:
        """Lets an idle worker end by itself, and kills it where it does not within two seconds."""
        if self._open and self.state == "idle":
            with contextlib.suppress(OSError):
                self.channel.shutdown(socket.SHUT_WR)
                self.channel.settimeout(_GRACE_S)
                self.channel.recv(1)
            end = time.monotonic() + _GRACE_S
            while time.monotonic() < end and not _has_ended(self._process.pid):
                time.sleep(0.005)
        self.kill()

    def _cause_of_death(self) -> str:
        end = time.monotonic() + _GRACE_S
        while time.monotonic() < end and not _has_ended(self._process.pid):
            time.sleep(0.005)
        self.kill()
        code = self._process.returncode
        if code >= 0:
            return f"ended its worker process with exit code {code}"
        name = signal.Signals(-code).name
        hint = " (the kernel does this when memory runs out)" if name == "SIGKILL" else ""
        return f"ended its worker process by {name}{hint}"


def _pass_on(printed: TextIO) -> None:
    """Writes what a worker prints to standard error as it is at the time: the live console puts that above its panel."""
    with printed:
        for line in printed:
            with contextlib.suppress(OSError, ValueError):  # a closed one; the worker must be read from all the same
                if sys.stderr is not None:
                    sys.stderr.write(line)


def _has_ended(process_id: int) -> bool:
    """Whether a child has ended, without waiting for it: its id stays taken until then."""
    return os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
