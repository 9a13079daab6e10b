"""What a trainer shares with its vLLM servers, as each of them sees it: its own files, or copies on the server's machine.

A server that does not see the trainer's memory is written to over its port (:mod:`~grpo_fast.rollout.vllm_mirror`); several on
one machine share one copy. Nothing here imports vLLM.
"""

from __future__ import annotations

import mmap
import secrets
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_fast.rollout.engine import RolloutError
from grpo_fast.rollout.vllm_adapters import AdapterVersion
from grpo_fast.rollout.vllm_client import VLLMServer
from grpo_fast.rollout.vllm_mirror import MARK_BYTES, MIDDLEWARE, ROUTES


class Copies:
    """The file that buckets of weights go through, and its copies.

    Args:
        servers: that read it.
        path: the file, as long as it has a name. Nothing is in it yet.
        num_bytes: its size.

    Raises:
        RolloutError: a server neither sees the file nor can make another.
    """

    def __init__(self, servers: Sequence[VLLMServer], path: str, num_bytes: int) -> None:
        with Path(path).open("r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), num_bytes)
        mark = secrets.token_bytes(MARK_BYTES)  # no file of another machine has it; buckets go over it
        self._bytes[: len(mark)] = mark
        self._paths: dict[VLLMServer, str] = {}
        self._writers: dict[str, VLLMServer] = {}
        for server in servers:
            seen = next((known for known in (path, *self._writers) if _sees(server, known, mark)), None)
            if seen is None:
                seen = str(server.post(_route("memory", num_bytes=num_bytes))["path"])
                self._writers[seen] = server
                server.put(_route("memory", path=seen, place=0), mark)
            self._paths[server] = seen

    def path(self, server: VLLMServer) -> str:
        """The file's path for that server's processes."""
        return self._paths[server]

    def bring(self, server: VLLMServer, place: int, num_bytes: int) -> None:
        """Writes a part of the file to the copy that this server writes, where it writes one."""
        path = self._paths[server]
        if self._writers.get(path) is server:
            with memoryview(self._bytes) as whole, whole[place : place + num_bytes] as part:
                server.put(_route("memory", path=path, place=place), part)


class AdapterCopies:
    """Versions of LoRA adapters as servers see them."""

    def __init__(self) -> None:
        self._written: set[tuple[VLLMServer, str]] = set()

    def bring(self, server: VLLMServer, adapter: AdapterVersion) -> AdapterVersion:
        """The version, or where the server does not see it a copy that it then has."""
        files = sorted(path for path in adapter.path.iterdir() if path.is_file())
        if not files or _sees(server, str(files[-1]), files[-1].read_bytes()[:MARK_BYTES]):
            return adapter
        self._written.add((server, adapter.name))
        told = [server.put(_route("adapters", name=adapter.name, file=file.name), file.read_bytes()) for file in files]
        return adapter._replace(path=Path(told[-1]["path"]))

    def remove(self, server: VLLMServer, adapter: AdapterVersion) -> None:
        """Has the server remove its copy, if it has one."""
        if (server, adapter.name) in self._written:
            self._written.discard((server, adapter.name))
            server.call("DELETE", _route("adapters", name=adapter.name))


def _sees(server: VLLMServer, path: str, mark: bytes) -> bool:
    """Whether the server sees the trainer's file; without the routes it does if it is on this machine."""
    try:
        return bool(server.get(_route("sees", path=path, mark=mark.hex()))["sees"])
    except RolloutError as error:
        if '"Not Found"' not in str(error):
            raise
        if server.machine is not None:
            raise RolloutError(
                f"vLLM's server {server.url} has no routes that take weights from another machine; start it with `grpo-fast "
                f"serve`, or with --middleware {MIDDLEWARE}"
            ) from error
        return True


def _route(route: str, **asked: Any) -> str:
    return f"{ROUTES}/{route}?{urllib.parse.urlencode(asked)}"
