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
from collections import deque
from typing import IO

from grpo_fast.rollout.engine import RolloutError
from grpo_fast.rollout.vllm_environment import held_port

PROGRAM = "GRPO_FAST_SSH"
"""Variable with the command to use in place of ``ssh``, with options of its own, such as ``ssh -F cluster.conf``."""
_LOGIN_S = 60.0
_END_S = 5.0
_AFTER_S = 0.5
"""What ssh forwards ends a moment before itself."""
_MOST_LINES = 20
_REFUSAL_S = 2.0
"""For a refusal to come back over a slow link."""
_OPTIONS = {
    "BatchMode": "yes",  # nobody is there to type a password
    "ControlMaster": "no",  # a shared connection would outlive this one, or end it
    "ControlPath": "none",
    "ExitOnForwardFailure": "no",  # the user's configuration may forward ports that another ssh of theirs holds
    "RemoteCommand": "none",
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
        self._words: deque[str] = deque(maxlen=_MOST_LINES)
        self._reader = threading.Thread()
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
            process, reader, words = self._process, self._reader, self._words
        return _last_words(process, reader, words)  # all whose requests it broke off ask at once, and none waits for another

    @property
    def is_forbidden(self) -> bool:
        """Whether the other machine lets this user log in, and connects nobody to its ports."""
        return any("administratively prohibited" in line for line in list(self._words))

    def close(self) -> None:
        """Ends the connection for good; calling it twice is harmless."""
        with self._lock:
            self._is_closed = True
            self._close()

    def _log_in(self) -> None:
        options = [part for name, value in _OPTIONS.items() for part in ("-o", f"{name}={value}")]
        there = f"127.0.0.1:{self._local}:127.0.0.1:{self._port}"
        self._process = _started([*options, "-T", "-L", there, "--", self.host, "cat"])
        self._words = deque(maxlen=_MOST_LINES)
        self._reader = threading.Thread(target=_read_all, args=(self._process.stderr, self._words), daemon=True)
        self._reader.start()
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            os.write(_pipe(self._process.stdin), b"\n")
        echo = _pipe(self._process.stdout)
        ready = select.poll()
        ready.register(echo, select.POLLIN)
        if not ready.poll(1000 * _LOGIN_S) or not os.read(echo, 1):
            words = _last_words(self._process, self._reader, self._words) or f"no answer within {_LOGIN_S:g} s"
            self._close()
            raise RolloutError(
                f"ssh cannot reach {self.host}: {words}; `ssh {self.host} cat` must work without a question "
                f"(a key, and a known host); options go into ~/.ssh/config, or a command of yours into {PROGRAM}"
            )
        if not _is_listened_to(self._local):
            words = next(iter(reversed(self._words)), "it does not say why")
            self._close()
            raise RolloutError(f"ssh reaches {self.host}, but leads no port of this machine there: {words}")

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _last_words(process: subprocess.Popen[bytes] | None, reader: threading.Thread, words: deque[str]) -> str | None:
    """What ``ssh`` said at its end; ``None`` where it runs, or there is none."""
    if process is None:
        return None
    try:
        code = process.wait(_AFTER_S)
    except subprocess.TimeoutExpired:
        return None
    reader.join(_AFTER_S)  # what ssh started may hold the pipe open
    told = [line for line in words if not line.startswith("debug")]
    return told[-1] if told else f"exit code {code}"


def is_hung_up(connection: socket.socket, *, beside: socket.socket) -> bool:
    """Whether ssh, which takes every connection to its port, closes this one because nothing takes it at the other end.

    It finds out as late as the network is slow. An answer that comes on the connection ``beside`` does not wait for that.
    """
    ready = select.poll()
    for each in (connection, beside):
        ready.register(each, select.POLLIN)
    found = {handle for handle, _ in ready.poll(1000 * _REFUSAL_S)}
    if beside.fileno() in found or connection.fileno() not in found:
        return False
    try:
        return connection.recv(1) == b""
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


def _is_listened_to(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # whoever holds the port only does so too
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
        return False


def _read_all(pipe: IO[bytes], words: deque[str]) -> None:
    """Of what ssh says only the last is kept: it has a line for every connection that is refused, and its end is told last."""
    with pipe:
        words.extend(line.decode(errors="replace").strip() for line in pipe)
