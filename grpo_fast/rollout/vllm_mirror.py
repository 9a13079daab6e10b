"""Memory of a vLLM server's machine that a trainer elsewhere writes to, over the server's own port.

Buckets of weights lie in a file in shared memory. A server on another machine, or in another container, does not see the
trainer's. It then makes one of its own, the trainer writes each bucket there too, and vLLM's workers read it as they would
read the trainer's. ``grpo-fast serve`` adds :class:`Mirror` to vLLM's server by vLLM's own option ``--middleware``.

=========================================== ==================================================================
Request                                     Answer
=========================================== ==================================================================
``GET /grpo_fast/sees?path=&mark=``         whether a file here begins with these 32 bytes (in hexadecimal)
``POST /grpo_fast/memory?num_bytes=``       makes the file, in place of one before and of its trainer's adapters: its path for
                                            processes here
``PUT /grpo_fast/memory?path=&place=``      writes the body there
``PUT /grpo_fast/adapters?name=&file=``     writes one file of a LoRA adapter: the adapter's directory
``DELETE /grpo_fast/adapters?name=``        removes an adapter's directory
=========================================== ==================================================================

Nothing here imports vLLM.
"""

from __future__ import annotations

import errno
import hmac
import json
import mmap
import os
import re
import secrets
import shutil
import stat
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import psutil

from grpo_fast.rollout.held_directory import HeldDirectory
from grpo_fast.rollout.shared_memory import reserve
from grpo_fast.rollout.vllm_addresses import api_key

MIDDLEWARE = "grpo_fast.rollout.vllm_mirror.Mirror"
"""What vLLM's option ``--middleware`` calls it."""
ROUTES = "/grpo_fast"
MARK_BYTES = 32
"""Of a file's beginning that are compared, all at once: by fewer, whoever reaches the port could read a file piece by piece."""
_PLAIN_NAME = re.compile(r"[\w][\w.-]*")
_Receive = Callable[[], Awaitable[Mapping[str, Any]]]
_Send = Callable[[dict[str, Any]], Awaitable[None]]


class Mirror:
    """Answers the routes above, in front of vLLM's own application; requests need vLLM's key, where there is one.

    Args:
        app: what answers all other requests.
    """

    def __init__(self, app: Callable[[Mapping[str, Any], _Receive, _Send], Awaitable[None]]) -> None:
        self._app = app
        self._home: HeldDirectory | None = None
        self._memory: _Memory | None = None

    async def __call__(self, scope: Mapping[str, Any], receive: _Receive, send: _Send) -> None:
        """Answers one request, or stands by for as long as the server runs, which is a call too."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            self._close()
            return
        if scope["type"] != "http" or not scope["path"].startswith(f"{ROUTES}/"):
            await self._app(scope, receive, send)
            return
        status, answer = HTTPStatus.OK, {}
        if not _has_key(scope):
            status, answer = HTTPStatus.UNAUTHORIZED, {"error": "Unauthorized"}
        else:
            try:
                answer = await self._answer(scope, _body(receive))
            except (KeyError, IndexError, ValueError) as error:
                status, answer = HTTPStatus.BAD_REQUEST, {"error": str(error)}
            except LookupError as error:
                status, answer = HTTPStatus.NOT_FOUND, {"error": str(error)}
            except OSError as error:
                status, answer = HTTPStatus.INSUFFICIENT_STORAGE, {"error": str(error)}
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": int(status), "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    async def _answer(self, scope: Mapping[str, Any], body: AsyncIterator[bytes]) -> dict[str, Any]:
        asked = dict(urllib.parse.parse_qsl(scope["query_string"].decode()))
        answer: dict[str, Any] = {}
        match scope["method"], scope["path"].removeprefix(ROUTES):
            case "GET", "/sees":
                answer["sees"] = begins_with(asked["path"], bytes.fromhex(asked["mark"]))
            case "POST", "/memory":
                self._drop_memory()  # of a trainer before, which may have been killed
                self._drop_adapters()
                self._memory = _Memory(self._place(secrets.token_hex(8)), int(asked["num_bytes"]))
                answer["path"] = str(self._memory.path)
            case "PUT", "/memory":
                if self._memory is None or str(self._memory.path) != asked["path"]:
                    raise ValueError("another trainer has connected since; give each run its own server")
                await self._memory.write(int(asked["place"]), body)
            case "PUT", "/adapters":
                num_bytes = int(dict(scope["headers"]).get(b"content-length", 0))
                answer["path"] = str(await self._write_adapter(asked["name"], asked["file"], body, num_bytes=num_bytes))
            case "DELETE", "/adapters":
                shutil.rmtree(self._place(asked["name"]), ignore_errors=True)
            case method, path:
                raise LookupError(f"there is no {method} {ROUTES}{path}")
        return answer

    def _drop_memory(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _drop_adapters(self) -> None:
        for left in self._home.path.iterdir() if self._home is not None else ():
            shutil.rmtree(left, ignore_errors=True)

    def _close(self) -> None:
        self._drop_memory()
        if self._home is not None:
            self._home.close()
            self._home = None

    def _place(self, name: str) -> Path:
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the plain name of a file")
        self._home = self._home or HeldDirectory()
        return self._home.path / name

    async def _write_adapter(self, name: str, file: str, body: AsyncIterator[bytes], *, num_bytes: int) -> Path:
        place = self._place(name)
        written_to = place / self._place(file).name
        place.mkdir(exist_ok=True)
        try:
            with written_to.open("wb") as written:
                if num_bytes:
                    reserve(written.fileno(), num_bytes, "the adapters", place=place.parent.parent)
                async for part in body:
                    written.write(part)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)  # what is there of it is memory, and no trainer may remove it any more
            raise
        return place


class _Memory:
    """Memory that vLLM's processes open by a link to this one's handle, and that goes with the last of them.

    It is in no directory, so that the size of ``/dev/shm`` does not matter. Handles come again, the names of links do not.
    """

    def __init__(self, link: Path, num_bytes: int) -> None:
        left = psutil.virtual_memory().available
        if num_bytes > left:  # taking it would have the kernel end the server, or another process
            asked = f"{num_bytes / 2**20:.1f} MiB are asked for, {left / 2**20:.1f} are left"
            raise OSError(errno.ENOMEM, f"this machine has no memory for buckets of weights: {asked}")
        self._file = os.fdopen(os.memfd_create("grpo_fast-weights"), "r+b")
        reserve(self._file.fileno(), num_bytes, "buckets of weights")
        self._bytes = mmap.mmap(self._file.fileno(), num_bytes)
        link.symlink_to(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")
        self.path = link

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
        self._bytes.close()
        self._file.close()

    async def write(self, place: int, body: AsyncIterator[bytes]) -> None:
        async for part in body:
            self._bytes[place : place + len(part)] = part  # mmap raises an IndexError where it does not fit
            place += len(part)


def _has_key(scope: Mapping[str, Any]) -> bool:
    key = api_key()
    return key is None or hmac.compare_digest(dict(scope["headers"]).get(b"authorization", b""), f"Bearer {key}".encode())


def begins_with(path: str, mark: bytes) -> bool:
    """Whether there is such a file here; one of another machine may have its name, but not what it holds.

    Raises:
        ValueError: the mark has not :data:`MARK_BYTES`.
    """
    if len(mark) != MARK_BYTES:
        raise ValueError(f"a mark has {MARK_BYTES} bytes, not {len(mark)}")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would hold the server up
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(handle).st_mode) and os.pread(handle, MARK_BYTES, 0) == mark
    finally:
        os.close(handle)


async def _body(receive: _Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionAbortedError("the trainer is gone")
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return
