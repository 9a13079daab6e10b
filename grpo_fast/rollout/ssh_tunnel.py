"""Ways to ports of other machines' loopback interfaces, by the user's own ``ssh``.

vLLM's routes that change weights know no key, so a server listens on its machine's loopback interface alone. Who can log in
there can reach it: ssh brings a port of this machine's to it, and proves and encrypts the rest.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import socket
import subprocess
import threading
from typing import IO

from grpo_fast.rollout.engine import RolloutError
from grpo_fast.rollout.vllm_environment import held_port

PROGRAM = "GRPO_FAST_SSH"
"""Variable with the command to use in place of ``ssh``, with options of its own, such as ``ssh -F cluster.conf``."""
_LOGIN_S = 60.0
_END_S = 5.0
_AFTER_S = 0.5
"""What ssh forwards ends a moment before itself."""
_MOST_WORDS = 10_000
_REFUSAL_S = 0.2
_OPTIONS = {
    "BatchMode": "yes",  # nobody is there to type a password
    "ControlMaster": "no",  # a shared connection would outlive this one, or end it
    "ControlPath": "none",
    "ExitOnForwardFailure": "yes",
    "ConnectTimeout": "20",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
}


class Tunnel:
    """A port of this machine that leads to one of another's loopback interface.

    It ends with this process, however that ends: ``ssh`` runs ``cat`` there, which ends with its input.

    Args:
        host: what ``ssh`` calls the machine, with the user's name where one is needed: ``node2`` or ``me@node2``.
        port: on its loopback interface.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self._port = port
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._local = 0
        self._words = ""
        self._is_closed = False

    def open(self) -> int:
        """Logs in, where there is no connection yet or it has ended, and returns the port here.

        Raises:
            RolloutError: it cannot, and what ``ssh`` says is told; or it was closed.
        """
        with self._lock:
            if self._is_closed:
                raise RolloutError(f"the connection to {self.host} was closed")
            if self._process is None or self._process.poll() is not None:
                self._close()
                with held_port() as self._local:
                    self._log_in()
            return self._local

    def why_ended(self) -> str | None:
        """What ``ssh`` said at its end; ``None`` while the connection stands, or where there was none yet."""
        with self._lock:
            return self._last_words()

    def close(self) -> None:
        """Ends the connection for good; calling it twice is harmless."""
        with self._lock:
            self._is_closed = True
            self._close()

    def _log_in(self) -> None:
        options = [part for name, value in _OPTIONS.items() for part in ("-o", f"{name}={value}")]
        there = f"127.0.0.1:{self._local}:127.0.0.1:{self._port}"
        self._words = ""
        self._process = _started([*options, "-T", "-L", there, "--", self.host, "cat"])
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            os.write(_pipe(self._process.stdin), b"\n")
        echo = _pipe(self._process.stdout)
        ready = select.poll()
        ready.register(echo, select.POLLIN)
        if not ready.poll(1000 * _LOGIN_S) or not os.read(echo, 1):
            words = self._last_words() or f"no answer within {_LOGIN_S:g} s"
            self._close()
            raise RolloutError(
                f"ssh cannot reach {self.host}: {words}; `ssh {self.host} cat` must work without a question "
                f"(a key, and a known host); options go into ~/.ssh/config, or a command of yours into {PROGRAM}"
            )

    def _last_words(self) -> str | None:
        process = self._process
        if process is None:
            return None
        try:
            code = process.wait(_AFTER_S)
        except subprocess.TimeoutExpired:
            return None
        if not self._words:  # the pipe tells them once
            told = _pipe(process.stderr)
            os.set_blocking(told, False)  # what ssh started may hold it open
            with contextlib.suppress(BlockingIOError):
                self._words = os.read(told, _MOST_WORDS).decode(errors="replace").strip()
        return self._words.splitlines()[-1] if self._words else f"exit code {code}"

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.communicate(timeout=_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def is_hung_up(connection: socket.socket) -> bool:
    """Whether ssh, which takes every connection to its port, closes this one because nothing takes it at the other end."""
    connection.settimeout(_REFUSAL_S)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def address_towards(host: str) -> str:
    """This machine's address on the network that leads to another, which that one can connect to.

    Args:
        host: what ``ssh`` calls the other machine.

    Raises:
        RolloutError: no network leads there.
    """
    settings = _started(["-G", "--", host]).communicate()[0].decode(errors="replace")
    found = dict(line.partition(" ")[::2] for line in settings.splitlines())
    name = found.get("hostname", host)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise RolloutError(f"{name} has no address that this machine can reach ({error}), which NCCL needs") from error


def _started(arguments: list[str]) -> subprocess.Popen[bytes]:
    program = shlex.split(os.environ.get(PROGRAM, "ssh")) or ["ssh"]
    pipe = subprocess.PIPE
    try:
        # In a session of its own: Ctrl-C asks the trainer to end after a step, which still needs the connection.
        return subprocess.Popen([*program, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    except OSError as error:
        raise RolloutError(f"{program[0]} cannot be started ({error.strerror}); install OpenSSH's client") from error


def _pipe(pipe: IO[bytes] | None) -> int:
    assert pipe is not None
    return pipe.fileno()
