"""The worker's side of the reward pool: a process that loads reward functions once and answers one request at a time.

It is started as plain ``python -c``, so that the user's ``__main__`` is never imported a second time, and it speaks
length-prefixed pickles over a socket of its own: what a reward function prints goes to the parent's standard error.
It ends with its parent, however that one ends: an idle worker reads the end of the socket, a busy one sees its parent's id
change, and one that is stuck in C code is ended by a timer that needs no interpreter.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import socket
import struct
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from grpo_fast.async_code import AsyncCode
from grpo_fast.rewards.call import RewardFunction, await_reward, call_reward, check_columns, describe_failure, resolve_reward
from grpo_fast.user_code import is_async


class Reply(NamedTuple):
    """What a worker says of the functions that it has loaded, or of one that it has called."""

    status: Literal["ok", "error"]
    value: Any
    """Loaded: by number, whether a function is async; called: a :class:`~grpo_fast.types.Scored`; failed: one line."""
    trace: str = ""
    """The traceback of what failed."""
    function: int = -1
    """Number of the function that was called."""


HEADER = struct.Struct("!Q")
"""Length in bytes of the pickle that follows."""

_STDERR = 2  # the descriptor: there is no sys.stderr where the parent has closed its own
_PARENT_POLL_S = 0.5
_ORPHAN_GRACE_S = 2.0


def pack(payload: bytes) -> bytes:
    """A frame: the payload's length, then the payload."""
    return HEADER.pack(len(payload)) + payload


def serve(descriptor: int, parent_id: int) -> None:
    """Answers requests until the socket ends.

    The first request holds the reward functions by number, names as they are and callables pickled, and the dataset's columns,
    ``None`` where they are not known yet. Each later one holds the numbers of one function, or of several async ones that are
    awaited together, the deadline in seconds and the pickled arguments; each function is answered as soon as it is through.

    Args:
        descriptor: the inherited socket.
        parent_id: process id of the pool's process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable(file=_STDERR)
    threading.Thread(target=_end_with_parent, args=(parent_id,), daemon=True).start()
    with socket.socket(fileno=descriptor) as channel, contextlib.closing(AsyncCode()) as loop:
        order = _read(channel)
        if order is None:
            return
        reply, rewards = _loaded(*pickle.loads(order))
        _send(channel, reply)
        while (request := _read(channel)) is not None:
            _answer(channel, rewards, request, loop)
        _end_what_is_left(channel)


def _loaded(specs: Mapping[int, str | bytes], columns: Sequence[str] | None) -> tuple[Reply, dict[int, RewardFunction]]:
    try:
        rewards = {
            number: resolve_reward(spec if isinstance(spec, str) else pickle.loads(spec)) for number, spec in specs.items()
        }
        if columns is not None:
            for reward in rewards.values():
                check_columns(reward, columns)
    except (ValueError, TypeError) as error:
        return Reply("error", str(error), traceback.format_exc()), {}
    except BaseException as error:
        message = (
            f"a reward function cannot be loaded in a worker process: {describe_failure(error)}; "
            "give it as 'module:function' with its folder on the Python path, or set reward_workers to 0"
        )
        return Reply("error", message, traceback.format_exc()), {}
    return Reply("ok", {number: is_async(reward.function) for number, reward in rewards.items()}), rewards


def _answer(channel: socket.socket, rewards: Mapping[int, RewardFunction], request: bytes, loop: AsyncCode) -> None:
    functions, timeout_s, pickled = pickle.loads(request)
    faulthandler.dump_traceback_later(timeout_s + _ORPHAN_GRACE_S, exit=True, file=_STDERR)
    try:
        arguments = pickle.loads(pickled)
    except BaseException as error:
        for function in functions:
            _send(channel, _failed(function, error))
    else:
        if len(functions) == 1:
            _send(channel, _called(functions[0], rewards, arguments, loop))
        else:
            loop.together([_await_and_send(channel, function, rewards[function], arguments) for function in functions])
    finally:
        faulthandler.cancel_dump_traceback_later()


def _called(function: int, rewards: Mapping[int, RewardFunction], arguments: Mapping[str, Any], loop: AsyncCode) -> Reply:
    try:
        return Reply("ok", call_reward(rewards[function], arguments, loop), function=function)
    except BaseException as error:  # SystemExit too must not end the worker
        return _failed(function, error)


async def _await_and_send(channel: socket.socket, function: int, reward: RewardFunction, arguments: Mapping[str, Any]) -> None:
    try:
        reply = Reply("ok", await await_reward(reward, arguments), function=function)
    except BaseException as error:
        reply = _failed(function, error)
    _send(channel, reply)


def _failed(function: int, error: BaseException) -> Reply:
    return Reply("error", describe_failure(error), "".join(traceback.format_exception(error)), function)


def _read(channel: socket.socket) -> bytes | None:
    header = _read_exactly(channel, HEADER.size)
    return None if header is None else _read_exactly(channel, HEADER.unpack(header)[0])


def _read_exactly(channel: socket.socket, size: int) -> bytes | None:
    buffer = bytearray(size)
    view, filled = memoryview(buffer), 0
    while filled < size:
        count = channel.recv_into(view[filled:])
        if count == 0:
            return None
        filled += count
    return bytes(buffer)


def _send(channel: socket.socket, reply: Reply) -> None:
    channel.sendall(pack(pickle.dumps(reply)))


def _end_what_is_left(channel: socket.socket) -> None:
    """Ends what reward functions started, where the pool has been dropped or killed; one that closes hears this and does it."""
    try:
        channel.send(b"\0")
    except OSError:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the worker itself still has to end in order
        os.killpg(os.getpgrp(), signal.SIGTERM)


def _end_with_parent(parent_id: int) -> None:
    while os.getppid() == parent_id:
        time.sleep(_PARENT_POLL_S)
    # The worker leads its own process group: what a reward function started goes with it.
    os.killpg(os.getpgrp(), signal.SIGKILL)
